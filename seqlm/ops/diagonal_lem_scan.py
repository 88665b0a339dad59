"""The recurrence of a diagonal LEM in one pass each way, for the backends cpu and triton alone."""

# B batch, T time, D width

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqlm.errors import ShapeError
from seqlm.ops import backend


def diagonal_lem_scan(
    drive: Tensor, y0: Tensor, z0: Tensor, weights: Tensor, dt: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y_t for t = 1 .. T in the drive's dtype, and the last y and z in float32.

    drive: (B, T, 4 D), what the input adds to the gate of z, the gate of y, the new z and the new
    y.  y0, z0: (B, D).  weights: (4, D), of what the first three of these see of y and the last of
    z.  Raises ShapeError when they disagree.
    Source: Rusch et al., Long Expressive Memory for Sequence Modeling, ICLR 2022, equation 3, with
    diagonal matrices.
    """
    shapes = [tuple(x.shape) for x in (drive, y0, z0, weights)]
    batch, time = drive.shape[:2] if drive.ndim == 3 else (None, 0)
    width = y0.shape[-1]
    state = batch, width
    if time < 1 or shapes != [(batch, time, 4 * width), state, state, (4, width)]:
        raise ShapeError(
            "A diagonal LEM's scan takes a drive (B, T, 4 D) with T >= 1, states (B, D) and "
            f"weights (4, D); it was given {', '.join(map(str, shapes))}."
        )
    return _DiagonalLEM.apply(drive, y0.float(), z0.float(), weights.float(), dt)


class _DiagonalLEM(torch.autograd.Function):
    """Keeps y and z in the drive's dtype: all else is computed again on the way back."""

    @staticmethod
    def forward(ctx, drive, y0, z0, weights, dt):
        ctx.backend, ctx.dt = backend.of(drive, y0), dt
        batch, time, width = *drive.shape[:2], y0.shape[1]
        drive, y0, z0, weights = (x.contiguous() for x in (drive, y0, z0, weights))
        h, zs = (drive.new_empty(batch, time, width) for _ in range(2))
        y, z = torch.empty_like(y0), torch.empty_like(z0)
        given = drive, y0, z0, weights, h, zs, y, z, dt
        if ctx.backend == "triton":
            _triton = backend.kernels()
            _triton.run(_triton.diagonal_lem_forward, y0, time, *given)
        else:
            _cpu = backend.loops()
            _cpu.run(_cpu.diagonal_lem_forward, batch, width, *given)
        ctx.save_for_backward(drive, y0, z0, weights, h, zs)
        return h, y, z

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dy, dz):
        drive, y0, z0, weights, h, zs = ctx.saved_tensors
        d_drive = torch.empty_like(drive)
        dy, dz = (d.clone(memory_format=torch.contiguous_format) for d in (dy, dz))
        parts = weights.new_zeros(len(h), *weights.shape)  # of every row of the batch
        given = drive, y0, z0, weights, h, zs, dh.contiguous(), d_drive, dy, dz, parts, ctx.dt
        if ctx.backend == "triton":
            _triton = backend.kernels()
            _triton.run(_triton.diagonal_lem_backward, y0, drive.shape[1], *given)
        else:
            _cpu = backend.loops()
            _cpu.run(_cpu.diagonal_lem_backward, *y0.shape, *given)
        return d_drive, dy, dz, parts.sum(0), None
