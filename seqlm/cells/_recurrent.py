"""Dense and diagonal recurrent matrices: the product of a matrix with the state."""

# D units, P parts

import torch
from torch import Tensor, nn

from seqlm.errors import UsageError
from seqlm.ops import Linear


def check(recurrence: str, bound: float, usual: float, solver: str) -> None:
    """Raises UsageError for options of a recurrence that are out of range or contradict.

    usual: the default of `bound`.
    """
    if not bound > 0:
        raise UsageError(f"cell.bound is {bound}; it must be above 0.")
    if recurrence == "dense" and bound != usual:
        raise UsageError(
            f"cell.bound is {bound}, but a dense recurrence has no bound. Remove it, or set "
            "cell.recurrence to diagonal."
        )
    if recurrence == "dense" and solver != "auto":
        raise UsageError(
            f"cell.solver is {solver}, but a dense recurrence is always solved step by step. "
            "Remove it, or set cell.recurrence to diagonal."
        )


class Diagonal(nn.Module):
    """P diagonal matrices, |weight| < bound; a bound is what makes Newton's method converge."""

    def __init__(self, width: int, parts: int, bound: float):
        super().__init__()
        self.parts, self.bound = parts, bound
        self.raw = nn.Parameter(torch.empty(parts * width))
        nn.init.uniform_(self.raw, -0.5, 0.5)

    @property
    def weight(self) -> Tensor:
        """(P, D)"""
        return self.bound * torch.tanh(self.raw).view(self.parts, -1)

    def forward(self, h: Tensor) -> Tensor:
        return (self.weight.to(h.dtype) * h.unsqueeze(-2)).flatten(-2)


def recurrent(recurrence: str, bound: float, width: int, parts: int) -> Linear | Diagonal:
    """A module h: (..., D) -> (..., P D); recurrence: "dense" or "diagonal"."""
    if recurrence == "diagonal":
        return Diagonal(width, parts, bound)
    return Linear(width, parts * width, bias=False, parts=parts)
