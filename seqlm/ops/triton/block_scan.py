"""The scan whose gates are 2 x 2 blocks, in chunks of time where lanes are few (see scans.py).

A lane is a unit, whose state is the pair (p, q); pp, pq, qp, qq are the numbers of its block.
Keeps the gates, and h in b's dtype.
"""

# B batch, T time, H state width

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.ops.triton.lanes import COMPUTING, lanes, run_chunks
from seqlm.ops.triton.numbers import mask_if, read_rows, write_rows
from seqlm.ops.triton.scans import beginning, chunk_ends


@triton.jit
def times(pp, pq, qp, qq, p, q):
    """A block times a pair."""
    return pp * p + pq * q, qp * p + qq * q


@triton.jit
def pair_beginning(first, ends, b, channels, H, inside):
    """Both numbers of a chunk's state before its first step."""
    p = beginning(first, ends, b, channels, 2 * H, inside)
    return p, beginning(first + H, ends + H, b, channels, 2 * H, inside)


@triton.jit(do_not_specialize=["T", "length"])
def block_forward(
    a, b_in, h0, ends, h, last, T, H, length, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):
    """h of a chunk of `length` steps.  Gates (B, T, 2, 2, H), the rest (B, T, 2, H) and (B, 2, H);
    ends: (B, chunks - 1, 2, H), where chunks but the last end."""
    b, channels, inside = lanes(H, BLOCK)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, T)
    p, q = pair_beginning(h0, ends, b, channels, H, inside)
    for start in range(begin, end, UNROLL):
        gates, inputs = (), ()
        for i in tl.static_range(UNROLL):
            row = b * T + start + i
            mask = mask_if(inside, start + i < end)
            gates += (read_rows(a + row * 4 * H, channels, H, mask, 4),)
            inputs += (read_rows(b_in + row * 2 * H, channels, H, mask, 2),)
        for i in tl.static_range(UNROLL):
            in_chunk = start + i < end
            pp, pq, qp, qq = gates[i]
            new_p, new_q = inputs[i]
            kept_p, kept_q = times(pp, pq, qp, qq, p, q)
            p, q = tl.where(in_chunk, kept_p + new_p, p), tl.where(in_chunk, kept_q + new_q, q)
            to = h + (b * T + start + i) * 2 * H
            write_rows(to, channels, H, (p, q), mask_if(inside, in_chunk))
    write_rows(last + b * 2 * H, channels, H, (p, q), mask_if(inside, end == T))


@triton.jit(do_not_specialize=["T", "length"])
def block_backward(
    a, h0, h, dh, d_last, ends, da, db, dh0, T, H, length, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):
    """The gradients of a chunk of `length` steps, from its last step to its first.

    Chunks count from the last time step on.  In: dh, d_last: dL/dh_t and dL/d(last state) through
    the outputs alone; ends: what later chunks pass on to earlier ones, (B, chunks - 1, 2, H).
    Out: da, db and dh0: dL/d(a, b, h0).  carry_p, carry_q: what step t + 1 adds to dL/dh_t.
    """
    b, channels, inside = lanes(H, BLOCK)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, T)
    carry_p, carry_q = pair_beginning(d_last, ends, b, channels, H, inside)
    first_p, first_q = read_rows(h0 + b * 2 * H, channels, H, inside, 2)
    for start in range(begin, end, UNROLL):
        gates, olds, d_outs = (), (), ()
        for i in tl.static_range(UNROLL):
            mask = mask_if(inside, start + i < end)
            t = T - 1 - start - i
            row = b * T + t
            gates += (read_rows(a + row * 4 * H, channels, H, mask, 4),)
            olds += (read_rows(h + (row - 1) * 2 * H, channels, H, mask_if(mask, t > 0), 2),)
            d_outs += (read_rows(dh + row * 2 * H, channels, H, mask, 2),)
        for i in tl.static_range(UNROLL):
            in_chunk = start + i < end
            mask = mask_if(inside, in_chunk)
            t = T - 1 - start - i
            row = b * T + t
            pp, pq, qp, qq = gates[i]
            p, q = olds[i]
            p, q = tl.where(t > 0, p, first_p), tl.where(t > 0, q, first_q)
            dp, dq = d_outs[i]
            dp, dq = dp + carry_p, dq + carry_q
            write_rows(da + row * 4 * H, channels, H, (dp * p, dp * q, dq * p, dq * q), mask)
            write_rows(db + row * 2 * H, channels, H, (dp, dq), mask)
            old_p, old_q = times(pp, qp, pq, qq, dp, dq)  # the transposed block
            carry_p = tl.where(in_chunk, old_p, carry_p)
            carry_q = tl.where(in_chunk, old_q, carry_q)
    write_rows(dh0 + b * 2 * H, channels, H, (carry_p, carry_q), mask_if(inside, end == T))


