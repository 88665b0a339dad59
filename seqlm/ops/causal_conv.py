"""A short depthwise convolution over time, in one pass each way."""

# B batch, T time, D width, K kernel

from torch import Tensor

from seqlm.ops.dispatch import Op

_op = Op("causal_conv")


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y_t = bias + sum over k of weight_k x_{t + k}, channel by channel.

    x: (B, K - 1 + T, D), which begins with the K - 1 places before the first output.  weight:
    (D, 1, K), as PyTorch's convolutions have it, bias: (D,) -> (B, T, D) in x's dtype, or in
    autocast's where PyTorch computes it under autocast.  Shapes that disagree are PyTorch's error.
    """
    (y,) = _op(x, weight, bias)
    return y
