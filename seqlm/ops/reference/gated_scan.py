"""The gated scan, step by step."""

from torch import Tensor

from seqlm.ops.reference import gated_step
from seqlm.ops.reference.fold import fold
from seqlm.ops.states import Tensors


def forward(drive: Tensor, h0: Tensor, candidate: str) -> tuple[Tensors, Tensors]:
    def step(drive: Tensor, h: Tensor) -> Tensor:
        return gated_step.forward(drive, h, candidate)[0][0]

    h = fold(step, (drive,), h0)
    return (h.to(drive.dtype), h[:, -1].clone()), ()
