"""LEM's recurrence: two kernels a step, of z and of y.

Keeps (B, T, 5 D) in the drive's dtype: the arguments of z's gate, of y's gate and of z's tanh; z;
the argument of y's tanh.
"""

# B batch, T time, D width

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.ops.torch.lem_scan import weight_gradients
from seqlm.ops.triton.numbers import mask_if, mix, mix_gradients, read, read_rows, write
from seqlm.ops.triton.tiles import products, run_tiles, tile_of


def forward(
    drive: Tensor, y0: Tensor, z0: Tensor, from_y: Tensor, from_z: Tensor, dt: float
) -> tuple[Tensors, Tensors]:
    drive = drive.contiguous()
    shape = batch, time, width = *drive.shape[:2], y0.shape[1]
    h, kept = drive.new_empty(batch, time, width), drive.new_empty(batch, time, 5 * width)
    y, z = (x.clone(memory_format=torch.contiguous_format) for x in (y0, z0))
    # products read operands in the drive's dtype; the states y and z stay float32
    first, to_y, to_z = (x.to(drive.dtype).contiguous() for x in (y0, from_y, from_z))
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
    shape = batch, time, width = h.shape
    dh, d_drive = dh.contiguous(), h.new_empty(batch, time, 4 * width)
    first_y, first_z = (x.to(h.dtype).contiguous() for x in (y0, z0))
    # (P D, D), output and input -> (P, D, D), input and output: these products are transposed
    to_y, to_z = (
        w.view(-1, width, width).transpose(1, 2).to(h.dtype).contiguous() for w in (from_y, from_z)
    )
    for t in range(time - 1, -2, -1):
        arguments = dh, first_y, h, kept, to_y, d_drive, dy, dt, t
        run_tiles(lem_backward_y, (batch, width), 2, *arguments, *shape)
        if t >= 0:
            arguments = first_z, kept, to_y, to_z, d_drive, dy, dz, dt, t
            run_tiles(lem_backward_z, (batch, width), 2, *arguments, *shape)
    return d_drive, dy, dz, *weight_gradients(d_drive, saved)


