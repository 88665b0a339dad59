"""The scan whose gates are 2 x 2 blocks, in chunks of time where lanes are few.

A lane is a unit, whose state is the pair (p, q); pp, pq, qp, qq are the numbers of its block.
Keeps the gates, and h in b's dtype.
"""

# B batch, T time, H state width

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.ops.triton.lanes import FEW, block_of, lanes, programs_of, steps
from seqlm.ops.triton.launch import launch
from seqlm.ops.triton.numbers import only, parts_at, two_at, write_parts, write_two
from seqlm.ops.triton.scans import beginning, cut


@triton.jit
def times(pp, pq, qp, qq, p, q):
    """A block times a pair."""
    return pp * p + pq * q, qp * p + qq * q


@triton.jit
def two_beginning(first, ends, b, c, H, inside):
    """Both numbers of a chunk's state before its first step."""
    p = beginning(first, ends, b, c, 2 * H, inside)
    return p, beginning(first + H, ends + H, b, c, 2 * H, inside)


@triton.jit(do_not_specialize=["T", "length"])
def block_forward(
    a, b_in, h0, ends, h, last, T, H, length, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):
    """h of a chunk of `length` steps.  Gates (B, T, 2, 2, H), the rest (B, T, 2, H) and (B, 2, H);
    ends: (B, chunks - 1, 2, H), of all chunks but the last."""
    b, c, inside = lanes(H, BLOCK)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, T)
    p, q = two_beginning(h0, ends, b, c, H, inside)
    for start in range(begin, end, UNROLL):
        gates, news = (), ()
        for i in tl.static_range(UNROLL):
            row = b * T + start + i
            mask = only(inside, start + i < end)
            gates += (parts_at(a + row * 4 * H, c, H, mask, 4),)
            news += (two_at(b_in + row * 2 * H, c, H, mask),)
        for i in tl.static_range(UNROLL):
            there = start + i < end
            pp, pq, qp, qq = gates[i]
            new_p, new_q = news[i]
            kept_p, kept_q = times(pp, pq, qp, qq, p, q)
            p, q = tl.where(there, kept_p + new_p, p), tl.where(there, kept_q + new_q, q)
            write_two(h + (b * T + start + i) * 2 * H, c, H, p, q, only(inside, there))
    write_two(last + b * 2 * H, c, H, p, q, only(inside, end == T))


