"""The scan whose gates are 2 x 2 blocks, for cells of two coupled states."""

# B batch, T time, H state width

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqlm.errors import ShapeError
from seqlm.ops import _torch, backend
from seqlm.ops.linear_scan import before, solved


def block_scan(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """Solve h_t = A_t h_{t-1} + b_t for t = 1 .. T, where a unit's state is a pair of numbers.

    a: (B, T, 2, 2, H), row and column of every unit's block.  b: (B, T, 2, H), T >= 1.
    h0: (B, 2, H), the state before the first step.
    Returns h: (B, T, 2, H) in b's dtype, and h_T: (B, 2, H), a copy and not a view.  The state is
    carried in float32 at least (float64 where an input is), and h_T comes in that dtype.  On triton
    inputs are read as they are, and the gradient of a is of h in b's dtype.
    Raises ShapeError when the three shapes disagree.
    Source: Blelloch, Prefix Sums and Their Applications, 1990, section 1.4.
    """
    batch, time, width = (len(b), b.shape[1], b.shape[3]) if b.ndim == 4 else (None, 0, None)
    whole = (batch, time, 2, 2, width), (batch, time, 2, width), (batch, 2, width)
    if time < 1 or (a.shape, b.shape, h0.shape) != whole:
        raise ShapeError(
            "A block scan takes gates (B, T, 2, 2, H) and inputs (B, T, 2, H) with T >= 1 and a "
            f"state (B, 2, H); it was given {tuple(a.shape)}, {tuple(b.shape)} and "
            f"{tuple(h0.shape)}."
        )
    return solved(_BlockScan, lambda a, b, h: _torch.advance(a, h, b), a, b, h0)


class _BlockScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        ctx.backend = backend.of(a)
        h = _solve(a, b, h0)
        ctx.save_for_backward(a, h, h0)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, h0 = ctx.saved_tensors
        with backend.using(ctx.backend):
            db = _solve(*_torch.reversed_gates(a, dh), torch.zeros_like(h0)).flip(1)
        da = db.unsqueeze(3) * before(h, h0).unsqueeze(2)
        return da, db, (a[:, 0] * db[:, 0].unsqueeze(2)).sum(1)


def _solve(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    if backend.of(a) != "cpu":
        return _torch.scan(a, b, h0)
    _cpu = backend.loops()
    h, (batch, _, width) = torch.empty_like(b, memory_format=torch.contiguous_format), h0.shape
    given = a.contiguous(), b.contiguous(), h0.contiguous(), h
    _cpu.run(_cpu.block_forward, batch, width, *given)
    return h
