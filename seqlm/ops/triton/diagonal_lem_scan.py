"""The recurrence of a diagonal LEM: one kernel each way.

Keeps y and z in the drive's dtype: all else is computed again on the way back.
"""

# B batch, T time, H state width

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.ops.triton.lanes import lanes, run_lanes
from seqlm.ops.triton.numbers import mix, mix_gradients, only, parts_at, read, write, write_parts


def forward(
    drive: Tensor, y0: Tensor, z0: Tensor, weights: Tensor, dt: float
) -> tuple[Tensors, Tensors]:
    batch, time, width = *drive.shape[:2], y0.shape[1]
    drive, y0, z0, weights = (x.contiguous() for x in (drive, y0, z0, weights))
    h, zs = (drive.new_empty(batch, time, width) for _ in range(2))
    y, z = torch.empty_like(y0), torch.empty_like(z0)
    run_lanes(diagonal_lem_forward, y0, time, drive, y0, z0, weights, h, zs, y, z, dt)
    return (h, y, z), (drive, y0, z0, weights, h, zs)


def backward(saved: Tensors, gradients: Tensors, dt: float) -> Tensors:
    drive, y0, _, weights, h, _ = saved
    dh, dy, dz = gradients
    dy, dz = (d.clone(memory_format=torch.contiguous_format) for d in (dy, dz))
    d_drive, parts = torch.empty_like(drive), weights.new_empty(len(h), *weights.shape)
    arguments = *saved, dh.contiguous(), d_drive, dy, dz, parts, dt
    run_lanes(diagonal_lem_backward, y0, drive.shape[1], *arguments)
    return d_drive, dy, dz, parts.sum(0)


@triton.jit(do_not_specialize=["T"])
def diagonal_lem_forward(
    drive,
    y0,
    z0,
    weights,
    h,
    zs,
    y_last,
    z_last,
    dt,
    T,
    H,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """drive: (B, T, 4 H), weights: (4, H), both in the order gate of z, gate of y, new z, new y."""
    b, c, inside = lanes(H, BLOCK)
    y, z = read(y0 + b * H, c, inside), read(z0 + b * H, c, inside)
    w_gate_z, w_gate_y, w_z, w_y = parts_at(weights, c, H, inside, 4)
    for start in range(0, T, UNROLL):
        drives = ()
        for i in tl.static_range(UNROLL):
            row = b * T + start + i
            drives += (parts_at(drive + row * 4 * H, c, H, only(inside, start + i < T), 4),)
        for i in tl.static_range(UNROLL):
            there = start + i < T
            row = b * T + start + i
            gate_z, gate_y, new_z, new_y = drives[i]
            gate_y += w_gate_y * y
            z = tl.where(there, mix(z, new_z + w_z * y, gate_z + w_gate_z * y, dt), z)
            y = tl.where(there, mix(y, new_y + w_y * z, gate_y, dt), y)
            write(h + row * H, c, y, only(inside, there))
            write(zs + row * H, c, z, only(inside, there))
    write(y_last + b * H, c, y, inside)
    write(z_last + b * H, c, z, inside)


@triton.jit(do_not_specialize=["T"])
def diagonal_lem_backward(
    drive,
    y0,
    z0,
    weights,
    h,
    zs,
    dh,
    d_drive,
    dy_at,
    dz_at,
    parts,
    dt,
    T,
    H,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """In place: dy_at and dz_at, (B, H), hold the gradient of the last state, then of the first.

    parts: (B, 4, H), a row's part of the weights' gradient.
    """
    b, c, inside = lanes(H, BLOCK)
    dy, dz = read(dy_at + b * H, c, inside), read(dz_at + b * H, c, inside)
    first_y, first_z = read(y0 + b * H, c, inside), read(z0 + b * H, c, inside)
    w_gate_z, w_gate_y, w_z, w_y = parts_at(weights, c, H, inside, 4)
    sum_gate_z, sum_gate_y = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    sum_z, sum_y = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    z = read(zs + (b * T + T - 1) * H, c, inside)
    for start in range(0, T, UNROLL):
        drives, olds, d_outs = (), (), ()
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            row = b * T + t
            drives += (parts_at(drive + row * 4 * H, c, H, only(inside, t >= 0), 4),)
            before = (row - 1) * H
            old = (
                read(h + before, c, only(inside, t > 0)),
                read(zs + before, c, only(inside, t > 0)),
            )
            olds += (old,)
            d_outs += (read(dh + row * H, c, only(inside, t >= 0)),)
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            gate_z, gate_y, new_z, new_y = drives[i]
            old_y, old_z = olds[i]
            old_y, old_z = tl.where(t > 0, old_y, first_y), tl.where(t > 0, old_z, first_z)
            # before the first step d is 0, so that the sums stay as they are
            d = tl.where(t >= 0, dy + d_outs[i], 0.0)
            dy_old, d_y, d_gate_y = mix_gradients(
                d, old_y, new_y + w_y * z, gate_y + w_gate_y * old_y, dt
            )
            d = tl.where(t >= 0, dz + w_y * d_y, 0.0)
            gate_z += w_gate_z * old_y
            dz_old, d_z, d_gate_z = mix_gradients(d, old_z, new_z + w_z * old_y, gate_z, dt)
            dy_old += w_gate_z * d_gate_z + w_gate_y * d_gate_y + w_z * d_z
            dy, dz = tl.where(t >= 0, dy_old, dy), tl.where(t >= 0, dz_old, dz)
            sum_gate_z, sum_gate_y = sum_gate_z + d_gate_z * old_y, sum_gate_y + d_gate_y * old_y
            sum_z, sum_y, z = sum_z + d_z * old_y, sum_y + d_y * z, old_z
            to = d_drive + (b * T + t) * 4 * H
            write_parts(to, c, H, d_gate_z, d_gate_y, d_z, d_y, only(inside, t >= 0), 4)
    write(dy_at + b * H, c, dy, inside)
    write(dz_at + b * H, c, dz, inside)
    write_parts(parts + b * 4 * H, c, H, sum_gate_z, sum_gate_y, sum_z, sum_y, inside, 4)
