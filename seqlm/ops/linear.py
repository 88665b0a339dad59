"""Linear layers."""

# I inputs, O outputs

from torch import Tensor, nn

from seqlm.ops.dispatch import Op

_op = Op("linear")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias; x: (..., I), weight: (O, I), bias: (O,) -> (..., O).

    The result is in autocast's dtype where autocast is on.  Where x has few rows, a row's result
    does not depend on the others.  For shapes that disagree PyTorch raises its error.
    """
    (y,) = _op(x, weight, bias)
    return y


class Linear(nn.Linear):
    """nn.Linear, computed by `linear`.

    parts: how many matrices of equal size its weight has, one above the other.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, *, parts: int = 1):
        super().__init__(inputs, outputs, bias)
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
