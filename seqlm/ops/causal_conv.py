"""A short depthwise convolution over time, in one forward and one backward pass."""

# B batch, T time, D width, K kernel

from torch import Tensor

from seqlm.ops.dispatch import Op

_op = Op("causal_conv")


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y_t = bias + sum over k of weight_k x_{t + k}, channel by channel.

    x: (B, K - 1 + T, D); its first K - 1 places are in the past of the first output.  weight:
    (D, 1, K), as in PyTorch's convolutions, bias: (D,) -> (B, T, D) in x's dtype, or in autocast's
    where PyTorch computes it under autocast.  For shapes that disagree PyTorch raises its error.
    """
    (y,) = _op(x, weight, bias)
    return y
