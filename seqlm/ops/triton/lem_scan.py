"""LEM's recurrence: two kernels a step, of z and of y.

Keeps (B, T, 5 D) in the drive's dtype: what goes into the gate of z, into the gate of y and into
the tanh of z; z; what goes into the tanh of y.
"""

# B batch, T time, D width

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.ops.torch.lem_scan import weight_gradients
from seqlm.ops.triton.numbers import mix, mix_gradients, only, read, two_at, write
from seqlm.ops.triton.tiles import products, run_tiles, tile_of


def forward(
    drive: Tensor, y0: Tensor, z0: Tensor, from_y: Tensor, from_z: Tensor, dt: float
) -> tuple[Tensors, Tensors]:
    drive = drive.contiguous()
    batch, time, width = *drive.shape[:2], y0.shape[1]
    h, kept = drive.new_empty(batch, time, width), drive.new_empty(batch, time, 5 * width)
    y, z = (x.clone(memory_format=torch.contiguous_format) for x in (y0, z0))
    # the products' operands in the drive's dtype; the states y and z stay float32
    first, to_y, to_z = (x.to(drive.dtype).contiguous() for x in (y0, from_y, from_z))
    shape = batch, time, width
    for t in range(time):
        arguments = drive, first, z, to_y, h, kept, dt, t
        run_tiles(lem_forward_z, (batch, width), 2, *arguments, *shape)
        arguments = drive, first, y, to_y, to_z, h, kept, dt, t
        run_tiles(lem_forward_y, (batch, width), 2, *arguments, *shape)
    return (h, y, z), (y0, z0, from_y, from_z, h, kept)


def backward(saved: Tensors, gradients: Tensors, dt: float) -> Tensors:
    y0, z0, from_y, from_z, h, kept = saved
    dh, dy, dz = gradients
    dy, dz = (d.clone(memory_format=torch.contiguous_format) for d in (dy, dz))
    (batch, time, width), dh = h.shape, dh.contiguous()
    d_drive = h.new_empty(batch, time, 4 * width)
    first_y, first_z = (x.to(h.dtype).contiguous() for x in (y0, z0))
    # (P D, D), output and input -> (P, D, D), input and output: the products go the other way
    to_y, to_z = (
        w.view(-1, width, width).transpose(1, 2).to(h.dtype).contiguous() for w in (from_y, from_z)
    )
    shape = batch, time, width
    for t in range(time - 1, -2, -1):
        arguments = dh, first_y, h, kept, to_y, d_drive, dy, dt, t
        run_tiles(lem_backward_y, (batch, width), 2, *arguments, *shape)
        if t >= 0:
            arguments = first_z, kept, to_y, to_z, d_drive, dy, dz, dt, t
            run_tiles(lem_backward_z, (batch, width), 2, *arguments, *shape)
    return d_drive, dy, dz, *weight_gradients(d_drive, saved)


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
    D,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
):
    """z_t.  In place: z_at, (B, D), holds z_{t-1}, then z_t.

    The products read y_{t-1} where it stands in their dtype: in h, or in y0.
    """
    r, c, inside = tile_of(B, D, ROWS, UNITS)
    row = r * T + t
    gate, new = two_at(drive, row * 4 * D + c, 2 * D, inside)
    z = read(z_at, r * D + c, inside)
    y = tl.where(t > 0, h + (row - 1) * D, y0 + r * D)
    w = from_y + c * D, from_y + (2 * D + c) * D
    gate, new = products((y, y), w, (gate, new), r < B, c < D, D, INNER)
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
    D,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
):
    """y_t, after `lem_forward_z`.  In place: y_at, (B, D), holds y_{t-1}, then y_t."""
    r, c, inside = tile_of(B, D, ROWS, UNITS)
    row = r * T + t
    gate, new = two_at(drive + D, row * 4 * D + c, 2 * D, inside)
    y = read(y_at, r * D + c, inside)
    old = tl.where(t > 0, h + (row - 1) * D, y0 + r * D)
    z = kept + 3 * D + row * 5 * D
    w = from_y + (D + c) * D, from_z + c * D
    gate, new = products((old, z), w, (gate, new), r < B, c < D, D, INNER)
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
    D,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
):
    """The gradients of what goes into y_t's gate and tanh.  to_y: (3, D, D), input and output.

    In: dy_at, (B, D), a partial dL/dy_t, without dh_t and the path through z_{t+1}.  Out: a partial
    dL/dy_{t-1}, by the state alone.  t = -1 only completes dL/dy_0, the first state's gradient.
    """
    r, c, inside = tile_of(B, D, ROWS, UNITS)
    row = r * T + t
    dy, there = read(dy_at, r * D + c, inside), only(inside, t >= 0)
    d = read(dh, row * D + c, there)
    gate, new = two_at(kept + D, row * 5 * D + c, 3 * D, there)
    old = read(tl.where(t > 0, h + (row - 1) * D, y0 + r * D), c, there)
    later = d_drive + (row + 1) * 4 * D
    w, rows = (to_y + c * D, to_y + (2 * D + c) * D), only(r < B, t + 1 < T)
    dy, d = products((later, later + 2 * D), w, (dy, d), rows, c < D, D, INNER)
    dy += d
    before, d_new, d_gate = mix_gradients(dy, old, new, gate, dt)
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
    D,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
):
    """The gradients of what goes into z_t's gate and tanh, after `lem_backward_y`.

    In: dz_at, (B, D), a partial dL/dz_t, without the path through y_t.  Out: the same for z_{t-1};
    dy_at has gained the path through y_t's gate.
    """
    r, c, inside = tile_of(B, D, ROWS, UNITS)
    row = r * T + t
    dy, dz = read(dy_at, r * D + c, inside), read(dz_at, r * D + c, inside)
    gate, new = two_at(kept, row * 5 * D + c, 2 * D, inside)
    old = tl.where(t > 0, kept + 3 * D + (row - 1) * 5 * D, z0 + r * D)
    old = read(old, c, inside)
    d_gate = d_drive + D + row * 4 * D
    w = to_y + (D + c) * D, to_z + c * D
    dy, dz = products((d_gate, d_gate + 2 * D), w, (dy, dz), r < B, c < D, D, INNER)
    dz, d_new, d_gate = mix_gradients(dz, old, new, gate, dt)
    write(d_drive, row * 4 * D + c, d_gate, inside)
    write(d_drive + 2 * D, row * 4 * D + c, d_new, inside)
    write(dy_at, r * D + c, dy, inside)
    write(dz_at, r * D + c, dz, inside)
