"""LEM's recurrence, step by step."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from seqlm.ops.reference.fold import fold
from seqlm.ops.states import Tensors


def forward(
    drive: Tensor, y0: Tensor, z0: Tensor, from_y: Tensor, from_z: Tensor, dt: float
) -> tuple[Tensors, Tensors]:
    width, exact = y0.shape[1], y0.dtype

    def product(h: Tensor, weight: Tensor) -> Tensor:
        return linear(h.to(drive.dtype), weight.to(drive.dtype)).to(exact)

    def step(drive: Tensor, state: Tensor) -> Tensor:
        y, z = state.unbind(1)
        gate_z, gate_y, new_z, new_y = drive.to(exact).split(width, dim=-1)
        from_y_z, from_y_y, from_y_new = product(y, from_y).split(width, dim=-1)
        z = torch.lerp(z, torch.tanh(new_z + from_y_new), dt * torch.sigmoid(gate_z + from_y_z))
        new_y = torch.tanh(new_y + product(z, from_z))
        y = torch.lerp(y, new_y, dt * torch.sigmoid(gate_y + from_y_y))
        return torch.stack([y, z], dim=1)

    with torch.autocast(drive.device.type, enabled=False):
        states = fold(step, (drive,), torch.stack([y0, z0], dim=1))  # (B, T, 2, D)
    y, z = states[:, -1].unbind(1)
    return (states[:, :, 0].to(drive.dtype), y.clone(), z.clone()), ()
