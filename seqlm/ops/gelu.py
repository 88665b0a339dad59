"""GELU."""

from torch import Tensor

from seqlm.ops.dispatch import Op

_op = Op("gelu")


def gelu(x: Tensor) -> Tensor:
    """x P(X < x) for a normal X, with an error of at most 2e-6; the shape and dtype of x.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415, 2016.
    """
    (y,) = _op(x)
    return y
