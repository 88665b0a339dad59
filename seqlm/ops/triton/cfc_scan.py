"""CfC's recurrence: two kernels a step, of the backbone and of the heads.

Keeps (B, T, 2 U + 3 D) in the drive's dtype: the argument and the value of the backbone's
activation, and the arguments of both tanh and of the gate.
"""

# B batch, T time, D width, U backbone units

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.cfc_scan import index_of, weight_gradients
from seqlm.ops.states import Tensors
from seqlm.ops.triton.numbers import (
    mask_if,
    new_state,
    new_state_gradients,
    read,
    read_rows,
    sigmoid,
    tanh,
    write,
    write_rows,
)
from seqlm.ops.triton.tiles import products, run_tiles, tile_of


def forward(
    drive: Tensor, h0: Tensor, from_h: Tensor, heads: Tensor, bias: Tensor,
    activation: str, gated: bool,
) -> tuple[Tensors, Tensors]:  # fmt: skip
    (batch, time, units), width = drive.shape, h0.shape[1]
    drive = drive.contiguous()
    h = drive.new_empty(batch, time, width)
    kept = drive.new_empty(batch, time, 2 * units + 3 * width)
    last = h0.clone(memory_format=torch.contiguous_format)
    # products read operands in the drive's dtype
    first, to_p, to_f = (x.to(drive.dtype).contiguous() for x in (h0, from_h, heads))
    shape, whole_bias = (batch, time, units, width), bias.float().contiguous()
    for t in range(time):
        arguments = drive, first, to_p, h, kept, t, *shape
        run_tiles(cfc_forward_p, (batch, units), 1, *arguments, ACT=index_of(activation))
        arguments = kept, to_f, whole_bias, h, last, t, *shape
        run_tiles(cfc_forward_h, (batch, width), 3, *arguments, GATED=gated)
    return (h, last), (h0, from_h, heads, bias, h, kept)


def backward(saved: Tensors, gradients: Tensors, activation: str, gated: bool) -> Tensors:
    _, from_h, heads, _, h, kept = saved
    dh, d_last = gradients
    (batch, time, width), units = h.shape, len(from_h)
    d_drive, d_heads = (h.new_empty(batch, time, size) for size in (units, 3 * width))
    d_state, dh = d_last.clone(memory_format=torch.contiguous_format), dh.contiguous()
    to_h, to_p = (w.t().to(h.dtype).contiguous() for w in (from_h, heads))
    shape = batch, time, units, width
    for t in range(time - 1, -2, -1):
        arguments = dh, kept, to_h, d_drive, d_heads, d_state, t, *shape
        run_tiles(cfc_backward_h, (batch, width), 1, *arguments, GATED=gated)
        if t >= 0:
            arguments = kept, to_p, d_drive, d_heads, t, *shape
            run_tiles(cfc_backward_p, (batch, units), 3, *arguments, ACT=index_of(activation))
    return d_drive, d_state, *weight_gradients(d_drive, d_heads, saved)


@triton.jit
def activation(x, ACT: tl.constexpr):
    """Returns f(x) and f'(x); ACT: the index of f in cfc_scan.ACTIVATIONS."""
    if ACT == 0:  # lecun_tanh
        f, slope = tanh(0.666 * x)
        f, slope = 1.7159 * f, 1.7159 * 0.666 * slope
    elif ACT == 1:
        f, slope = tanh(x)
    elif ACT == 2:  # relu, in a form that keeps NaN
        f, slope = tl.where(x <= 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)
    elif ACT == 3:  # silu
        s, rest = sigmoid(x)
        f, slope = x * s, s + x * s * rest
    else:  # gelu
        below = 0.5 + 0.5 * tl.erf(0.7071067811865476 * x)
        f, slope = x * below, below + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)
    return f, slope


