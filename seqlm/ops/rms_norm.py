"""RMSNorm in one pass each way, its output in the dtype that the matrix product behind it takes."""

# N rows, D width

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqlm.ops import backend

FEW = 1 << 13  # numbers, for which torch is faster: a step's
BLOCK = 256  # rows of a job; sums over rows are made of these, whatever the number of threads


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """weight x / sqrt(mean(x^2) + eps) over the last dimension, eps that of the dtype.

    x: (..., D), weight: (D,) -> (..., D) in x's dtype, or in autocast's where that is on and the
    loops are compiled: the product behind it rounds to that anyway.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4.
    """
    compiled = x.numel() > FEW and x.dtype == weight.dtype == torch.float32
    if compiled and backend.of(x, weight) == "cpu":
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        if dtype in backend.COMPILED:
            return _RMSNorm.apply(x, weight, dtype)
    return F.rms_norm(x, weight.shape, weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        from seqlm.ops import _cpu

        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y, scale = torch.empty_like(rows, dtype=dtype), rows.new_empty(len(rows))
        _cpu.run_rows(_cpu.norm_forward, len(rows), BLOCK, rows, weight.contiguous(), y, scale)
        ctx.save_for_backward(rows, weight, scale)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        from seqlm.ops import _cpu

        x, weight, scale = ctx.saved_tensors
        dx, parts = torch.empty_like(x), x.new_zeros(-(-len(x) // BLOCK), x.shape[1])
        given = x, weight.contiguous(), scale, dy.reshape(x.shape).contiguous(), dx, parts
        _cpu.run_rows(_cpu.norm_backward, len(x), BLOCK, *given)
        return dx.view(dy.shape), parts.sum(0), None
