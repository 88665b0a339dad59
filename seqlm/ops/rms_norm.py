"""RMSNorm in one pass each way, its output in the dtype that the matrix product behind it takes."""

# N rows, D width

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqlm.ops import backend

FEW = 1 << 13  # numbers, for which torch is faster where a gradient is wanted
BLOCK = 256  # rows of a job; sums over rows are made of these, whatever the number of threads


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """weight x / sqrt(mean(x^2) + eps) over the last dimension, eps that of the dtype.

    x: (..., D), weight: (D,) -> (..., D) in x's dtype; of many numbers in autocast's, where that is
    on and the loops are compiled: the product behind it rounds to that anyway.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4.
    """
    if x.numel() <= FEW and weight.shape == x.shape[-1:] and backend.for_step(x, weight):
        return _step(x.contiguous(), weight.contiguous())
    dtype = _compiled(x, weight)
    if dtype is not None:
        return _RMSNorm.apply(x, weight, dtype)
    return F.rms_norm(x, weight.shape, weight)


def _compiled(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype that comes out of a compiled pass; None where torch makes it."""
    fits = x.dtype == weight.dtype == torch.float32 and weight.shape == x.shape[-1:]
    if x.numel() <= FEW or not fits or backend.of(x, weight) != "cpu":
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype if dtype in backend.LOOPS else None


def _step(x: Tensor, weight: Tensor) -> Tensor:
    _cpu = backend.loops()
    y, width = torch.empty_like(x), len(weight)
    _cpu.step(_cpu.step_norm, (x, weight, y), x.numel() // width, width)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        _cpu = backend.loops()
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y, scale = torch.empty_like(rows, dtype=dtype), rows.new_empty(len(rows))
        _cpu.run_rows(_cpu.norm_forward, len(rows), BLOCK, rows, weight.contiguous(), y, scale)
        ctx.save_for_backward(rows, weight, scale)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        _cpu = backend.loops()
        x, weight, scale = ctx.saved_tensors
        dx, parts = torch.empty_like(x), x.new_zeros(-(-len(x) // BLOCK), x.shape[1])
        given = x, weight.contiguous(), scale, dy.reshape(x.shape).contiguous(), dx, parts
        _cpu.run_rows(_cpu.norm_backward, len(x), BLOCK, *given)
        return dx.view(dy.shape), parts.sum(0), None