@triton.jit(do_not_specialize=["t", "T"])
def cfc_forward_p(
    drive, h0, from_h, h, kept, t, B, T, U, D,
    ACT: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The backbone at t: writes the first 2 U columns of kept."""
    row, unit, inside = tile_of(B, U, ROWS, UNITS)
    at = row * T + t
    old = tl.where(t > 0, h + (at - 1) * D, h0 + row * D)
    p = (read(drive, at * U + unit, inside),)
    (p,) = products((old,), (from_h + unit * D,), p, row < B, unit < U, D, INNER)
    to = at * (2 * U + 3 * D) + unit
    write(kept, to, p, inside)
    p, _ = activation(p, ACT)
    write(kept + U, to, p, inside)


@triton.jit(do_not_specialize=["t", "T"])
def cfc_forward_h(
    kept, heads, bias, h, last, t, B, T, U, D,
    GATED: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """h_t, after `cfc_forward_p`.  heads: (3 D, U).  last: (B, D), written at the last step."""
    row, unit, inside = tile_of(B, D, ROWS, UNITS)
    at = row * T + t
    b_1, b_2, b_k = read_rows(bias, unit, D, unit < D, 3)
    p = kept + at * (2 * U + 3 * D) + U
    w = heads + unit * U, heads + (D + unit) * U, heads + (2 * D + unit) * U
    zero = tl.full((ROWS, UNITS), 0.0, tl.float32)
    totals = zero + b_1, zero + b_2, zero + b_k
    f_1, f_2, k = products((p, p, p), w, totals, row < B, unit < D, U, INNER)
    write_rows(kept + 2 * U, at * (2 * U + 3 * D) + unit, D, (f_1, f_2, k), inside)
    new = new_state(f_1, f_2, k, GATED)
    write(h, at * D + unit, new, inside)
    write(last, row * D + unit, new, mask_if(inside, t + 1 == T))


@triton.jit(do_not_specialize=["t", "T"])
def cfc_backward_h(
    dh, kept, to_h, d_drive, d_heads, d_state, t, B, T, U, D,
    GATED: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Completes dL/dh_t.  Out: d_heads, dL/d(arguments of h_t's two tanh and its gate).

    In: dh, dL/dh_t through the output alone; d_drive at t + 1, whose product with to_h, (D, U), is
    what step t + 1 adds.  In place: d_state, (B, D), holds dL/d(last state), which is read at the
    last step, then dL/dh0.  Only dL/dh0 is written at t = -1.
    """
    row, unit, inside = tile_of(B, D, ROWS, UNITS)
    at, valid = row * T + t, mask_if(inside, t >= 0)
    d = read(dh, at * D + unit, valid)
    d += read(d_state, row * D + unit, mask_if(inside, t + 1 == T))
    f_1, f_2, k = read_rows(kept + 2 * U, at * (2 * U + 3 * D) + unit, D, valid, 3)
    later, rows = d_drive + (at + 1) * U, mask_if(row < B, t + 1 < T)
    (d,) = products((later,), (to_h + unit * U,), (d,), rows, unit < D, U, INNER)
    d_f = new_state_gradients(d, f_1, f_2, k, GATED)
    write_rows(d_heads, at * 3 * D + unit, D, d_f, valid)
    write(d_state, row * D + unit, d, mask_if(inside, t < 0))


@triton.jit(do_not_specialize=["t", "T"])
def cfc_backward_p(
    kept, to_p, d_drive, d_heads, t, B, T, U, D,
    ACT: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """d_drive: dL/d(arguments of the backbone at t), after `cfc_backward_h`.  to_p: (U, 3 D)."""
    row, unit, inside = tile_of(B, U, ROWS, UNITS)
    at = row * T + t
    _, slope = activation(read(kept, at * (2 * U + 3 * D) + unit, inside), ACT)
    d_f, w = d_heads + at * 3 * D, to_p + unit * 3 * D
    zero = tl.full((ROWS, UNITS), 0.0, tl.float32)
    d_heads_at, w_heads = (d_f, d_f + D, d_f + 2 * D), (w, w + D, w + 2 * D)
    d_1, d_2, d_k = products(d_heads_at, w_heads, (zero, zero, zero), row < B, unit < U, D, INNER)
    write(d_drive, at * U + unit, (d_1 + d_2 + d_k) * slope, inside)