@triton.jit(do_not_specialize=["t", "T"])
def lem_forward_z(
    drive, y0, z_state, from_y, h, kept, dt, t, B, T, D,
    ROWS: tl.constexpr, UNITS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """z_t.  In place: z_state, (B, D), holds z_{t-1}, then z_t.

    The products read y_{t-1} from h, or from y0 at t = 0, because both are in the products' dtype.
    """
    row, unit, inside = tile_of(B, D, ROWS, UNITS)
    at = row * T + t
    gate, new = read_rows(drive, at * 4 * D + unit, 2 * D, inside, 2)
    z = read(z_state, row * D + unit, inside)
    y = tl.where(t > 0, h + (at - 1) * D, y0 + row * D)
    w = from_y + unit * D, from_y + (2 * D + unit) * D
    gate, new = products((y, y), w, (gate, new), row < B, unit < D, D, INNER)
    z = mix(z, new, gate, dt)
    write(kept, at * 5 * D + unit, gate, inside)
    write(kept + 2 * D, at * 5 * D + unit, new, inside)
    write(kept + 3 * D, at * 5 * D + unit, z, inside)
    write(z_state, row * D + unit, z, inside)


@triton.jit(do_not_specialize=["t", "T"])
def lem_forward_y(
    drive, y0, y_state, from_y, from_z, h, kept, dt, t, B, T, D,
    ROWS: tl.constexpr, UNITS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """y_t, after `lem_forward_z`.  In place: y_state, (B, D), holds y_{t-1}, then y_t."""
    row, unit, inside = tile_of(B, D, ROWS, UNITS)
    at = row * T + t
    gate, new = read_rows(drive + D, at * 4 * D + unit, 2 * D, inside, 2)
    y = read(y_state, row * D + unit, inside)
    old = tl.where(t > 0, h + (at - 1) * D, y0 + row * D)
    z = kept + 3 * D + at * 5 * D
    w = from_y + (D + unit) * D, from_z + unit * D
    gate, new = products((old, z), w, (gate, new), row < B, unit < D, D, INNER)
    y = mix(y, new, gate, dt)
    write(kept + D, at * 5 * D + unit, gate, inside)
    write(kept + 4 * D, at * 5 * D + unit, new, inside)
    write(h, at * D + unit, y, inside)
    write(y_state, row * D + unit, y, inside)


@triton.jit(do_not_specialize=["t", "T"])
def lem_backward_y(
    dh, y0, h, kept, to_y, d_drive, dy_state, dt, t, B, T, D,
    ROWS: tl.constexpr, UNITS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Completes dL/dy_t.  Out: d_drive, dL/d(arguments of y_t's gate and tanh).

    In place: dy_state, (B, D), holds the part of dL/dy_t that comes through y_{t+1} and its gate,
    then the part of dL/dy_{t-1} that comes through the state y_t alone.  The part through z_{t+1}
    is a product with to_y, (3, D, D), input and output.  t = -1 only completes dL/dy0.
    """
    row, unit, inside = tile_of(B, D, ROWS, UNITS)
    at = row * T + t
    dy, valid = read(dy_state, row * D + unit, inside), mask_if(inside, t >= 0)
    dy_out = read(dh, at * D + unit, valid)
    gate, new = read_rows(kept + D, at * 5 * D + unit, 3 * D, valid, 2)
    old = read(tl.where(t > 0, h + (at - 1) * D, y0 + row * D), unit, valid)
    later = d_drive + (at + 1) * 4 * D
    w, rows = (to_y + unit * D, to_y + (2 * D + unit) * D), mask_if(row < B, t + 1 < T)
    # two products are computed together, so dL/dy_t is summed in two parts
    dy, dy_out = products((later, later + 2 * D), w, (dy, dy_out), rows, unit < D, D, INNER)
    dy += dy_out
    d_old, d_new, d_gate = mix_gradients(dy, old, new, gate, dt)
    write(d_drive + D, at * 4 * D + unit, d_gate, valid)
    write(d_drive + 3 * D, at * 4 * D + unit, d_new, valid)
    write(dy_state, row * D + unit, tl.where(t >= 0, d_old, dy), inside)


@triton.jit(do_not_specialize=["t", "T"])
def lem_backward_z(
    z0, kept, to_y, to_z, d_drive, dy_state, dz_state, dt, t, B, T, D,
    ROWS: tl.constexpr, UNITS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Completes dL/dz_t, after `lem_backward_y`.  d_drive: dL/d(arguments of z_t's gate and tanh).

    In place: dz_state, (B, D), holds the part of dL/dz_t that comes through z_{t+1}, then the part
    of dL/dz_{t-1} that comes through z_t.  Adds the part through y_t's gate to dy_state.
    """
    row, unit, inside = tile_of(B, D, ROWS, UNITS)
    at = row * T + t
    dy, dz = read(dy_state, row * D + unit, inside), read(dz_state, row * D + unit, inside)
    gate, new = read_rows(kept, at * 5 * D + unit, 2 * D, inside, 2)
    old = tl.where(t > 0, kept + 3 * D + (at - 1) * 5 * D, z0 + row * D)
    old = read(old, unit, inside)
    d_of_y = d_drive + D + at * 4 * D  # of its gate; of its tanh 2 D further
    w = to_y + (D + unit) * D, to_z + unit * D
    dy, dz = products((d_of_y, d_of_y + 2 * D), w, (dy, dz), row < B, unit < D, D, INNER)
    dz, d_new, d_gate = mix_gradients(dz, old, new, gate, dt)
    write(d_drive, at * 4 * D + unit, d_gate, inside)
    write(d_drive + 2 * D, at * 4 * D + unit, d_new, inside)
    write(dy_state, row * D + unit, dy, inside)
    write(dz_state, row * D + unit, dz, inside)
