"""RMSNorm in one pass each way."""

# D width

from torch import Tensor

from seqlm.ops.dispatch import Op

_op = Op("rms_norm")


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """weight x / sqrt(mean(x^2) + eps) over the last dimension, eps that of float32 or float64.

    x: (..., D), weight: (D,) -> (..., D) in x's dtype.  Under autocast, compiled code may give
    autocast's dtype: the matrix product behind the norm rounds to that anyway.  Shapes that
    disagree are PyTorch's error.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4.
    """
    (y,) = _op(x, weight)
    return y