@triton.jit(do_not_specialize=["T", "length"])
def block_backward(
    a,
    h0,
    h,
    dh,
    dlast,
    ends,
    da,
    db,
    dh0,
    T,
    H,
    length,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The gradients of a chunk of `length` steps, from its last to its first; chunks count from the
    last step on."""
    b, c, inside = lanes(H, BLOCK)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, T)
    dp, dq = two_beginning(dlast, ends, b, c, H, inside)
    first_p, first_q = two_at(h0 + b * 2 * H, c, H, inside)
    for start in range(begin, end, UNROLL):
        gates, olds, d_outs = (), (), ()
        for i in tl.static_range(UNROLL):
            there = only(inside, start + i < end)
            t = T - 1 - start - i
            row = b * T + t
            gates += (parts_at(a + row * 4 * H, c, H, there, 4),)
            olds += (two_at(h + (row - 1) * 2 * H, c, H, only(there, t > 0)),)
            d_outs += (two_at(dh + row * 2 * H, c, H, there),)
        for i in tl.static_range(UNROLL):
            there = only(inside, start + i < end)
            t = T - 1 - start - i
            row = b * T + t
            pp, pq, qp, qq = gates[i]
            p, q = olds[i]
            p, q = tl.where(t > 0, p, first_p), tl.where(t > 0, q, first_q)
            d_p, d_q = d_outs[i]
            d_p, d_q = d_p + dp, d_q + dq
            write_parts(da + row * 4 * H, c, H, d_p * p, d_p * q, d_q * p, d_q * q, there, 4)
            write_two(db + row * 2 * H, c, H, d_p, d_q, there)
            old_p, old_q = times(pp, qp, pq, qq, d_p, d_q)
            dp, dq = tl.where(start + i < end, old_p, dp), tl.where(start + i < end, old_q, dq)
    write_two(dh0 + b * 2 * H, c, H, dp, dq, only(inside, end == T))


@triton.jit(do_not_specialize=["T", "length"])
def block_ends(
    a,
    news,
    factors,
    offsets,
    T,
    H,
    length,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The linear function that maps a chunk's start to its end: end = factor * start + offset.

    factors: (B, chunks - 1, 2, 2, H), offsets: (B, chunks - 1, 2, H).  BACKWARD: chunks count from
    the last step to the first, blocks are transposed, and news is dh.
    """
    b, c, inside = lanes(H, BLOCK)
    begin = tl.program_id(1) * length
    end = begin + length
    none, one = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 1.0, tl.float32)
    p, q, f_pp, f_pq, f_qp, f_qq = none, none, one, none, none, one
    for start in range(begin, end, UNROLL):
        gates, pairs = (), ()
        for i in tl.static_range(UNROLL):
            row = b * T + start + i
            if BACKWARD:
                row = b * T + T - 1 - start - i
            mask = only(inside, start + i < end)
            gates += (parts_at(a + row * 4 * H, c, H, mask, 4),)
            pairs += (two_at(news + row * 2 * H, c, H, mask),)
        for i in tl.static_range(UNROLL):
            there = start + i < end
            pp, pq, qp, qq = gates[i]
            new_p, new_q = pairs[i]
            if BACKWARD:
                pq, qp = qp, pq
                new_p, new_q = times(pp, pq, qp, qq, new_p, new_q)
            kept_p, kept_q = times(pp, pq, qp, qq, p, q)
            p, q = tl.where(there, kept_p + new_p, p), tl.where(there, kept_q + new_q, q)
            # the factor is a block: its two columns advance like states without inputs
            kept_p, kept_q = times(pp, pq, qp, qq, f_pp, f_qp)
            f_pp, f_qp = tl.where(there, kept_p, f_pp), tl.where(there, kept_q, f_qp)
            kept_p, kept_q = times(pp, pq, qp, qq, f_pq, f_qq)
            f_pq, f_qq = tl.where(there, kept_p, f_pq), tl.where(there, kept_q, f_qq)
    to = b * tl.num_programs(1) + tl.program_id(1)
    write_parts(factors + to * 4 * H, c, H, f_pp, f_pq, f_qp, f_qq, inside, 4)
    write_two(offsets + to * 2 * H, c, H, p, q, inside)


def forward(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensors, Tensors]:
    a, b, h0 = a.contiguous(), b.contiguous(), h0.contiguous()
    h, last = torch.empty_like(b), torch.empty_like(h0)
    ends, length, count = _chunked(a, b, h0, BACKWARD=False)
    _launch(block_forward, h0, a.shape[1], length, count, a, b, h0, ends, h, last)
    return (h, last), (a, h, h0)


def backward(saved: Tensors, gradients: Tensors) -> Tensors:
    a, h, h0 = saved
    dh, d_last = (d.contiguous() for d in gradients)
    da, db, dh0 = torch.empty_like(a), torch.empty_like(h), torch.empty_like(h0)
    ends, length, count = _chunked(a, dh, d_last, BACKWARD=True)
    arguments = a, h0, h, dh, d_last, ends, da, db, dh0
    _launch(block_backward, h0, a.shape[1], length, count, *arguments)
    return da, db, dh0


def _chunked(a: Tensor, news: Tensor, first: Tensor, **direction: bool) -> tuple[Tensor, int, int]:
    """The states in which all chunks but the last end, (B, chunks - 1, 2, H), a chunk's steps, and
    how many chunks there are."""
    batch, time, *_, width = a.shape
    length, count = cut(first, time)
    if count == 1:
        return first, length, count  # one chunk: its kernel reads no ends
    others = count - 1
    factors = first.new_empty(batch, others, 2, 2, width)
    ends, offsets = (first.new_empty(batch, others, 2, width) for _ in range(2))
    _launch(block_ends, first, time, length, others, a, news, factors, offsets, **direction)
    arguments = factors, offsets, first, first, ends, torch.empty_like(first)
    _launch(block_forward, first, others, others, 1, *arguments)
    return ends, length, count


def _launch(
    kernel: Any,
    state: Tensor,
    time: int,
    length: int,
    count: int,
    *arguments: Tensor,
    **constants: Any,
) -> None:
    """Run a kernel for the lanes of a state (B, 2, H), in `count` chunks of `length` steps."""
    width = state.shape[-1]
    constants |= dict(BLOCK=block_of(width, FEW), UNROLL=steps(8, length))
    launch(kernel, (programs_of(state, FEW), count), *arguments, time, width, length, **constants)
