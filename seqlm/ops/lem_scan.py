"""LEM's recurrence over a whole sequence, with its gradient by hand: a loop with little in it."""

# B batch, T time, D width

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqlm.ops import backend


def lem_scan(
    drive: Tensor, y0: Tensor, z0: Tensor, from_y: Tensor, from_z: Tensor, dt: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y_t for t = 1 .. T, and the last y and z, in the state's dtype.

    drive: (B, T, 4 D), what the input adds to the gate of z, the gate of y, the new z and the new
    y.  y0, z0: (B, D).  from_y: (3 D, D), from_z: (D, D).
    Source: Rusch et al., Long Expressive Memory for Sequence Modeling, ICLR 2022, equation 3.
    """
    return _LEMScan.apply(drive, y0, z0, from_y, from_z, dt)


class _LEMScan(torch.autograd.Function):
    """Time comes first inside, so that what one step reads lies together."""

    @staticmethod
    def forward(ctx, drive, y0, z0, from_y, from_z, dt):
        ctx.compiled, ctx.dt, ctx.dtype = backend.of(drive, y0, z0) == "cpu", dt, drive.dtype
        batch, time, width = *drive.shape[:2], y0.shape[1]
        new = y0.new_empty
        ys, zs = new(time + 1, batch, width), new(time + 1, batch, width)
        ys[0], zs[0] = y0, z0
        gates = new(time, batch, 2 * width)  # of z and of y
        phi, psi = new(time, batch, width), new(time, batch, width)  # the new z and y
        steps = drive.transpose(0, 1).to(y0.dtype, memory_format=torch.contiguous_format)
        saved = ys, zs, gates, phi, psi
        with torch.autocast(drive.device.type, enabled=False):
            loop = _forward_compiled if ctx.compiled else _forward
            loop(steps, *saved, from_y.t().to(y0.dtype), from_z.t().to(y0.dtype), dt)
        ctx.save_for_backward(*saved, from_y, from_z)
        return ys[1:].transpose(0, 1), ys[-1].clone(), zs[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dy, dz):
        *saved, from_y, from_z = ctx.saved_tensors
        ys, zs, _, phi, _ = saved
        time, batch, width = phi.shape
        d_steps = ys.new_empty(time, batch, 4 * width)
        dh, dy, dz = dh.transpose(0, 1).contiguous(), dy.clone(), dz.clone()
        loop = _backward_compiled if ctx.compiled else _backward
        loop(dh, dy, dz, d_steps, *saved, from_y.to(ys.dtype), from_z.to(ys.dtype), ctx.dt)
        d_steps = d_steps.to(ctx.dtype)
        d_y, d_z = (d.flatten(0, 1).t() for d in d_steps.split((3 * width, width), dim=-1))
        d_from_y = d_y @ ys[:-1].flatten(0, 1).to(ctx.dtype)
        d_from_z = d_z @ zs[1:].flatten(0, 1).to(ctx.dtype)
        weights = d_from_y.to(from_y.dtype), d_from_z.to(from_z.dtype)
        return d_steps.transpose(0, 1), dy, dz, *weights, None


def _forward(steps, ys, zs, gates, phi, psi, in_y, in_z, dt) -> None:
    width = phi.shape[2]
    of_y, of_z = steps.split((3 * width, width), dim=-1)
    for t in range(len(steps)):
        p = torch.addmm(of_y[t], ys[t], in_y)
        torch.sigmoid(p[:, : 2 * width], out=gates[t]).mul_(dt)
        torch.tanh(p[:, 2 * width :], out=phi[t])
        torch.lerp(zs[t], phi[t], gates[t, :, :width], out=zs[t + 1])
        torch.tanh(torch.addmm(of_z[t], zs[t + 1], in_z), out=psi[t])
        torch.lerp(ys[t], psi[t], gates[t, :, width:], out=ys[t + 1])


def _backward(dh, dy, dz, d_steps, ys, zs, gates, phi, psi, by_y, by_z, dt) -> None:
    """Leaves in dy and dz those of the first state."""
    width = phi.shape[2]
    gate_z, gate_y = gates.split(width, dim=-1)
    for t in range(len(dh) - 1, -1, -1):
        of_gate_z, of_gate_y, of_phi, of_psi = d_steps[t].split(width, dim=-1)
        dy += dh[t]
        torch.mul(dy, gate_y[t] * (1 - psi[t] ** 2), out=of_psi)
        torch.mul(dy, (psi[t] - ys[t]) * gate_y[t] * (1 - gate_y[t] / dt), out=of_gate_y)
        dz.addmm_(of_psi, by_z)
        torch.mul(dz, gate_z[t] * (1 - phi[t] ** 2), out=of_phi)
        torch.mul(dz, (phi[t] - zs[t]) * gate_z[t] * (1 - gate_z[t] / dt), out=of_gate_z)
        dy.mul_(1 - gate_y[t]).addmm_(d_steps[t, :, : 3 * width], by_y)
        dz.mul_(1 - gate_z[t])


def _forward_compiled(steps, ys, zs, gates, phi, psi, in_y, in_z, dt) -> None:
    from seqlm.ops import _cpu

    a = _arrays(steps=steps, ys=ys, zs=zs, gates=gates, phi=phi, psi=psi)
    p, q = ys.new_empty(ys.shape[1], 3 * ys.shape[2]), ys.new_empty(ys.shape[1:])
    p_, q_, dt = _cpu.array(p), _cpu.array(q), _cpu.F32(dt)
    for t in range(len(steps)):
        torch.mm(ys[t], in_y, out=p)
        _cpu.lem_new_z(t, p_, a.steps, a.gates, a.phi, a.zs, dt)
        torch.mm(zs[t + 1], in_z, out=q)
        _cpu.lem_new_y(t, q_, a.steps, a.gates, a.psi, a.ys)


def _backward_compiled(dh, dy, dz, d_steps, ys, zs, gates, phi, psi, by_y, by_z, dt) -> None:
    from seqlm.ops import _cpu

    a = _arrays(dh=dh, dy=dy, dz=dz, d_steps=d_steps, ys=ys, zs=zs, gates=gates, phi=phi, psi=psi)
    dt = _cpu.F32(dt)
    of_y, of_z = d_steps.split((3 * phi.shape[2], phi.shape[2]), dim=-1)
    for t in range(len(dh) - 1, -1, -1):
        _cpu.lem_d_y(t, a.dh, a.dy, a.psi, a.ys, a.gates, a.d_steps, dt)
        dz.addmm_(of_z[t], by_z)
        _cpu.lem_d_z(t, a.dz, a.phi, a.zs, a.gates, a.d_steps, dt)
        dy.addmm_(of_y[t], by_y)


def _arrays(**tensors: Tensor) -> SimpleNamespace:
    from seqlm.ops import _cpu

    return SimpleNamespace(**{name: _cpu.array(tensor) for name, tensor in tensors.items()})
