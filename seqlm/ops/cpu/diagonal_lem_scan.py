"""The recurrence of a diagonal LEM in one forward and one backward pass.

Keeps y and z in the drive's dtype; the backward pass computes everything else again.
"""

# B batch, T time, D width

import numpy as np
import torch
from torch import Tensor

from seqlm.ops.cpu.compile import compiled
from seqlm.ops.cpu.gates import mix, mix_gradients
from seqlm.ops.cpu.numbers import F32, add, add_scaled, load, sigmoids, store, tanhs
from seqlm.ops.cpu.products import four_at
from seqlm.ops.cpu.threads import channels_of, run_channels
from seqlm.ops.states import Tensors


def forward(
    drive: Tensor, y0: Tensor, z0: Tensor, weights: Tensor, dt: float
) -> tuple[Tensors, Tensors]:
    batch, time, width = *drive.shape[:2], y0.shape[1]
    drive, y0, z0, weights = (x.contiguous() for x in (drive, y0, z0, weights))
    h, zs = (drive.new_empty(batch, time, width) for _ in range(2))
    y, z = torch.empty_like(y0), torch.empty_like(z0)
    run_channels(diagonal_lem_forward, y0, drive, y0, z0, weights, h, zs, y, z, dt)
    return (h, y, z), (drive, y0, z0, weights, h, zs)


def backward(saved: Tensors, gradients: Tensors, dt: float) -> Tensors:
    drive, y0, _, weights, h, _ = saved
    dh, dy, dz = gradients
    dy, dz = (d.clone(memory_format=torch.contiguous_format) for d in (dy, dz))
    d_drive, weight_sums = torch.empty_like(drive), weights.new_zeros(len(h), *weights.shape)
    dh = dh.contiguous()
    run_channels(diagonal_lem_backward, y0, *saved, dh, d_drive, dy, dz, weight_sums, dt)
    return d_drive, dy, dz, weight_sums.sum(0)


@compiled()
def diagonal_lem_forward(drive, y0, z0, weights, h, zs, ys, z_last, dt, block, first, end):
    """drive: (B, T, 4 D), weights: (4, D), both in the order gate of z, gate of y, new z, new y.

    Writes h and zs, all y and z: (B, T, D), and ys and z_last, the last ones: (B, D).
    """
    width, time = y0.shape[1], drive.shape[1]
    state, inputs = np.empty((2, block), F32), np.empty((4, block), F32)
    for job in range(first, end):
        b, start, n = channels_of(job, width, block)
        y, z = state[0][:n], state[1][:n]
        load(y, y0[b][start:])
        load(z, z0[b][start:])
        gate_z, gate_y, new_z, new_y = four_at(inputs, 0)
        for t in range(time):
            for i in range(4):
                load(inputs[i][:n], drive[b, t][i * width + start :])
            for i in range(3):
                add_scaled(inputs[i][:n], weights[i][start:], y)
            sigmoids(gate_z[:n], dt)
            sigmoids(gate_y[:n], dt)
            tanhs(new_z[:n])
            mix(z, new_z, gate_z)
            add_scaled(new_y[:n], weights[3][start:], z)
            tanhs(new_y[:n])
            mix(y, new_y, gate_y)
            store(h[b, t][start:][:n], y)
            store(zs[b, t][start:][:n], z)
        store(ys[b][start:][:n], y)
        store(z_last[b][start:][:n], z)


@compiled()
def diagonal_lem_backward(
    drive, y0, z0, weights, h, zs, dh, d_drive, dy0, dz0, weight_sums, dt, block, first, end
):
    """Writes d_drive: dL/d(drive).  dh: dL/dy_t through the output alone.

    In place: dy0 and dz0, (B, D), hold dL/d(last y, last z), then dL/d(y0, z0).  weight_sums:
    (B, 4, D), zeros, to which each row of the batch adds its summands of dL/d(weights).
    """
    width, time = y0.shape[1], drive.shape[1]
    inputs, old, out = np.empty((4, block), F32), np.empty((2, block), F32), np.empty(block, F32)
    for job in range(first, end):
        b, start, n = channels_of(job, width, block)
        dy, dz = dy0[b][start:][:n], dz0[b][start:][:n]
        gate_z, gate_y, new_z, new_y = four_at(inputs, 0)
        old_y, old_z, z = old[0][:n], old[1][:n], out[:n]
        for t in range(time - 1, -1, -1):
            load(z, zs[b, t][start:])
            if t:
                load(old_y, h[b, t - 1][start:])
                load(old_z, zs[b, t - 1][start:])
            else:
                load(old_y, y0[b][start:])
                load(old_z, z0[b][start:])
            for i in range(4):
                load(inputs[i][:n], drive[b, t][i * width + start :])
                add_scaled(inputs[i][:n], weights[i][start:], old_y if i < 3 else z)
            # y_t depends on z_t, so the gradients of y_t come first
            add(dy, dh[b, t][start:])
            mix_gradients(dy, old_y, new_y, gate_y, dt)
            add_scaled(dz, weights[3][start:], new_y)
            mix_gradients(dz, old_z, new_z, gate_z, dt)
            for i in range(4):
                if i < 3:
                    add_scaled(dy, weights[i][start:], inputs[i])
                add_scaled(weight_sums[b, i][start:][:n], inputs[i], old_y if i < 3 else z)
                store(d_drive[b, t][i * width + start :][:n], inputs[i])
