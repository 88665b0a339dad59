"""LEM's recurrence over a whole sequence, with its gradient by hand: a loop with little in it."""

# B batch, T time, D width, G heads, S = D / G units of a head

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqlm.errors import ShapeError
from seqlm.ops import backend
from seqlm.ops.linear_scan import accumulator, before


def lem_scan(
    drive: Tensor, y0: Tensor, z0: Tensor, from_y: Tensor, from_z: Tensor, dt: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y_t for t = 1 .. T in the drive's dtype, and the last y and z in the state's.

    drive: (B, T, 4 D), what the input adds to the gate of z, the gate of y, the new z and the new
    y.  y0, z0: (B, D).  from_y: (3, G, S, S), from_z: (1, G, S, S), output and input of blocks, of
    which dense matrices have one.  Raises ShapeError when they disagree.
    Source: Rusch et al., Long Expressive Memory for Sequence Modeling, ICLR 2022, equation 3.
    """
    shapes = [tuple(x.shape) for x in (drive, y0, z0, from_y, from_z)]
    batch, time, width = len(drive), drive.shape[1], y0.shape[-1]
    heads = from_y.shape[1] if from_y.ndim == 4 else 1
    state, block = (batch, width), (heads, width // heads, width // heads)
    whole = [(batch, time, 4 * width), state, state, (3, *block), (1, *block)]
    if time < 1 or shapes != whole:
        raise ShapeError(
            "LEM's scan takes a drive (B, T, 4 D) with T >= 1, states (B, D) and weights "
            "(3, G, S, S) and (1, G, S, S) with G S = D; it was given "
            f"{', '.join(map(str, shapes))}."
        )
    exact = accumulator(drive, y0)
    return _LEMScan.apply(drive, y0.to(exact), z0.to(exact), from_y, from_z, dt)


class _LEMScan(torch.autograd.Function):
    """Keeps z and, of both gates and both tanh, what goes in (compiled loop and kernel, in the
    drive's dtype) or what comes out: (B, T, 5 D)."""

    @staticmethod
    def forward(ctx, drive, y0, z0, from_y, from_z, dt):
        ctx.backend, ctx.dt = backend.of(drive, y0), dt
        batch, time, width = *drive.shape[:2], y0.shape[1]
        like = y0 if ctx.backend == "torch" else drive
        h, kept = like.new_empty(batch, time, width), like.new_empty(batch, time, 5 * width)
        y, z = (x.clone(memory_format=torch.contiguous_format) for x in (y0, z0))
        weights = [w.to(y0.dtype) for w in (from_y, from_z)]
        if ctx.backend == "cpu":
            weights = [w.transpose(2, 3) for w in weights]
        weights = [w.contiguous() for w in weights]
        with torch.autocast(drive.device.type, enabled=False):
            _FORWARD[ctx.backend](drive.contiguous(), y, z, *weights, h, kept, dt)
        ctx.save_for_backward(y0, z0, from_y, from_z, h, kept)
        ctx.dtype = drive.dtype
        return h.to(drive.dtype), y, z

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dy, dz):
        y0, z0, from_y, from_z, h, kept = ctx.saved_tensors
        width, dtype = y0.shape[1], ctx.dtype
        d_drive = torch.empty(*h.shape[:2], 4 * width, dtype=dtype, device=h.device)
        first = y0.to(h.dtype).contiguous(), z0.to(h.dtype).contiguous()
        dy, dz = (d.clone(memory_format=torch.contiguous_format) for d in (dy, dz))
        weights = (w.to(y0.dtype).contiguous() for w in (from_y, from_z))
        _BACKWARD[ctx.backend](dh.contiguous(), *first, h, kept, *weights, d_drive, dy, dz, ctx.dt)
        of_y, of_z = d_drive.split((3 * width, width), dim=-1)
        d_from_y = _by_blocks(of_y, before(h, first[0]).to(dtype), from_y)
        d_from_z = _by_blocks(of_z, kept[..., 3 * width : 4 * width].to(dtype), from_z)
        return d_drive, dy, dz, d_from_y.to(from_y.dtype), d_from_z.to(from_z.dtype), None


def _by_blocks(d_out: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the blocks (P, G, S, S) that made (B, T, P D) of (B, T, D)."""
    parts, heads, size, _ = weight.shape
    if heads == 1:  # a product without copies
        return (d_out.flatten(0, 1).t() @ h.flatten(0, 1)).view(weight.shape)
    d_out = d_out.reshape(-1, parts, heads, size).permute(2, 1, 3, 0).flatten(1, 2)
    products = d_out @ h.reshape(-1, heads, size).transpose(0, 1)
    return products.view(heads, parts, size, size).transpose(0, 1)


def _whole(weight: Tensor) -> Tensor:
    """(P, G, S, S) -> (P D, D), zero outside of the blocks."""
    return torch.cat([torch.block_diag(*part) for part in weight])


def _forward_compiled(drive, *rest) -> None:
    _cpu = backend.loops()
    _cpu.run_batch(_cpu.lem_forward, len(drive), drive, *rest)


def _backward_compiled(dh, *rest) -> None:
    _cpu = backend.loops()
    _cpu.run_batch(_cpu.lem_backward, len(dh), dh, *rest)


def _forward_kernel(*given) -> None:
    backend.kernels().lem_forward(*given)


def _backward_kernel(*given) -> None:
    backend.kernels().lem_backward(*given)


def _forward(drive, y, z, in_y, in_z, h, kept, dt) -> None:
    """y, z: the first state when it begins, the last when it ends."""
    in_y, in_z = _whole(in_y).t(), _whole(in_z).t()
    width, drive = y.shape[1], drive.to(y.dtype)
    of_y, of_z = drive.split((3 * width, width), dim=-1)
    gates, phi, zs, psi = kept.split((2 * width, width, width, width), dim=-1)
    for t in range(drive.shape[1]):
        p = torch.addmm(of_y[:, t], y, in_y)
        torch.sigmoid(p[:, : 2 * width], out=gates[:, t]).mul_(dt)
        torch.tanh(p[:, 2 * width :], out=phi[:, t])
        zs[:, t] = z.lerp_(phi[:, t], gates[:, t, :width])
        torch.tanh(torch.addmm(of_z[:, t], z, in_z), out=psi[:, t])
        h[:, t] = y.lerp_(psi[:, t], gates[:, t, width:])


def _backward(dh, y0, z0, h, kept, by_y, by_z, d_drive, dy, dz, dt) -> None:
    """dy, dz: of the last state when it begins, of the first when it ends."""
    by_y, by_z = _whole(by_y), _whole(by_z)
    gate_z, gate_y, phi, zs, psi = kept.chunk(5, dim=-1)
    d_step = dy.new_empty(len(dy), 4 * dy.shape[1])
    of_gate_z, of_gate_y, of_phi, of_psi = d_step.chunk(4, dim=-1)
    for t in range(dh.shape[1] - 1, -1, -1):
        old_y, old_z = (h[:, t - 1], zs[:, t - 1]) if t else (y0, z0)
        g_y, f_y, g_z, f_z = gate_y[:, t], psi[:, t], gate_z[:, t], phi[:, t]
        dy += dh[:, t]
        torch.mul(dy, g_y * (1 - f_y**2), out=of_psi)
        torch.mul(dy, (f_y - old_y) * g_y * (1 - g_y / dt), out=of_gate_y)
        dz.addmm_(of_psi, by_z)
        torch.mul(dz, g_z * (1 - f_z**2), out=of_phi)
        torch.mul(dz, (f_z - old_z) * g_z * (1 - g_z / dt), out=of_gate_z)
        dy.mul_(1 - g_y).addmm_(d_step[:, : 3 * dy.shape[1]], by_y)
        dz.mul_(1 - g_z)
        d_drive[:, t] = d_step


_FORWARD = {"cpu": _forward_compiled, "triton": _forward_kernel, "torch": _forward}
_BACKWARD = {"cpu": _backward_compiled, "triton": _backward_kernel, "torch": _backward}
