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
    """weight x / sqrt(mean(x^2) + eps) over the last dimension, eps that of float32 or float64.

    x: (..., D), weight: (D,) -> (..., D) in x's dtype.  Where autocast is on, triton's kernels and,
    of many numbers in float32, compiled loops give its dtype: the product behind rounds to that
    anyway.  Torch, which does all else, gives x's.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4.
    """
    if x.numel() <= FEW and weight.shape == x.shape[-1:] and backend.for_step(x, weight):
        return _step(x.contiguous(), weight.contiguous())
    chosen = backend.of(x, weight)
    dtype = _compiled(x, weight, chosen)
    if dtype is not None:
        return _RMSNorm.apply(x, weight, dtype, chosen)
    return F.rms_norm(x, weight.shape, weight)


def _compiled(x: Tensor, weight: Tensor, chosen: str) -> torch.dtype | None:
    """The dtype that comes out of a backend's compiled pass; None where torch makes it."""
    if x.numel() == 0 or weight.ndim != 1 or weight.shape != x.shape[-1:]:
        return None
    device = x.device.type
    if chosen == "cpu":
        fits, written = x.dtype == weight.dtype == torch.float32, backend.LOOPS
        fits = fits and x.numel() > FEW
    else:
        fits, written = chosen == "triton", backend.KERNELS
        fits = fits and len(weight) <= backend.kernels().WIDEST_ROW
    if not fits:
        return None
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return dtype if dtype in written else None


def _step(x: Tensor, weight: Tensor) -> Tensor:
    _cpu = backend.loops()
    y, width = torch.empty_like(x), len(weight)
    _cpu.step(_cpu.step_norm, (x, weight, y), x.numel() // width, width)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dtype: torch.dtype, chosen: str) -> Tensor:
        ctx.backend = chosen
        rows, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
        if ctx.backend == "triton":
            y, scale = backend.kernels().normed(rows, weight, dtype)
        else:
            _cpu = backend.loops()
            y, scale = torch.empty_like(rows, dtype=dtype), rows.new_empty(len(rows))
            _cpu.run_rows(_cpu.norm_forward, len(rows), BLOCK, rows, weight, y, scale)
        ctx.save_for_backward(rows, weight, scale)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        given = x, weight, scale, dy.reshape(x.shape).contiguous()
        if ctx.backend == "triton":
            dx, dw = backend.kernels().normed_gradients(*given)
        else:
            _cpu = backend.loops()
            dx, parts = torch.empty_like(x), x.new_zeros(-(-len(x) // BLOCK), x.shape[1])
            _cpu.run_rows(_cpu.norm_backward, len(x), BLOCK, *given, dx, parts)
            dw = parts.sum(0)
        return dx.view(dy.shape), dw.to(weight.dtype), None, None
