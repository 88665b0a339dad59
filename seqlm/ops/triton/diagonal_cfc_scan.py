"""The recurrence of a diagonal CfC: one kernel each way.

Keeps only the drive and h: all else is computed again on the way back.
"""

# B batch, T time, H state width

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.ops.triton.lanes import lanes, run_lanes
from seqlm.ops.triton.numbers import (
    new_state,
    new_state_gradients,
    only,
    parts_at,
    read,
    sigmoid,
    write,
    write_parts,
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
    d_drive, parts = torch.empty_like(drive), weights.new_empty(len(h), *weights.shape)
    dh0 = d_last.clone(memory_format=torch.contiguous_format)
    form = dict(PARTS=drive.shape[2] // h0.shape[1], GATED=gated)
    arguments = *saved, dh.contiguous(), d_drive, dh0, parts, tau
    run_lanes(diagonal_cfc_backward, h0, drive.shape[1], *arguments, **form)
    return d_drive, dh0, parts.sum(0)


@triton.jit(do_not_specialize=["T"])
def diagonal_cfc_forward(
    drive,
    h0,
    weights,
    h,
    last,
    tau,
    T,
    H,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """drive: (B, T, 3 H), or (B, T, 4 H) with a leak.  weights: (3, H)."""
    b, c, inside = lanes(H, BLOCK)
    state = read(h0 + b * H, c, inside)
    w_1, w_2, w_k, _ = parts_at(weights, c, H, inside, 3)
    for start in range(0, T, UNROLL):
        drives = ()
        for i in tl.static_range(UNROLL):
            row = b * T + start + i
            mask = only(inside, start + i < T)
            drives += (parts_at(drive + row * PARTS * H, c, H, mask, PARTS),)
        for i in tl.static_range(UNROLL):
            there = start + i < T
            f_1, f_2, k, leak = drives[i]
            k = tau * (k + w_k * state)
            new = new_state(f_1 + w_1 * state, f_2 + w_2 * state, k, GATED)
            if PARTS == 4:
                g, _ = sigmoid(leak)
                new = state + g * (new - state)
            state = tl.where(there, new, state)
            write(h + (b * T + start + i) * H, c, state, only(inside, there))
    write(last + b * H, c, state, inside)


@triton.jit(do_not_specialize=["T"])
def diagonal_cfc_backward(
    drive,
    h0,
    weights,
    h,
    dh,
    d_drive,
    d_at,
    parts,
    tau,
    T,
    H,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """In place: d_at, (B, H), holds the gradient of the last state, then of the first.

    parts: (B, 3, H), a row's part of the weights' gradient.
    """
    b, c, inside = lanes(H, BLOCK)
    carry, first = read(d_at + b * H, c, inside), read(h0 + b * H, c, inside)
    w_1, w_2, w_k, _ = parts_at(weights, c, H, inside, 3)
    sum_1, sum_2 = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    sum_k = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, T, UNROLL):
        drives, olds, d_outs = (), (), ()
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            row = b * T + t
            there = only(inside, t >= 0)
            drives += (parts_at(drive + row * PARTS * H, c, H, there, PARTS),)
            olds += (read(h + (row - 1) * H, c, only(inside, t > 0)),)
            d_outs += (read(dh + row * H, c, there),)
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            f_1, f_2, k, leak = drives[i]
            old = tl.where(t > 0, olds[i], first)
            f_1, f_2, k = f_1 + w_1 * old, f_2 + w_2 * old, tau * (k + w_k * old)
            # before the first step d is 0, so that the sums stay as they are
            d = tl.where(t >= 0, carry + d_outs[i], 0.0)
            d_new, d_old, d_leak = d, tl.full((BLOCK,), 0.0, tl.float32), leak
            if PARTS == 4:
                g, rest = sigmoid(leak)
                d_leak = d * (new_state(f_1, f_2, k, GATED) - old) * g * rest
                d_new, d_old = d * g, d * rest
            d_1, d_2, d_k = new_state_gradients(d_new, f_1, f_2, k, GATED)
            d_k = tau * d_k
            d_old += w_1 * d_1 + w_2 * d_2 + w_k * d_k
            carry = tl.where(t >= 0, d_old, carry)
            sum_1, sum_2, sum_k = sum_1 + d_1 * old, sum_2 + d_2 * old, sum_k + d_k * old
            to = d_drive + (b * T + t) * PARTS * H
            write_parts(to, c, H, d_1, d_2, d_k, d_leak, only(inside, t >= 0), PARTS)
    write(d_at + b * H, c, carry, inside)
    write_parts(parts + b * 3 * H, c, H, sum_1, sum_2, sum_k, sum_k, inside, 3)
