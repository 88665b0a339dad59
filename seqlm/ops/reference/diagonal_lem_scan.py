"""The recurrence of a diagonal LEM, step by step."""

import torch
from torch import Tensor

from seqlm.ops.reference.fold import fold
from seqlm.ops.states import Tensors


def forward(
    drive: Tensor, y0: Tensor, z0: Tensor, weights: Tensor, dt: float
) -> tuple[Tensors, Tensors]:
    width, exact = y0.shape[1], y0.dtype
    w_gate_z, w_gate_y, w_new_z, w_new_y = weights.to(exact)

    def step(drive: Tensor, state: Tensor) -> Tensor:
        y, z = state.unbind(1)
        gate_z, gate_y, new_z, new_y = drive.to(exact).split(width, dim=-1)
        gate_z, gate_y = gate_z + w_gate_z * y, gate_y + w_gate_y * y
        z = torch.lerp(z, torch.tanh(new_z + w_new_z * y), dt * torch.sigmoid(gate_z))
        y = torch.lerp(y, torch.tanh(new_y + w_new_y * z), dt * torch.sigmoid(gate_y))
        return torch.stack([y, z], dim=1)

    states = fold(step, (drive,), torch.stack([y0, z0], dim=1))  # (B, T, 2, D)
    y, z = states[:, -1].unbind(1)
    return (states[:, :, 0].to(drive.dtype), y.clone(), z.clone()), ()
