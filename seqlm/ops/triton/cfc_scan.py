"""CfC's recurrence: two kernels a step, of the backbone and of the heads.

Keeps (B, T, 2 U + 3 D) in the drive's dtype: what goes into the backbone's activation, what comes
out of it, and what goes into both tanh and the gate.
"""

# B batch, T time, D width, U backbone units

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.cfc_scan import index_of, weight_gradients
from seqlm.ops.states import Tensors
from seqlm.ops.triton.numbers import (
    new_state,
    new_state_gradients,
    only,
    parts_at,
    read,
    sigmoid,
    tanh,
    write,
    write_parts,
)
from seqlm.ops.triton.tiles import products, run_tiles, tile_of


def forward(
    drive: Tensor,
    h0: Tensor,
    from_h: Tensor,
    heads: Tensor,
    bias: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensors, Tensors]:
    (batch, time, units), width = drive.shape, h0.shape[1]
    drive = drive.contiguous()
    h = drive.new_empty(batch, time, width)
    kept = drive.new_empty(batch, time, 2 * units + 3 * width)
    last = h0.clone(memory_format=torch.contiguous_format)
    # the products' operands in the drive's dtype
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
    """Returns f(x) and f'(x); ACT: its place in cfc_scan.ACTIVATIONS."""
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
    drive,
    h0,
    from_h,
    h,
    kept,
    t,
    B,
    T,
    U,
    D,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
):
    """The backbone at t: writes the first 2 U columns of kept."""
    r, n, inside = tile_of(B, U, ROWS, UNITS)
    row = r * T + t
    old = tl.where(t > 0, h + (row - 1) * D, h0 + r * D)
    p = (read(drive, row * U + n, inside),)
    (p,) = products((old,), (from_h + n * D,), p, r < B, n < U, D, INNER)
    to = row * (2 * U + 3 * D) + n
    write(kept, to, p, inside)
    p, _ = activation(p, ACT)
    write(kept + U, to, p, inside)


@triton.jit(do_not_specialize=["t", "T"])
def cfc_forward_h(
    kept,
    heads,
    bias,
    h,
    last,
    t,
    B,
    T,
    U,
    D,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
):
    """h_t, after `cfc_forward_p`.  heads: (3 D, U).  last: (B, D), written at the last step."""
    r, n, inside = tile_of(B, D, ROWS, UNITS)
    row = r * T + t
    b_1, b_2, b_k, _ = parts_at(bias, n, D, n < D, 3)
    p = kept + row * (2 * U + 3 * D) + U
    w = heads + n * U, heads + (D + n) * U, heads + (2 * D + n) * U
    none = tl.full((ROWS, UNITS), 0.0, tl.float32)
    totals = none + b_1, none + b_2, none + b_k
    f_1, f_2, k = products((p, p, p), w, totals, r < B, n < D, U, INNER)
    write_parts(kept + 2 * U, row * (2 * U + 3 * D) + n, D, f_1, f_2, k, k, inside, 3)
    new = new_state(f_1, f_2, k, GATED)
    write(h, row * D + n, new, inside)
    write(last, r * D + n, new, only(inside, t + 1 == T))


@triton.jit(do_not_specialize=["t", "T"])
def cfc_backward_h(
    dh,
    kept,
    to_h,
    d_drive,
    d_heads,
    dh_at,
    t,
    B,
    T,
    U,
    D,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
):
    """The gradients of what goes into h_t's tanh and gate.  to_h: (D, U).

    dh_at, (B, D), holds the last state's gradient, read at the last step.  t = -1 only writes the
    first state's gradient to it.
    """
    r, n, inside = tile_of(B, D, ROWS, UNITS)
    row, there = r * T + t, only(inside, t >= 0)
    d = read(dh, row * D + n, there) + read(dh_at, r * D + n, only(inside, t + 1 == T))
    f_1, f_2, k, _ = parts_at(kept + 2 * U, row * (2 * U + 3 * D) + n, D, there, 3)
    later, rows = d_drive + (row + 1) * U, only(r < B, t + 1 < T)
    (d,) = products((later,), (to_h + n * U,), (d,), rows, n < D, U, INNER)
    d_1, d_2, d_k = new_state_gradients(d, f_1, f_2, k, GATED)
    write_parts(d_heads, row * 3 * D + n, D, d_1, d_2, d_k, d_k, there, 3)
    write(dh_at, r * D + n, d, only(inside, t < 0))


@triton.jit(do_not_specialize=["t", "T"])
def cfc_backward_p(
    kept,
    to_p,
    d_drive,
    d_heads,
    t,
    B,
    T,
    U,
    D,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
):
    """The gradient of what goes into the backbone at t, after `cfc_backward_h`.  to_p: (U, 3 D)."""
    r, n, inside = tile_of(B, U, ROWS, UNITS)
    row = r * T + t
    _, slope = activation(read(kept, row * (2 * U + 3 * D) + n, inside), ACT)
    d, w = d_heads + row * 3 * D, to_p + n * 3 * D
    none = tl.full((ROWS, UNITS), 0.0, tl.float32)
    d, w = (d, d + D, d + 2 * D), (w, w + D, w + 2 * D)
    d_1, d_2, d_k = products(d, w, (none, none, none), r < B, n < U, D, INNER)
    write(d_drive, row * U + n, (d_1 + d_2 + d_k) * slope, inside)
