"""What a state adds to the drive of the next step: by matrices whole, in heads, or diagonal."""

# D units, P parts, G heads, S = D / G units of a head

import torch
from torch import Tensor, nn

from seqlm.errors import UsageError
from seqlm.ops import Linear


def check(recurrence: str, bound: float, solver: str) -> None:
    """Raises UsageError for what a recurrence cannot be, or cannot be solved by."""
    if not bound > 0:
        raise UsageError(f"cell.bound is {bound}; it must be above 0.")
    if recurrence == "dense" and solver != "auto":
        raise UsageError(
            f"cell.solver is {solver}, but a dense recurrence is always solved step by step. Leave "
            "it out, or set cell.recurrence to diagonal."
        )


def recurrent(recurrence: str, heads: int, bound: float, width: int, parts: int) -> nn.Module:
    """h: (..., D) -> (..., P D), by the weights that `recurrence` and `heads` say."""
    if not (1 <= heads <= width and width % heads == 0):
        raise UsageError(f"cell.heads is {heads}; it must divide the width, {width}.")
    if recurrence == "diagonal":
        if heads > 1:
            raise UsageError(
                f"cell.heads is {heads}, but a diagonal recurrence has none. Leave it out, or set "
                "cell.recurrence to dense."
            )
        return Diagonal(width, parts, bound)
    return Linear(width, parts * width, bias=False) if heads == 1 else Heads(width, parts, heads)


def blocks(weights: nn.Module) -> Tensor:
    """(P, G, S, S), output and input, of matrices that are dense (G = 1) or in heads."""
    weight = weights.weight
    return weight.view(-1, 1, weight.shape[1], weight.shape[1]) if weight.ndim == 2 else weight


class Heads(nn.Module):
    """Block-diagonal matrices: a unit sees the units of its head."""

    def __init__(self, width: int, parts: int, heads: int):
        super().__init__()
        size = width // heads
        self.weight = nn.Parameter(torch.empty(parts, heads, size, size))  # output, input
        nn.init.uniform_(self.weight, -(size**-0.5), size**-0.5)

    def forward(self, h: Tensor) -> Tensor:
        of_heads = h.unflatten(-1, self.weight.shape[1:3])
        return torch.einsum("pgij,...gj->...pgi", self.weight.to(h.dtype), of_heads).flatten(-3)


class Diagonal(nn.Module):
    """A weight a unit: it sees itself.  |weight| < bound, so that Newton's method converges."""

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
