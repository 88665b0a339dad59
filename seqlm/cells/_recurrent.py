"""What a state adds to the drive of the next step, by dense or diagonal matrices."""

# D units, P parts

import torch
from torch import Tensor, nn

from seqlm.errors import UsageError
from seqlm.ops import Linear


def check(recurrence: str, bound: float, solver: str) -> None:
    """Raises UsageError for options of a recurrence that are out of range or do not go together."""
    if not bound > 0:
        raise UsageError(f"cell.bound is {bound}; it must be above 0.")
    if recurrence == "dense" and solver != "auto":
        raise UsageError(
            f"cell.solver is {solver}, but a dense recurrence is always solved step by step. Leave "
            "it out, or set cell.recurrence to diagonal."
        )


def recurrent(recurrence: str, bound: float, width: int, parts: int) -> "Linear | Diagonal":
    """A module h: (..., D) -> (..., P D), by dense or diagonal weights as `recurrence` says."""
    if recurrence == "diagonal":
        return Diagonal(width, parts, bound)
    return Linear(width, parts * width, bias=False)


class Diagonal(nn.Module):
    """One weight a unit, by which it sees itself; below `bound`, so that Newton converges."""

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
