"""The gated scan: activations and recurrence in one forward and one backward kernel.

Keeps the drive and h.
"""

from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.ops.triton.scans import scan, scan_gradients


def forward(drive: Tensor, h0: Tensor, candidate: str) -> tuple[Tensors, Tensors]:
    drive, h0 = drive.contiguous(), h0.contiguous()
    h, last = scan(drive, drive, h0, candidate == "positive")
    return (h, last), (drive, h, h0)


def backward(saved: Tensors, gradients: Tensors, candidate: str) -> Tensors:
    drive, h, h0 = saved
    dh, d_last = (d.contiguous() for d in gradients)
    d_drive, _, dh0 = scan_gradients(drive, drive, h0, h, dh, d_last, candidate == "positive")
    return d_drive, dh0
