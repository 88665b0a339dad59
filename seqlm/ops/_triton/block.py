"""The scan whose gates are blocks of 2 x 2."""

# B batch, T time, H state width

import triton
import triton.language as tl

from seqlm.ops._triton.lanes import lanes
from seqlm.ops._triton.numbers import only, parts_at, two_at, write, write_parts


@triton.jit
def block_forward(a, b_in, h0, h, T, H, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """Gates (B, T, 2, 2, H), the rest (B, T, 2, H) and (B, 2, H)."""
    b, c, inside = lanes(H, BLOCK)
    p, q = two_at(h0 + b * 2 * H, c, H, inside)
    for start in range(0, T, UNROLL):
        gates, news = (), ()
        for i in tl.static_range(UNROLL):
            row = b * T + start + i
            mask = only(inside, start + i < T)
            gates += (parts_at(a + row * 4 * H, c, H, mask, 4),)
            news += (two_at(b_in + row * 2 * H, c, H, mask),)
        for i in tl.static_range(UNROLL):
            there = start + i < T
            pp, pq, qp, qq = gates[i]
            p_new, q_new = news[i]
            p_new, q_new = p_new + pp * p + pq * q, q_new + qp * p + qq * q
            p, q = tl.where(there, p_new, p), tl.where(there, q_new, q)
            to = h + (b * T + start + i) * 2 * H
            write(to, c, p, only(inside, there))
            write(to + H, c, q, only(inside, there))


@triton.jit
def block_backward(a, h0, h, dh, da, db, dh0, T, H, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """The gradients of `block_forward`, from the last step to the first."""
    b, c, inside = lanes(H, BLOCK)
    first_p, first_q = two_at(h0 + b * 2 * H, c, H, inside)
    dp, dq = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, T, UNROLL):
        gates, olds, d_outs = (), (), ()
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            row = b * T + t
            gates += (parts_at(a + row * 4 * H, c, H, only(inside, t >= 0), 4),)
            olds += (two_at(h + (row - 1) * 2 * H, c, H, only(inside, t > 0)),)
            d_outs += (two_at(dh + row * 2 * H, c, H, only(inside, t >= 0)),)
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            row = b * T + t
            there = only(inside, t >= 0)
            pp, pq, qp, qq = gates[i]
            p, q = olds[i]
            p, q = tl.where(t > 0, p, first_p), tl.where(t > 0, q, first_q)
            d_p, d_q = d_outs[i]
            d_p, d_q = d_p + dp, d_q + dq
            write_parts(da + row * 4 * H, c, H, d_p * p, d_p * q, d_q * p, d_q * q, there, 4)
            write(db + row * 2 * H, c, d_p, there)
            write(db + row * 2 * H + H, c, d_q, there)
            dp = tl.where(t >= 0, pp * d_p + qp * d_q, dp)
            dq = tl.where(t >= 0, pq * d_p + qq * d_q, dq)
    write(dh0 + b * 2 * H, c, dp, inside)
    write(dh0 + b * 2 * H + H, c, dq, inside)
