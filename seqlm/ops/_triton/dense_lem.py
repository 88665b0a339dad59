"""LEM whose weights are too many for a program: two kernels a step, of z and of y."""

# B batch, T time, D width, G heads, S = D / G units of a head

import triton
import triton.language as tl

from seqlm.ops._triton.numbers import d_mix, mix, only, read, two_at, write
from seqlm.ops._triton.tiles import products, run_tiles, tile_of


@triton.jit(do_not_specialize=["t", "T"])
def lem_forward_z(
    drive,
    y0,
    z_at,
    from_y,
    h,
    kept,
    dt,
    t,
    B,
    T,
    S,
    G,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
):
    """z_t.  z_at: (B, D), the last z when it begins, z_t when it ends.  kept: as
    `heads.head_forward` writes it.

    The products read y_{t-1} where it is in their dtype: from h, or from y0.
    """
    g, r, n, inside = tile_of(B, S, ROWS, UNITS)
    D, c, row = G * S, g * S + n, r * T + t
    gate, new = two_at(drive, row * 4 * D + c, 2 * D, inside)
    z = read(z_at, r * D + c, inside)
    y = tl.where(t > 0, h + (row - 1) * D, y0 + r * D) + g * S
    w = from_y + c * S, from_y + (2 * D + c) * S
    gate, new = products((y, y), w, (gate, new), r < B, n < S, S, INNER)
    z = mix(z, new, gate, dt)
    write(kept, row * 5 * D + c, gate, inside)
    write(kept + 2 * D, row * 5 * D + c, new, inside)
    write(kept + 3 * D, row * 5 * D + c, z, inside)
    write(z_at, r * D + c, z, inside)


@triton.jit(do_not_specialize=["t", "T"])
def lem_forward_y(
    drive,
    y0,
    y_at,
    from_y,
    from_z,
    h,
    kept,
    dt,
    t,
    B,
    T,
    S,
    G,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
):
    """y_t, where `lem_forward_z` has been.  y_at: (B, D), the last y when it begins, y_t when it
    ends."""
    g, r, n, inside = tile_of(B, S, ROWS, UNITS)
    D, c, row = G * S, g * S + n, r * T + t
    gate, new = two_at(drive + D, row * 4 * D + c, 2 * D, inside)
    y = read(y_at, r * D + c, inside)
    old = tl.where(t > 0, h + (row - 1) * D, y0 + r * D) + g * S
    z = kept + 3 * D + row * 5 * D + g * S
    w = from_y + (D + c) * S, from_z + c * S
    gate, new = products((old, z), w, (gate, new), r < B, n < S, S, INNER)
    y = mix(y, new, gate, dt)
    write(kept + D, row * 5 * D + c, gate, inside)
    write(kept + 4 * D, row * 5 * D + c, new, inside)
    write(h, row * D + c, y, inside)
    write(y_at, r * D + c, y, inside)


@triton.jit(do_not_specialize=["t", "T"])
def lem_backward_y(
    dh,
    y0,
    h,
    kept,
    to_y,
    d_drive,
    dy_at,
    dt,
    t,
    B,
    T,
    S,
    G,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
):
    """The gradients of what goes into y_t's gate and tanh.  to_y: (3, G, S, S), input and output.

    dy_at: (B, D), the gradient of y_t but for dh_t and for what comes by z_{t+1} when it begins, of
    y_{t-1} by the state alone when it ends.  For t = -1, y0, it is whole when it ends.
    """
    g, r, n, inside = tile_of(B, S, ROWS, UNITS)
    D, c, row = G * S, g * S + n, r * T + t
    dy, there = read(dy_at, r * D + c, inside), only(inside, t >= 0)
    d = read(dh, row * D + c, there)
    gate, new = two_at(kept + D, row * 5 * D + c, 3 * D, there)
    old = read(tl.where(t > 0, h + (row - 1) * D, y0 + r * D), c, there)
    later = d_drive + (row + 1) * 4 * D + g * S
    w, rows = (to_y + c * S, to_y + (2 * D + c) * S), only(r < B, t + 1 < T)
    dy, d = products((later, later + 2 * D), w, (dy, d), rows, n < S, S, INNER)
    dy += d
    before, d_new, d_gate = d_mix(dy, old, new, gate, dt)
    write(d_drive + D, row * 4 * D + c, d_gate, there)
    write(d_drive + 3 * D, row * 4 * D + c, d_new, there)
    write(dy_at, r * D + c, tl.where(t >= 0, before, dy), inside)


@triton.jit(do_not_specialize=["t", "T"])
def lem_backward_z(
    z0,
    kept,
    to_y,
    to_z,
    d_drive,
    dy_at,
    dz_at,
    dt,
    t,
    B,
    T,
    S,
    G,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
):
    """The gradients of what goes into z_t's gate and tanh, where `lem_backward_y` has been.

    dz_at: (B, D), the gradient of z_t but for what comes by y_t when it begins, the same of z_{t-1}
    when it ends.  dy_at: gets what comes by y_t's gate.
    """
    g, r, n, inside = tile_of(B, S, ROWS, UNITS)
    D, c, row = G * S, g * S + n, r * T + t
    dy, dz = read(dy_at, r * D + c, inside), read(dz_at, r * D + c, inside)
    gate, new = two_at(kept, row * 5 * D + c, 2 * D, inside)
    old = tl.where(t > 0, kept + 3 * D + (row - 1) * 5 * D, z0 + r * D)
    old = read(old, c, inside)
    d_gate = d_drive + D + row * 4 * D + g * S
    w = to_y + (D + c) * S, to_z + c * S
    dy, dz = products((d_gate, d_gate + 2 * D), w, (dy, dz), r < B, n < S, S, INNER)
    dz, d_new, d_gate = d_mix(dz, old, new, gate, dt)
    write(d_drive, row * 4 * D + c, d_gate, inside)
    write(d_drive + 2 * D, row * 4 * D + c, d_new, inside)
    write(dy_at, r * D + c, dy, inside)
    write(dz_at, r * D + c, dz, inside)


def dense_lem_forward(drive, y, z, from_y, from_z, h, kept, dt) -> None:
    """As `lem.lem_forward`, for heads of any width."""
    (batch, time), (_, heads, size, _) = drive.shape[:2], from_y.shape
    y0 = y.to(drive.dtype, copy=True)
    from_y, from_z = from_y.to(drive.dtype), from_z.to(drive.dtype)
    shape, whole = (batch, time, size, heads), (batch, heads, size)
    for t in range(time):
        given = drive, y0, z, from_y, h, kept, dt, t
        run_tiles(lem_forward_z, whole, 2, *given, *shape)
        given = drive, y0, y, from_y, from_z, h, kept, dt, t
        run_tiles(lem_forward_y, whole, 2, *given, *shape)


def dense_lem_backward(dh, y0, z0, h, kept, from_y, from_z, d_drive, dy, dz, dt) -> None:
    """As `lem.lem_backward`, for heads of any width."""
    (batch, time), (_, heads, size, _) = dh.shape[:2], from_y.shape
    to_y, to_z = (w.transpose(2, 3).to(dh.dtype).contiguous() for w in (from_y, from_z))
    shape, whole = (batch, time, size, heads), (batch, heads, size)
    for t in range(time - 1, -2, -1):
        given = dh, y0, h, kept, to_y, d_drive, dy, dt, t
        run_tiles(lem_backward_y, whole, 2, *given, *shape)
        if t >= 0:
            given = z0, kept, to_y, to_z, d_drive, dy, dz, dt, t
            run_tiles(lem_backward_z, whole, 2, *given, *shape)
