"""The recurrence of a diagonal CfC in one pass each way, for the backends cpu and triton alone."""

# B batch, T time, D width, P parts of the drive

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqlm.errors import ShapeError
from seqlm.ops import backend


def diagonal_cfc_scan(
    drive: Tensor, h0: Tensor, weights: Tensor, gated: bool, tau: float
) -> tuple[Tensor, Tensor]:
    """h_t for t = 1 .. T in the drive's dtype, and the last in float32.

        [f_1, f_2, k, l] = drive_t + [w_1 h_{t-1}, w_2 h_{t-1}, w_k h_{t-1}, 0],  s = sigmoid(tau k)
        c_t = tanh(f_1) (1 - s) + s tanh(f_2)      without `gated`, tanh(f_1) + s tanh(f_2)
        h_t = h_{t-1} + sigmoid(l) (c_t - h_{t-1})      c_t itself where the drive has no l

    drive: (B, T, 3 D) or (B, T, 4 D).  h0: (B, D).  weights: (3, D).  Raises ShapeError when they
    disagree.
    Source: Hasani et al., Closed-form continuous-time neural networks, 2022, equation 10, without a
    backbone and with diagonal weights.
    """
    batch, time, parts = drive.shape if drive.ndim == 3 else (None, 0, 0)
    width = h0.shape[-1]
    fits = h0.shape == (batch, width) and weights.shape == (3, width)
    if time < 1 or not fits or parts not in (3 * width, 4 * width):
        raise ShapeError(
            "A diagonal CfC's scan takes a drive (B, T, 3 D) or (B, T, 4 D) with T >= 1, a state "
            f"(B, D) and weights (3, D); it was given {tuple(drive.shape)}, {tuple(h0.shape)} and "
            f"{tuple(weights.shape)}."
        )
    return _DiagonalCfC.apply(drive, h0.float(), weights.float(), gated, tau)


class _DiagonalCfC(torch.autograd.Function):
    """Keeps only the drive and h: all else is computed again on the way back."""

    @staticmethod
    def forward(ctx, drive, h0, weights, gated, tau):
        ctx.backend, ctx.form = backend.of(drive, h0), (gated, tau)
        drive, h0, weights = (x.contiguous() for x in (drive, h0, weights))
        h, last = drive.new_empty(*drive.shape[:2], h0.shape[1]), torch.empty_like(h0)
        _run(ctx, "diagonal_cfc_forward", drive, h0, weights, h, last)
        ctx.save_for_backward(drive, h0, weights, h)
        return h, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dlast):
        drive, h0, weights, h = ctx.saved_tensors
        d_drive = torch.empty_like(drive)
        dh0 = dlast.clone(memory_format=torch.contiguous_format)
        parts = weights.new_zeros(len(h), *weights.shape)  # of every row of the batch
        given = weights, h, dh.contiguous(), d_drive, dh0, parts
        _run(ctx, "diagonal_cfc_backward", drive, h0, *given)
        return d_drive, dh0, parts.sum(0), None, None


def _run(ctx, name: str, drive: Tensor, h0: Tensor, *given: Tensor) -> None:
    """The pass of that name: a kernel or a loop, which take the form at different places."""
    gated, tau = ctx.form
    if ctx.backend == "triton":
        _triton = backend.kernels()
        form = dict(PARTS=drive.shape[2] // h0.shape[1], GATED=gated)
        kernel, time = getattr(_triton, name), drive.shape[1]
        _triton.run(kernel, h0, time, drive, h0, *given, tau, **form)
    else:
        _cpu = backend.loops()
        _cpu.run(getattr(_cpu, name), *h0.shape, drive, h0, *given, gated, tau)
