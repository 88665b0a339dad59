"""One step of the gated scan: a scan of one step, which is one kernel."""

import torch
from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.ops.triton import gated_scan


def serves(drive: Tensor, h: Tensor, candidate: str) -> bool:
    rows, width = h.shape
    return h.dtype == torch.float32 and drive.shape in ((rows, 2 * width), (rows, 3 * width))


def forward(drive: Tensor, h: Tensor, candidate: str) -> tuple[Tensors, Tensors]:
    (_, new), saved = gated_scan.forward(drive.unsqueeze(1), h, candidate)
    return (new,), saved


def backward(saved: Tensors, gradients: Tensors, candidate: str) -> Tensors:
    no_gradient = torch.zeros_like(saved[1])  # a step does not return h in the drive's dtype
    d_drive, dh = gated_scan.backward(saved, (no_gradient, *gradients), candidate)
    return d_drive.squeeze(1), dh
