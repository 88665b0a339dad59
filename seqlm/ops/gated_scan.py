"""The gated scan that minGRU and minLSTM share: activations and recurrence in one op."""

# B batch, T time, H state width

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqlm.errors import ShapeError
from seqlm.ops import _reference, _torch, backend
from seqlm.ops.linear_scan import accumulator, before

CANDIDATES = ("positive", "linear")


def candidate_value(u: Tensor, candidate: str) -> Tensor:
    """g(u): u + 1/2 for u >= 0 and sigmoid(u) below ("positive"), or u itself ("linear").

    Source: Feng et al., Were RNNs All We Needed?, arXiv 2410.01201, appendices A and B.
    """
    return u if candidate == "linear" else torch.where(u >= 0, u + 0.5, torch.sigmoid(u))


def split(drive: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The logit of the gate and the candidate, each (..., H), of a drive in float32 or float64.

    Of two gates f = sigmoid(k_f), i = sigmoid(k_i), scaled to sum to 1, the gate is i / (f + i),
    whose logit is log i - log f: never 0 / 0, however small the two are.
    """
    *gates, u = drive.split(width, dim=-1)
    if len(gates) == 1:
        return gates[0], u
    k_f, k_i = gates
    return F.softplus(-k_f) - F.softplus(-k_i), u


def gated_step(drive: Tensor, h: Tensor, candidate: str = "positive") -> Tensor:
    """One step of `gated_scan`.  drive: (B, 2 H) or (B, 3 H), h: (B, H) -> (B, H)."""
    rows, width = h.shape
    if drive.shape in ((rows, 2 * width), (rows, 3 * width)):
        if backend.for_step(drive, h):
            return _step(drive.contiguous(), h.contiguous(), candidate)
        if not torch.is_grad_enabled() and backend.of(drive, h) == "triton":
            return gated_scan(drive.unsqueeze(1), h, candidate)[1]
    exact = accumulator(drive, h)
    h = h.to(exact)
    k, u = split(drive.to(exact), h.shape[-1])
    return torch.sigmoid(-k) * h + torch.sigmoid(k) * candidate_value(u, candidate)


def gated_scan(drive: Tensor, h0: Tensor, candidate: str = "positive") -> tuple[Tensor, Tensor]:
    """Solve h_t = (1 - z_t) h_{t-1} + z_t g(u_t) for t = 1 .. T.

    drive: (B, T, 2 H), the gate's logits k and the candidates u before their activation g, side by
    side: z = sigmoid(k).  Or (B, T, 3 H), two gates' logits k_f, k_i, and u: z = i / (f + i) with
    f = sigmoid(k_f), i = sigmoid(k_i).  h0: (B, H).
    Returns h: (B, T, H) in the drive's dtype, and h_T: (B, H), a copy, in float32 (float64 where
    an input is), the dtype the state is carried in.  Raises ShapeError when shapes disagree.
    Computed in linear space: a state that is a convex combination cannot overflow, and the error
    does not grow with T as it does in the paper's log-space form.
    Source: Feng et al., Were RNNs All We Needed?, arXiv 2410.01201, appendices A and B.
    """
    assert candidate in CANDIDATES, candidate
    batch, time, parts = drive.shape if drive.ndim == 3 else (None, 0, 0)
    width = h0.shape[-1]
    if h0.shape != (batch, width) or parts not in (2 * width, 3 * width) or time < 1:
        raise ShapeError(
            "A gated scan takes a drive (B, T, 2 H) or (B, T, 3 H) with T >= 1 and a state (B, H); "
            f"it was given {tuple(drive.shape)} and {tuple(h0.shape)}."
        )
    h0 = h0.to(accumulator(drive, h0))
    if backend.of(drive, h0) == "reference":
        h = _reference.fold(lambda at_t, h: gated_step(at_t, h, candidate), (drive,), h0)
        return h.to(drive.dtype), h[:, -1].clone()
    return _GatedScan.apply(drive, h0, candidate)


def _step(drive: Tensor, h: Tensor, candidate: str) -> Tensor:
    _cpu = backend.loops()
    new, (rows, width) = torch.empty_like(h), h.shape
    sizes = rows, drive.shape[1] // width, width
    _cpu.step(_cpu.step_gated, (drive, h, new), *sizes, candidate == "positive")
    return new


class _GatedScan(torch.autograd.Function):
    """Keeps only the drive and h: the activations are computed again on the way back."""

    @staticmethod
    def forward(ctx, drive: Tensor, h0: Tensor, candidate: str) -> tuple[Tensor, Tensor]:
        ctx.candidate, ctx.backend = candidate, backend.of(drive, h0)
        if ctx.backend == "cpu":
            _cpu = backend.loops()
            drive, h0 = drive.contiguous(), h0.contiguous()
            h, last = drive.new_empty(*drive.shape[:2], h0.shape[1]), torch.empty_like(h0)
            given = drive, h0, h, last, candidate == "positive"
            _cpu.run(_cpu.gated_forward, *h0.shape, *given)
        elif ctx.backend == "triton":
            drive, h0 = drive.contiguous(), h0.contiguous()
            h, last = backend.kernels().scan(drive, drive, h0, candidate == "positive")
        else:
            k, u = split(drive.to(h0.dtype), h0.shape[1])
            g = candidate_value(u, candidate)
            h = _torch.scan(torch.sigmoid(-k), torch.sigmoid(k) * g, h0)
            last = h[:, -1].clone()
            h = h.to(drive.dtype)
        ctx.save_for_backward(drive, h, h0)
        return h, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor, None]:
        drive, h, h0 = ctx.saved_tensors
        if ctx.backend == "cpu":
            _cpu = backend.loops()
            d_drive, dh0 = torch.empty_like(drive), torch.empty_like(h0)
            given = drive, h0, h, dh.contiguous(), dlast.contiguous(), d_drive, dh0
            _cpu.run(_cpu.gated_backward, *h0.shape, *given, ctx.candidate == "positive")
            return d_drive, dh0, None
        if ctx.backend == "triton":
            given = drive, drive, h0, h, dh.contiguous(), dlast.contiguous()
            positive = ctx.candidate == "positive"
            d_drive, _, dh0 = backend.kernels().scan_gradients(*given, positive)
            return d_drive, dh0, None
        exact = drive.to(h0.dtype)
        k, u = split(exact, h0.shape[1])
        z, keep = torch.sigmoid(k), torch.sigmoid(-k)
        dh = dh.to(h0.dtype, copy=True)
        dh[:, -1] += dlast
        total = _torch.scan_backward(keep, dh)  # dL/dh_t over every path from t on
        g = candidate_value(u, ctx.candidate)
        slope = 1.0
        if ctx.candidate == "positive":
            slope = torch.where(u >= 0, 1.0, g * (1 - g))
        dk, du = total * (g - before(h.to(h0.dtype), h0)) * z * keep, total * z * slope
        parts = [dk, du]
        if drive.shape[-1] == 3 * h0.shape[1]:
            k_f, k_i, _ = exact.split(h0.shape[1], dim=-1)
            parts = [-dk * torch.sigmoid(-k_f), dk * torch.sigmoid(-k_i), du]
        return torch.cat(parts, dim=-1).to(drive.dtype), keep[:, 0] * total[:, 0], None
