"""LEM's recurrence with its matrix products in one loop over time, forward and backward.

Keeps (B, T, 5 D) in the drive's dtype: the arguments of z's gate, of y's gate and of z's tanh; z;
the argument of y's tanh.
"""

# B batch, T time, D width

import numpy as np
import torch
from torch import Tensor

from seqlm.ops.cpu.compile import compiled
from seqlm.ops.cpu.gates import mix, mix_gradients
from seqlm.ops.cpu.numbers import F32, add, load, sigmoids, store, tanhs
from seqlm.ops.cpu.products import add_backward, add_forward
from seqlm.ops.cpu.threads import run_batch
from seqlm.ops.states import Tensors
from seqlm.ops.torch.lem_scan import weight_gradients


def forward(
    drive: Tensor, y0: Tensor, z0: Tensor, from_y: Tensor, from_z: Tensor, dt: float
) -> tuple[Tensors, Tensors]:
    batch, time, width = *drive.shape[:2], y0.shape[1]
    h, kept = drive.new_empty(batch, time, width), drive.new_empty(batch, time, 5 * width)
    y, z = (x.clone(memory_format=torch.contiguous_format) for x in (y0, z0))
    in_y, in_z = (in_blocks(w).transpose(1, 2).contiguous() for w in (from_y, from_z))
    run_batch(lem_forward, batch, drive.contiguous(), y, z, in_y, in_z, h, kept, dt)
    return (h, y, z), (y0, z0, from_y, from_z, h, kept)


def backward(saved: Tensors, gradients: Tensors, dt: float) -> Tensors:
    y0, z0, from_y, from_z, h, kept = saved
    dh, dy, dz = gradients
    dy, dz = (d.clone(memory_format=torch.contiguous_format) for d in (dy, dz))
    batch, time, width = h.shape
    d_drive = h.new_empty(batch, time, 4 * width)
    first = (x.to(h.dtype).contiguous() for x in (y0, z0))
    weights = (in_blocks(w).contiguous() for w in (from_y, from_z))
    tensors = dh.contiguous(), *first, h, kept, *weights, d_drive, dy, dz
    run_batch(lem_backward, batch, *tensors, dt)
    return d_drive, dy, dz, *weight_gradients(d_drive, saved)


def in_blocks(weight: Tensor) -> Tensor:
    """(P D, D) -> (P, D, D) in float32: one block at a time fits into the processor's cache."""
    return weight.float().view(-1, weight.shape[1], weight.shape[1])


@compiled()
def lem_forward(drive, ys, zs, in_y, in_z, h, kept, dt, block, first, end):
    """In place: ys and zs, (B, D), hold the first state, then the last.

    Writes h: (B, T, D) and kept: (B, T, 5 D).  in_y: (3, D, D), in_z: (1, D, D), input and output.
    """
    width, time = ys.shape[1], drive.shape[1]
    for job in range(first, end):
        begin, stop = job * block, min((job + 1) * block, drive.shape[0])
        y, z, n = ys[begin:stop], zs[begin:stop], stop - begin
        # the arguments of both gates and of z's tanh; of y's tanh
        p, q = np.empty((n, 3 * width), F32), np.empty((n, width), F32)
        for t in range(time):
            for r in range(n):
                load(p[r], drive[begin + r, t])
                load(q[r], drive[begin + r, t][3 * width :])
            add_forward(p, y, in_y)
            for r in range(n):
                row, keep = p[r], kept[begin + r, t]
                store(keep[: 3 * width], row)
                sigmoids(row[: 2 * width], dt)
                tanhs(row[2 * width :])
                mix(z[r], row[2 * width :], row[:width])
                store(keep[3 * width :][:width], z[r])
            add_forward(q, z, in_z)
            for r in range(n):
                store(kept[begin + r, t][4 * width :], q[r])
                tanhs(q[r])
                mix(y[r], q[r], p[r][width:][:width])
                store(h[begin + r, t], y[r])


@compiled()
def lem_backward(dh, y0, z0, h, kept, by_y, by_z, d_drive, dy0, dz0, dt, block, first, end):
    """Writes d_drive: dL/d(drive), (B, T, 4 D).  dh: dL/dy_t through the output alone.

    In place: dy0 and dz0, (B, D), hold dL/d(last y, last z), then dL/d(y0, z0).  by_y: (3, D, D),
    by_z: (1, D, D), output and input.  y_t depends on z_t, so the gradients of y_t come first.
    """
    width, time = dy0.shape[1], dh.shape[1]
    for job in range(first, end):
        begin, stop = job * block, min((job + 1) * block, dh.shape[0])
        dy, dz, n = dy0[begin:stop], dz0[begin:stop], stop - begin
        # the arguments in which y, and z, occur; then dL/d(these arguments)
        d_y, d_z = np.empty((n, 3 * width), F32), np.empty((n, width), F32)
        for t in range(time - 1, -1, -1):
            for r in range(n):
                b = begin + r
                add(dy[r], dh[b, t])
                load(d_y[r], kept[b, t])
                load(d_z[r], kept[b, t][4 * width :])
                old = h[b, t - 1] if t else y0[b]
                mix_gradients(dy[r], old, d_z[r], d_y[r][width:][:width], dt)
            add_backward(dz, d_z, by_z)
            for r in range(n):
                b, row = begin + r, d_y[r]
                old = kept[b, t - 1][3 * width :][:width] if t else z0[b][:]
                mix_gradients(dz[r], old, row[2 * width :], row[:width], dt)
            add_backward(dy, d_y, by_y)
            for r in range(n):
                store(d_drive[begin + r, t][: 3 * width], d_y[r])
                store(d_drive[begin + r, t][3 * width :], d_z[r])
