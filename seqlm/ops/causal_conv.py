"""A short depthwise convolution over time, in one pass each way."""

# B batch, T time, D width, K kernel

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqlm.ops import backend


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y_t = bias + sum over k of weight_k x_{t + k}, channel by channel.

    x: (B, K - 1 + T, D), what is before the first place included.  weight: (D, 1, K), as torch's
    convolutions have it, bias: (D,) -> (B, T, D) in x's dtype; where torch makes it, in
    autocast's, if that is on.
    """
    chosen = _backend(x, weight, bias)
    if chosen == "cpu":
        return _CausalConv.apply(x.contiguous(), weight[:, 0].t().contiguous(), bias.contiguous())
    if chosen == "triton":
        return _OnKernels.apply(x.contiguous(), weight.contiguous(), bias.contiguous())
    return F.conv1d(x.mT, weight, bias, groups=len(weight)).mT


def _backend(x: Tensor, weight: Tensor, bias: Tensor) -> str:
    """What makes it: loops in float32, kernels of any x they read; torch all else, and in a graph
    of torch.compile's, which fuses it with what is around it."""
    if torch.compiler.is_compiling() or not weight.dtype == bias.dtype == torch.float32:
        return "torch"
    width, kernel = len(weight), weight.shape[-1]
    if (weight.shape, x.shape[2:], bias.shape) != ((width, 1, kernel), (width,), (width,)):
        return "torch"  # which says what is wrong
    if x.shape[1] < kernel:
        return "torch"
    chosen = backend.of(x, weight, bias)
    if chosen == "triton" and kernel > backend.kernels().LONGEST_KERNEL:
        return "torch"
    return "torch" if chosen == "cpu" and x.dtype != torch.float32 else chosen


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        _cpu = backend.loops()
        batch, time, width = x.shape
        y = x.new_empty(batch, time - len(weight) + 1, width)
        _cpu.run_rows(_cpu.conv_forward, batch, 1, x, weight, bias, y)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _cpu = backend.loops()
        x, weight = ctx.saved_tensors
        dx, parts = torch.zeros_like(x), x.new_zeros(len(x), len(weight) + 1, x.shape[2])
        _cpu.run_rows(_cpu.conv_backward, len(x), 1, x, weight, dy.contiguous(), dx, parts)
        *dw, db = parts.sum(0)
        return dx, torch.stack(dw), db


class _OnKernels(torch.autograd.Function):
    """On triton, which reads and writes x's dtype and adds up in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return backend.kernels().convolved(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return backend.kernels().convolved_gradients(x, weight, dy.contiguous())
