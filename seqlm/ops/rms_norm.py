"""RMSNorm in one forward and one backward pass."""

# D width

from torch import Tensor

from seqlm.ops.dispatch import Op

_op = Op("rms_norm")


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """weight x / sqrt(mean(x^2) + eps) over the last dimension; eps of float32 or float64.

    x: (..., D), weight: (D,) -> (..., D) in x's dtype.  Under autocast, compiled code may return
    autocast's dtype, because the matrix product that follows rounds to it anyway.  For shapes that
    disagree PyTorch raises its error.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4.
    """
    (y,) = _op(x, weight)
    return y
