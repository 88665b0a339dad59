"""The recurrence of a diagonal CfC, step by step."""

import torch
from torch import Tensor

from seqlm.ops.reference.cfc_scan import new_state
from seqlm.ops.reference.fold import fold
from seqlm.ops.states import Tensors


def forward(
    drive: Tensor, h0: Tensor, weights: Tensor, gated: bool, tau: float
) -> tuple[Tensors, Tensors]:
    width, exact = h0.shape[1], h0.dtype
    w_1, w_2, w_k = weights.to(exact)

    def step(drive: Tensor, h: Tensor) -> Tensor:
        f_1, f_2, k, *leak = drive.to(exact).split(width, dim=-1)
        new = new_state(f_1 + w_1 * h, f_2 + w_2 * h, tau * (k + w_k * h), gated)
        return torch.lerp(h, new, torch.sigmoid(*leak)) if leak else new

    h = fold(step, (drive,), h0)
    return (h.to(drive.dtype), h[:, -1].clone()), ()
