"""The recurrence of a diagonal LEM: one forward and one backward kernel.

Keeps y and z in the drive's dtype; the backward pass computes everything else again.
"""

# B batch, T time, H state width

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.ops.triton.lanes import lanes, run_lanes
from seqlm.ops.triton.numbers import mask_if, mix, mix_gradients, read, read_rows, write, write_rows


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
    d_drive, weight_sums = torch.empty_like(drive), weights.new_empty(len(h), *weights.shape)
    arguments = *saved, dh.contiguous(), d_drive, dy, dz, weight_sums, dt
    run_lanes(diagonal_lem_backward, y0, drive.shape[1], *arguments)
    return d_drive, dy, dz, weight_sums.sum(0)


@triton.jit(do_not_specialize=["T"])
def diagonal_lem_forward(
    drive, y0, z0, weights, h, zs, y_last, z_last, dt, T, H,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """drive: (B, T, 4 H), weights: (4, H), both in the order gate of z, gate of y, new z, new y."""
    b, channels, inside = lanes(H, BLOCK)
    y, z = read(y0 + b * H, channels, inside), read(z0 + b * H, channels, inside)
    w_gate_z, w_gate_y, w_z, w_y = read_rows(weights, channels, H, inside, 4)
    for start in range(0, T, UNROLL):
        drives = ()
        for i in tl.static_range(UNROLL):
            row, mask = b * T + start + i, mask_if(inside, start + i < T)
            drives += (read_rows(drive + row * 4 * H, channels, H, mask, 4),)
        for i in tl.static_range(UNROLL):
            row, in_time = b * T + start + i, start + i < T
            gate_z, gate_y, new_z, new_y = drives[i]
            gate_y += w_gate_y * y
            z = tl.where(in_time, mix(z, new_z + w_z * y, gate_z + w_gate_z * y, dt), z)
            y = tl.where(in_time, mix(y, new_y + w_y * z, gate_y, dt), y)
            write(h + row * H, channels, y, mask_if(inside, in_time))
            write(zs + row * H, channels, z, mask_if(inside, in_time))
    write(y_last + b * H, channels, y, inside)
    write(z_last + b * H, channels, z, inside)


@triton.jit(do_not_specialize=["T"])
def diagonal_lem_backward(
    drive, y0, z0, weights, h, zs, dh, d_drive, dy_state, dz_state, weight_sums, dt, T, H,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """In: dh, dL/dy_t through the output alone.  Out: d_drive, dL/d(drive).

    In place: dy_state and dz_state, (B, H), hold dL/d(last y, last z), then dL/d(y0, z0).
    dy, dz: what step t + 1 adds to dL/d(y_t, z_t).  weight_sums: (B, 4, H), one row's summands of
    dL/d(weights).
    """
    b, channels, inside = lanes(H, BLOCK)
    dy, dz = read(dy_state + b * H, channels, inside), read(dz_state + b * H, channels, inside)
    first_y, first_z = read(y0 + b * H, channels, inside), read(z0 + b * H, channels, inside)
    w_gate_z, w_gate_y, w_z, w_y = read_rows(weights, channels, H, inside, 4)
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    sum_gate_z, sum_gate_y, sum_z, sum_y = zero, zero, zero, zero
    z = read(zs + (b * T + T - 1) * H, channels, inside)
    for start in range(0, T, UNROLL):
        drives, olds, d_outs = (), (), ()
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            row, mask, old_mask = b * T + t, mask_if(inside, t >= 0), mask_if(inside, t > 0)
            previous = (row - 1) * H
            drives += (read_rows(drive + row * 4 * H, channels, H, mask, 4),)
            old_y = read(h + previous, channels, old_mask)
            olds += ((old_y, read(zs + previous, channels, old_mask)),)
            d_outs += (read(dh + row * H, channels, mask),)
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            gate_z, gate_y, new_z, new_y = drives[i]
            old_y, old_z = olds[i]
            old_y, old_z = tl.where(t > 0, old_y, first_y), tl.where(t > 0, old_z, first_z)
            gate_z, gate_y = gate_z + w_gate_z * old_y, gate_y + w_gate_y * old_y
            # y_t depends on z_t, so its gradients come first.  Where t < 0, dy_t and dz_t are
            # 0, so that the sums do not change.
            dy_t = tl.where(t >= 0, dy + d_outs[i], 0.0)
            dy_old, d_y, d_gate_y = mix_gradients(dy_t, old_y, new_y + w_y * z, gate_y, dt)
            dz_t = tl.where(t >= 0, dz + w_y * d_y, 0.0)
            dz_old, d_z, d_gate_z = mix_gradients(dz_t, old_z, new_z + w_z * old_y, gate_z, dt)
            dy_old += w_gate_z * d_gate_z + w_gate_y * d_gate_y + w_z * d_z
            dy, dz = tl.where(t >= 0, dy_old, dy), tl.where(t >= 0, dz_old, dz)
            sum_gate_z, sum_gate_y = sum_gate_z + d_gate_z * old_y, sum_gate_y + d_gate_y * old_y
            sum_z, sum_y, z = sum_z + d_z * old_y, sum_y + d_y * z, old_z
            to = d_drive + (b * T + t) * 4 * H
            write_rows(to, channels, H, (d_gate_z, d_gate_y, d_z, d_y), mask_if(inside, t >= 0))
    write(dy_state + b * H, channels, dy, inside)
    write(dz_state + b * H, channels, dz, inside)
    sums = sum_gate_z, sum_gate_y, sum_z, sum_y
    write_rows(weight_sums + b * 4 * H, channels, H, sums, inside)
