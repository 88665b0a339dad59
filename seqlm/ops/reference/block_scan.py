"""h_t = A_t h_{t-1} + b_t with 2 x 2 blocks A_t, step by step."""

from torch import Tensor

from seqlm.ops.reference.fold import fold
from seqlm.ops.states import Tensors


def forward(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensors, Tensors]:
    def step(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
        return b + (a * h.unsqueeze(1)).sum(2)  # a: (B, 2, 2, H), row and column; h: (B, 2, H)

    h = fold(step, (a.to(h0.dtype), b.to(h0.dtype)), h0)
    return (h.to(b.dtype), h[:, -1].clone()), ()
