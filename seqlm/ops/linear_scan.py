"""The general first-order scan, for any cell that is linear in its state."""

# B batch, T time, H state width

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqlm.errors import ShapeError
from seqlm.ops import _reference, _torch, backend


def linear_scan(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """Solve h_t = a_t h_{t-1} + b_t for t = 1 .. T, elementwise in H.

    a, b: (B, T, H), any real values, T >= 1.  h0: (B, H), the state before the first step.
    Returns h: (B, T, H) in b's dtype, and h_T: (B, H), a copy and not a view.  The state is carried
    in float32 at least (float64 where an input is), and h_T comes in that dtype.  On triton inputs
    are read as they are, and the gradient of a is of h in b's dtype.
    Raises ShapeError when the three shapes disagree.
    Source: Blelloch, Prefix Sums and Their Applications, 1990, section 1.4; gradient: Martin and
    Cundy, Parallelizing Linear Recurrent Neural Nets Over Sequence Length, 2018, section 2.2.
    """
    batch, time, width = a.shape if a.ndim == 3 else (None, 0, None)
    if b.shape != a.shape or h0.shape != (batch, width) or time < 1:
        raise ShapeError(
            "A scan takes two tensors (B, T, H) with T >= 1 and a state (B, H); it was given "
            f"{tuple(a.shape)}, {tuple(b.shape)} and {tuple(h0.shape)}."
        )
    return solved(_LinearScan, lambda a, b, h: a * h + b, a, b, h0)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        ctx.backend = backend.of(a)
        if ctx.backend == "cpu":
            _cpu = backend.loops()
            a, b, h0 = a.contiguous(), b.contiguous(), h0.contiguous()
            h = torch.empty_like(b)
            _cpu.run(_cpu.linear_forward, *h0.shape, a, b, h0, h)
        else:
            h = _torch.scan(a, b, h0)
        ctx.save_for_backward(a, h, h0)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, h0 = ctx.saved_tensors
        if ctx.backend == "cpu":
            _cpu = backend.loops()
            da, db, dh0 = torch.empty_like(a), torch.empty_like(a), torch.empty_like(h0)
            _cpu.run(_cpu.linear_backward, *h0.shape, a, h0, h, dh.contiguous(), da, db, dh0)
            return da, db, dh0
        db = _torch.scan_backward(a, dh)
        return db * before(h, h0), db, a[:, 0] * db[:, 0]


class _OnKernels(torch.autograd.Function):
    """Either scan on triton, which reads every dtype as it is and computes in float32.

    What is kept for the gradient of a is h as it was written, in b's dtype; the last h is exact.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        _triton = backend.kernels()
        a, b, h0 = a.contiguous(), b.contiguous(), h0.contiguous()
        h, last = (_triton.scan if a.ndim == b.ndim else _triton.block_scan)(a, b, h0)
        ctx.save_for_backward(a, h, h0)
        return h, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _triton = backend.kernels()
        a, h, h0 = ctx.saved_tensors
        given = h0, h, dh.contiguous(), dlast.contiguous()
        if a.ndim == h.ndim:
            return _triton.scan_gradients(a, h, *given)  # h is as b was, which it does not read
        return _triton.block_scan_gradients(a, *given)


def solved(
    scan: type[torch.autograd.Function],
    step: Callable[[Tensor, Tensor, Tensor], Tensor],
    a: Tensor,
    b: Tensor,
    h0: Tensor,
) -> tuple[Tensor, Tensor]:
    """h in b's dtype and a copy of the last: by kernels, which compute in float32 whatever they
    read; or, in one dtype, by the scan or the reference's fold of its step."""
    exact = accumulator(a, b, h0)
    if backend.of(a, b, h0) == "triton":
        return _OnKernels.apply(a, b, h0.to(exact))
    a_, b_, h0_ = a.to(exact), b.to(exact), h0.to(exact)
    if backend.of(a_) == "reference":
        h = _reference.fold(step, (a_, b_), h0_)
    else:
        h = scan.apply(a_, b_, h0_)
    return h.to(b.dtype), h[:, -1].clone()


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype a state is carried in: float32, or float64 where an input is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def before(h: Tensor, h0: Tensor) -> Tensor:
    """h_{t-1} for every t: (B, T, H)."""
    return torch.cat([h0.unsqueeze(1), h[:, :-1]], dim=1)
