"""Dense CfC of one backbone layer: two kernels a step, of the backbone and of the heads."""

# B batch, T time, D width, U backbone units

import triton
import triton.language as tl

from seqlm.ops._triton.numbers import (
    d_new_of,
    new_of,
    only,
    parts_at,
    read,
    sigmoid,
    tanh,
    write,
    write_parts,
)
from seqlm.ops._triton.tiles import products, run_tiles, tile_of


@triton.jit
def activation(x, ACT: tl.constexpr):
    """And its derivative: by number, as the compiled loops have them."""
    if ACT == 0:  # lecun_tanh
        f, slope = tanh(0.666 * x)
        f, slope = 1.7159 * f, 1.7159 * 0.666 * slope
    elif ACT == 1:
        f, slope = tanh(x)
    elif ACT == 2:  # relu, which lets NaN through
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
    """The backbone at t.  kept: (B, T, 2 U + 3 D), what goes into its activation and what comes
    out, what goes into both tanh and the gate."""
    _, r, n, inside = tile_of(B, U, ROWS, UNITS)
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
    """h_t, where `cfc_forward_p` has been.  heads: (3 D, U).  last: (B, D), gets the last."""
    _, r, n, inside = tile_of(B, D, ROWS, UNITS)
    row = r * T + t
    b_1, b_2, b_k, _ = parts_at(bias, n, D, n < D, 3)
    p = kept + row * (2 * U + 3 * D) + U
    w = heads + n * U, heads + (D + n) * U, heads + (2 * D + n) * U
    none = tl.full((ROWS, UNITS), 0.0, tl.float32)
    totals = none + b_1, none + b_2, none + b_k
    f_1, f_2, k = products((p, p, p), w, totals, r < B, n < D, U, INNER)
    write_parts(kept + 2 * U, row * (2 * U + 3 * D) + n, D, f_1, f_2, k, k, inside, 3)
    new = new_of(f_1, f_2, k, GATED)
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

    dh_at: (B, D), of the last state when the last step begins; for t = -1, h0, of that when it
    ends.
    """
    _, r, n, inside = tile_of(B, D, ROWS, UNITS)
    row, there = r * T + t, only(inside, t >= 0)
    d = read(dh, row * D + n, there) + read(dh_at, r * D + n, only(inside, t + 1 == T))
    f_1, f_2, k, _ = parts_at(kept + 2 * U, row * (2 * U + 3 * D) + n, D, there, 3)
    later, rows = d_drive + (row + 1) * U, only(r < B, t + 1 < T)
    (d,) = products((later,), (to_h + n * U,), (d,), rows, n < D, U, INNER)
    d_1, d_2, d_k = d_new_of(d, f_1, f_2, k, GATED)
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
    """The gradient of what goes into the backbone at t, where `cfc_backward_h` has been.  to_p:
    (U, 3 D)."""
    _, r, n, inside = tile_of(B, U, ROWS, UNITS)
    row = r * T + t
    _, slope = activation(read(kept, row * (2 * U + 3 * D) + n, inside), ACT)
    d, w = d_heads + row * 3 * D, to_p + n * 3 * D
    none = tl.full((ROWS, UNITS), 0.0, tl.float32)
    d, w = (d, d + D, d + 2 * D), (w, w + D, w + 2 * D)
    d_1, d_2, d_k = products(d, w, (none, none, none), r < B, n < U, D, INNER)
    write(d_drive, row * U + n, (d_1 + d_2 + d_k) * slope, inside)


def dense_cfc_forward(drive, h_at, from_h, heads, bias, h, kept, act, gated) -> None:
    """h_at: (B, D), the first state when it begins, the last when it ends."""
    (batch, time, units), width = drive.shape, h.shape[2]
    shape = batch, time, units, width
    h0, from_h, heads = (x.to(drive.dtype).contiguous() for x in (h_at, from_h, heads))
    for t in range(time):
        given = drive, h0, from_h, h, kept, t, *shape
        run_tiles(cfc_forward_p, (batch, 1, units), 1, *given, ACT=act)
        given = kept, heads, bias, h, h_at, t, *shape
        run_tiles(cfc_forward_h, (batch, 1, width), 3, *given, GATED=gated)


def dense_cfc_backward(dh, kept, from_h, heads, d_drive, d_heads, dh_at, act, gated) -> None:
    """dh_at: (B, D), of the last state when it begins, of the first when it ends."""
    (batch, time, width), units = dh.shape, d_drive.shape[2]
    shape = batch, time, units, width
    to_h, to_p = (w.t().to(dh.dtype).contiguous() for w in (from_h, heads))
    for t in range(time - 1, -2, -1):
        given = dh, kept, to_h, d_drive, d_heads, dh_at, t, *shape
        run_tiles(cfc_backward_h, (batch, 1, width), 1, *given, GATED=gated)
        if t >= 0:
            given = kept, to_p, d_drive, d_heads, t, *shape
            run_tiles(cfc_backward_p, (batch, 1, units), 3, *given, ACT=act)
