"""LEM's recurrence as a loop over time, with its gradient written by hand.

Keeps (B, T, 5 D): the gate of z, the gate of y, the new z, z, and the new y: the values of each
sigmoid and tanh.
"""

# B batch, T time, D width

import torch
from torch import Tensor

from seqlm.ops.states import Tensors, before


def forward(
    drive: Tensor, y0: Tensor, z0: Tensor, from_y: Tensor, from_z: Tensor, dt: float
) -> tuple[Tensors, Tensors]:
    batch, time, width = *drive.shape[:2], y0.shape[1]
    h, kept = y0.new_empty(batch, time, width), y0.new_empty(batch, time, 5 * width)
    y, z = (x.clone(memory_format=torch.contiguous_format) for x in (y0, z0))
    in_y, in_z = (w.to(y0.dtype).t() for w in (from_y, from_z))
    drive_y, drive_z = drive.to(y0.dtype).split((3 * width, width), dim=-1)
    gates, new_z, zs, new_y = kept.split((2 * width, width, width, width), dim=-1)
    with torch.autocast(drive.device.type, enabled=False):
        for t in range(time):
            p = torch.addmm(drive_y[:, t], y, in_y)
            torch.sigmoid(p[:, : 2 * width], out=gates[:, t]).mul_(dt)
            torch.tanh(p[:, 2 * width :], out=new_z[:, t])
            zs[:, t] = z.lerp_(new_z[:, t], gates[:, t, :width])
            torch.tanh(torch.addmm(drive_z[:, t], z, in_z), out=new_y[:, t])
            h[:, t] = y.lerp_(new_y[:, t], gates[:, t, width:])
    saved = y0, z0, from_y, from_z, h, kept
    return (h.to(drive.dtype), y, z), saved


def backward(saved: Tensors, gradients: Tensors, dt: float) -> Tensors:
    y0, z0, from_y, from_z, h, kept = saved
    dh, dy, dz = gradients
    dy, dz = (d.clone(memory_format=torch.contiguous_format) for d in (dy, dz))
    by_y, by_z = (w.to(y0.dtype) for w in (from_y, from_z))
    batch, time, width = h.shape
    gate_z, gate_y, new_z, zs, new_y = kept.chunk(5, dim=-1)
    d_drive = dh.new_empty(batch, time, 4 * width)
    d_step = dy.new_empty(batch, 4 * width)
    d_gate_z, d_gate_y, d_new_z, d_new_y = d_step.chunk(4, dim=-1)
    for t in range(time - 1, -1, -1):
        old_y, old_z = (h[:, t - 1], zs[:, t - 1]) if t else (y0, z0)
        g_y, f_y, g_z, f_z = gate_y[:, t], new_y[:, t], gate_z[:, t], new_z[:, t]
        # a gate g = dt sigmoid(k) has the slope g (1 - g / dt), a tanh f the slope 1 - f^2
        dy += dh[:, t]
        torch.mul(dy, g_y * (1 - f_y**2), out=d_new_y)
        torch.mul(dy, (f_y - old_y) * g_y * (1 - g_y / dt), out=d_gate_y)
        dz.addmm_(d_new_y, by_z)
        torch.mul(dz, g_z * (1 - f_z**2), out=d_new_z)
        torch.mul(dz, (f_z - old_z) * g_z * (1 - g_z / dt), out=d_gate_z)
        dy.mul_(1 - g_y).addmm_(d_step[:, : 3 * width], by_y)
        dz.mul_(1 - g_z)
        d_drive[:, t] = d_step
    return d_drive, dy, dz, *weight_gradients(d_drive, saved)


def weight_gradients(d_drive: Tensor, saved: Tensors) -> tuple[Tensor, Tensor]:
    """dL/d(from_y), (3 D, D), and dL/d(from_z), (D, D), each one product over all steps.

    saved: y0, z0, from_y, from_z, h and kept, (B, T, 5 D), whose fourth part is z.
    """
    y0, _, from_y, from_z, h, kept = saved
    width, dtype = y0.shape[1], d_drive.dtype
    d_from_y_input, d_from_z_input = d_drive.flatten(0, 1).split((3 * width, width), dim=-1)
    old_y = before(h, y0.to(h.dtype)).to(dtype).flatten(0, 1)
    z = kept[..., 3 * width : 4 * width].to(dtype).flatten(0, 1)
    d_from_y, d_from_z = d_from_y_input.t() @ old_y, d_from_z_input.t() @ z
    return d_from_y.to(from_y.dtype), d_from_z.to(from_z.dtype)