@triton.jit(do_not_specialize=["T", "length"])
def block_ends(
    a, inputs, factors, offsets, T, H, length,
    BACKWARD: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The linear function that maps a chunk's start to its end: end = factor * start + offset.

    factors: (B, chunks - 1, 2, 2, H), offsets: (B, chunks - 1, 2, H).  BACKWARD: the same for the
    gradient that is passed from step to step; chunks count from the last step to the first, blocks
    are transposed, and inputs is dL/dh.
    """
    b, channels, inside = lanes(H, BLOCK)
    begin = tl.program_id(1) * length
    end = begin + length
    zero, one = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 1.0, tl.float32)
    p, q, f_pp, f_pq, f_qp, f_qq = zero, zero, one, zero, zero, one
    for start in range(begin, end, UNROLL):
        gates, pairs = (), ()
        for i in tl.static_range(UNROLL):
            row = b * T + start + i
            if BACKWARD:
                row = b * T + T - 1 - start - i
            mask = mask_if(inside, start + i < end)
            gates += (read_rows(a + row * 4 * H, channels, H, mask, 4),)
            pairs += (read_rows(inputs + row * 2 * H, channels, H, mask, 2),)
        for i in tl.static_range(UNROLL):
            in_chunk = start + i < end
            pp, pq, qp, qq = gates[i]
            new_p, new_q = pairs[i]
            if BACKWARD:
                pq, qp = qp, pq
                new_p, new_q = times(pp, pq, qp, qq, new_p, new_q)
            kept_p, kept_q = times(pp, pq, qp, qq, p, q)
            p, q = tl.where(in_chunk, kept_p + new_p, p), tl.where(in_chunk, kept_q + new_q, q)
            # the factor is a block: its two columns advance like states without inputs
            kept_p, kept_q = times(pp, pq, qp, qq, f_pp, f_qp)
            f_pp, f_qp = tl.where(in_chunk, kept_p, f_pp), tl.where(in_chunk, kept_q, f_qp)
            kept_p, kept_q = times(pp, pq, qp, qq, f_pq, f_qq)
            f_pq, f_qq = tl.where(in_chunk, kept_p, f_pq), tl.where(in_chunk, kept_q, f_qq)
    to = b * tl.num_programs(1) + tl.program_id(1)
    write_rows(factors + to * 4 * H, channels, H, (f_pp, f_pq, f_qp, f_qq), inside)
    write_rows(offsets + to * 2 * H, channels, H, (p, q), inside)


FEW_CHANNELS = dict(channels=COMPUTING)  # of a program


def forward(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensors, Tensors]:
    a, b, h0 = a.contiguous(), b.contiguous(), h0.contiguous()
    h, last = torch.empty_like(b), torch.empty_like(h0)
    kernels, form = (block_ends, block_forward), dict(BACKWARD=False, **FEW_CHANNELS)
    ends, chunks = chunk_ends(*kernels, a, b, h0, FEW_CHANNELS, steps=8, **form)
    run_chunks(block_forward, h0, chunks, a, b, h0, ends, h, last, **FEW_CHANNELS)
    return (h, last), (a, h, h0)


def backward(saved: Tensors, gradients: Tensors) -> Tensors:
    a, h, h0 = saved
    dh, d_last = (d.contiguous() for d in gradients)
    da, db, dh0 = torch.empty_like(a), torch.empty_like(h), torch.empty_like(h0)
    kernels, form = (block_ends, block_forward), dict(BACKWARD=True, **FEW_CHANNELS)
    ends, chunks = chunk_ends(*kernels, a, dh, d_last, FEW_CHANNELS, steps=8, **form)
    arguments = a, h0, h, dh, d_last, ends, da, db, dh0
    run_chunks(block_backward, h0, chunks, *arguments, **FEW_CHANNELS)
    return da, db, dh0
