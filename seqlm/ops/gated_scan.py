"""The gated scan that minGRU and minLSTM share: activations and recurrence in one op."""

# B batch, T time, H state width

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqlm.ops import _reference, _torch, backend
from seqlm.ops.linear_scan import accumulator, before, check_shapes

CANDIDATES = ("positive", "linear")


def candidate_value(u: Tensor, candidate: str) -> Tensor:
    """g(u): u + 1/2 for u >= 0 and sigmoid(u) below ("positive"), or u itself ("linear").

    Source: Feng et al., Were RNNs All We Needed?, arXiv 2410.01201, appendices A and B.
    """
    return u if candidate == "linear" else torch.where(u >= 0, u + 0.5, torch.sigmoid(u))


def gated_step(k: Tensor, u: Tensor, h: Tensor, candidate: str = "positive") -> Tensor:
    """One step, h' = h + z (g(u) - h) with z = sigmoid(k).  k, u: (B, H), h: (B, H) -> (B, H)."""
    exact = accumulator(k, u, h)
    k, u, h = k.to(exact), u.to(exact), h.to(exact)
    return torch.sigmoid(-k) * h + torch.sigmoid(k) * candidate_value(u, candidate)


def gated_scan(
    k: Tensor, u: Tensor, h0: Tensor, candidate: str = "positive"
) -> tuple[Tensor, Tensor]:
    """Solve h_t = (1 - z_t) h_{t-1} + z_t g(u_t), z_t = sigmoid(k_t), for t = 1 .. T.

    k: (B, T, H) gate logits.  u: (B, T, H) candidates before their activation g.  h0: (B, H).
    Returns h: (B, T, H) in k's dtype, and h_T: (B, H), a copy, in float32 (float64 where an input
    is), the dtype the state is carried in.  Raises ShapeError when the shapes disagree.
    Computed in linear space: a state that is a convex combination cannot overflow, and the error
    does not grow with T as it does in the paper's log-space form.
    Source: Feng et al., Were RNNs All We Needed?, arXiv 2410.01201, appendices A and B.
    """
    assert candidate in CANDIDATES, candidate
    check_shapes(k, u, h0)
    exact = accumulator(k, u, h0)
    if backend.current() == "reference":
        h = _reference.fold(lambda *at_t: gated_step(*at_t, candidate), (k, u), h0.to(exact))
        return h.to(k.dtype), h[:, -1].clone()
    return _GatedScan.apply(k, u, h0.to(exact), candidate)


class _GatedScan(torch.autograd.Function):
    """Keeps only k, u and h: the activations are computed again on the way back."""

    @staticmethod
    def forward(ctx, k: Tensor, u: Tensor, h0: Tensor, candidate: str) -> tuple[Tensor, Tensor]:
        g = candidate_value(u.to(h0.dtype), candidate)
        z = torch.sigmoid(k.to(h0.dtype))
        h = _torch.scan(torch.sigmoid(-k.to(h0.dtype)), z.mul_(g), h0)
        last = h[:, -1].clone()
        h = h.to(k.dtype)
        ctx.save_for_backward(k, u, h, h0)
        ctx.candidate = candidate
        return h, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        k, u, h, h0 = ctx.saved_tensors
        u_ = u.to(h0.dtype)
        z, keep = torch.sigmoid(k.to(h0.dtype)), torch.sigmoid(-k.to(h0.dtype))
        dh = dh.to(h0.dtype, copy=True)
        dh[:, -1] += dlast
        total = _torch.scan_backward(keep, dh)  # dL/dh_t over every path from t on
        g = candidate_value(u_, ctx.candidate)
        dk = total * (g - before(h.to(h0.dtype), h0)) * z * keep
        dg = 1.0
        if ctx.candidate == "positive":
            dg = torch.where(u_ >= 0, 1.0, g * (1 - g))
        du = total * z * dg
        return dk.to(k.dtype), du.to(u.dtype), keep[:, 0] * total[:, 0], None
