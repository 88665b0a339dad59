"""The gated scan that minGRU and minLSTM share: activations and recurrence in one op."""

# B batch, T time, H state width

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlm.errors import ShapeError
from seqlm.ops.dispatch import Op
from seqlm.ops.states import state_dtype

CANDIDATES = ("positive", "linear")

_scan, _step = Op("gated_scan"), Op("gated_step")


def candidate_value(u: Tensor, candidate: str) -> Tensor:
    """g(u): u + 1/2 for u >= 0 and sigmoid(u) below ("positive"), or u itself ("linear").

    Source: Feng et al., Were RNNs All We Needed?, arXiv 2410.01201, appendices A and B.
    """
    return u if candidate == "linear" else torch.where(u >= 0, u + 0.5, torch.sigmoid(u))


def gate_and_candidate(drive: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The gate's logit and the candidate, each (..., H), from a drive in float32 or float64.

    Two gates f = sigmoid(k_f) and i = sigmoid(k_i), scaled to sum to 1, are one gate i / (f + i),
    whose logit is log i - log f.  The logit is finite where f and i underflow to 0.
    """
    *gates, u = drive.split(width, dim=-1)
    if len(gates) == 1:
        return gates[0], u
    k_f, k_i = gates
    return F.softplus(-k_f) - F.softplus(-k_i), u


def gated_step(drive: Tensor, h: Tensor, candidate: str = "positive") -> Tensor:
    """One step of `gated_scan`.  drive: (B, 2 H) or (B, 3 H), h: (B, H) -> (B, H)."""
    (new,) = _step(drive, h, candidate=candidate)
    return new


def gated_scan(drive: Tensor, h0: Tensor, candidate: str = "positive") -> tuple[Tensor, Tensor]:
    """Solve h_t = (1 - z_t) h_{t-1} + z_t g(u_t) for t = 1 .. T.

    drive: (B, T, 2 H), the gate's logits k and the candidates u side by side, with z = sigmoid(k);
    or (B, T, 3 H), the logits k_f and k_i of two gates and u, with z = i / (f + i),
    f = sigmoid(k_f), i = sigmoid(k_i).  g is `candidate_value`.  h0: (B, H).
    Returns h: (B, T, H) in the drive's dtype, and h_T: (B, H), a copy, in float32 (float64 where
    an input is), the dtype the state is carried in.  Raises ShapeError when shapes disagree.
    It is computed in linear space: the state is a convex combination, which cannot overflow, and
    the error does not grow with T, unlike that of the paper's log-space form.
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
    h, last = _scan(drive, h0.to(state_dtype(drive, h0)), candidate=candidate)
    return h, last
