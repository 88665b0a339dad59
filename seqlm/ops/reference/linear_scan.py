"""h_t = a_t h_{t-1} + b_t, step by step."""

from torch import Tensor

from seqlm.ops.reference.fold import fold
from seqlm.ops.states import Tensors


def forward(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensors, Tensors]:
    h = fold(lambda a, b, h: a * h + b, (a.to(h0.dtype), b.to(h0.dtype)), h0)
    return (h.to(b.dtype), h[:, -1].clone()), ()
