"""The recurrence of a diagonal CfC: one forward and one backward kernel.

Keeps only the drive and h; the backward pass computes everything else again.
"""

# B batch, T time, H state width

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.ops.triton.lanes import lanes, run_lanes
from seqlm.ops.triton.numbers import (
    mask_if,
    new_state,
    new_state_gradients,
    read,
    read_rows,
    sigmoid,
    write,
    write_rows,
)


def forward(
    drive: Tensor, h0: Tensor, weights: Tensor, gated: bool, tau: float
) -> tuple[Tensors, Tensors]:
    drive, h0, weights = (x.contiguous() for x in (drive, h0, weights))
    (batch, time, columns), width = drive.shape, h0.shape[1]
    h, last = drive.new_empty(batch, time, width), torch.empty_like(h0)
    form = dict(PARTS=columns // width, GATED=gated)
    run_lanes(diagonal_cfc_forward, h0, time, drive, h0, weights, h, last, tau, **form)
    return (h, last), (drive, h0, weights, h)


def backward(saved: Tensors, gradients: Tensors, gated: bool, tau: float) -> Tensors:
    drive, h0, weights, h = saved
    dh, d_last = gradients
    d_drive, weight_sums = torch.empty_like(drive), weights.new_empty(len(h), *weights.shape)
    dh0 = d_last.clone(memory_format=torch.contiguous_format)
    form = dict(PARTS=drive.shape[2] // h0.shape[1], GATED=gated)
    arguments = *saved, dh.contiguous(), d_drive, dh0, weight_sums, tau
    run_lanes(diagonal_cfc_backward, h0, drive.shape[1], *arguments, **form)
    return d_drive, dh0, weight_sums.sum(0)


@triton.jit(do_not_specialize=["T"])
def diagonal_cfc_forward(
    drive, h0, weights, h, last, tau, T, H,
    PARTS: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """drive: (B, T, 3 H), or (B, T, 4 H) with a leak.  weights: (3, H)."""
    b, channels, inside = lanes(H, BLOCK)
    state = read(h0 + b * H, channels, inside)
    w_1, w_2, w_k = read_rows(weights, channels, H, inside, 3)
    for start in range(0, T, UNROLL):
        drives = ()
        for i in tl.static_range(UNROLL):
            row, mask = b * T + start + i, mask_if(inside, start + i < T)
            drives += (read_rows(drive + row * PARTS * H, channels, H, mask, PARTS),)
        for i in tl.static_range(UNROLL):
            parts = drives[i]
            k = tau * (parts[2] + w_k * state)
            new = new_state(parts[0] + w_1 * state, parts[1] + w_2 * state, k, GATED)
            if PARTS == 4:
                g, _ = sigmoid(parts[3])
                new = state + g * (new - state)
            state = tl.where(start + i < T, new, state)
            write(h + (b * T + start + i) * H, channels, state, mask_if(inside, start + i < T))
    write(last + b * H, channels, state, inside)


@triton.jit(do_not_specialize=["T"])
def diagonal_cfc_backward(
    drive, h0, weights, h, dh, d_drive, d_state, weight_sums, tau, T, H,
    PARTS: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """In: dh, dL/dh_t through the output alone.  Out: d_drive, dL/d(drive).

    In place: d_state, (B, H), holds dL/d(last state), then dL/dh0.  carry: what step t + 1 adds to
    dL/dh_t.  weight_sums: (B, 3, H), one row's summands of dL/d(weights).
    """
    b, channels, inside = lanes(H, BLOCK)
    carry, first = read(d_state + b * H, channels, inside), read(h0 + b * H, channels, inside)
    w_1, w_2, w_k = read_rows(weights, channels, H, inside, 3)
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    sum_1, sum_2, sum_k = zero, zero, zero
    for start in range(0, T, UNROLL):
        drives, olds, d_outs = (), (), ()
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            row, mask = b * T + t, mask_if(inside, t >= 0)
            drives += (read_rows(drive + row * PARTS * H, channels, H, mask, PARTS),)
            olds += (read(h + (row - 1) * H, channels, mask_if(inside, t > 0)),)
            d_outs += (read(dh + row * H, channels, mask),)
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            parts = drives[i]
            old = tl.where(t > 0, olds[i], first)
            f_1, f_2, k = parts[0] + w_1 * old, parts[1] + w_2 * old, tau * (parts[2] + w_k * old)
            # where t < 0, d is 0, so that the sums do not change
            d = tl.where(t >= 0, carry + d_outs[i], 0.0)
            d_new, d_old, d_leak = d, zero, zero
            if PARTS == 4:
                g, rest = sigmoid(parts[3])
                d_leak = d * (new_state(f_1, f_2, k, GATED) - old) * g * rest
                d_new, d_old = d * g, d * rest
            d_1, d_2, d_k = new_state_gradients(d_new, f_1, f_2, k, GATED)
            d_k = tau * d_k
            d_old += w_1 * d_1 + w_2 * d_2 + w_k * d_k
            carry = tl.where(t >= 0, d_old, carry)
            sum_1, sum_2, sum_k = sum_1 + d_1 * old, sum_2 + d_2 * old, sum_k + d_k * old
            d_parts = d_1, d_2, d_k
            if PARTS == 4:
                d_parts += (d_leak,)
            to = d_drive + (b * T + t) * PARTS * H
            write_rows(to, channels, H, d_parts, mask_if(inside, t >= 0))
    write(d_state + b * H, channels, carry, inside)
    write_rows(weight_sums + b * 3 * H, channels, H, (sum_1, sum_2, sum_k), inside)
