"""One step of the gated scan."""

import torch
from torch import Tensor

from seqlm.ops.gated_scan import candidate_value, gate_and_candidate
from seqlm.ops.states import Tensors, state_dtype


def forward(drive: Tensor, h: Tensor, candidate: str) -> tuple[Tensors, Tensors]:
    exact = state_dtype(drive, h)
    h = h.to(exact)
    k, u = gate_and_candidate(drive.to(exact), h.shape[-1])
    new = torch.sigmoid(-k) * h + torch.sigmoid(k) * candidate_value(u, candidate)
    return (new,), ()
