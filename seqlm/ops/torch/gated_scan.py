"""The gated scan in chunks of time.

Keeps only the drive and h; the backward pass computes the activations again.
"""

# B batch, T time, H state width

import torch
from torch import Tensor

from seqlm.ops.gated_scan import candidate_value, gate_and_candidate
from seqlm.ops.states import Tensors, before
from seqlm.ops.torch.scans import scan, scan_backward


def forward(drive: Tensor, h0: Tensor, candidate: str) -> tuple[Tensors, Tensors]:
    k, u = gate_and_candidate(drive.to(h0.dtype), h0.shape[1])
    # sigmoid(-k) and not 1 - sigmoid(k), which loses digits where the gate is nearly 1
    h = scan(torch.sigmoid(-k), torch.sigmoid(k) * candidate_value(u, candidate), h0)
    last = h[:, -1].clone()
    h = h.to(drive.dtype)
    return (h, last), (drive, h, h0)


def backward(saved: Tensors, gradients: Tensors, candidate: str) -> Tensors:
    drive, h, h0 = saved
    dh, d_last = gradients
    exact = drive.to(h0.dtype)
    k, u = gate_and_candidate(exact, h0.shape[1])
    z, keep = torch.sigmoid(k), torch.sigmoid(-k)
    dh = dh.to(h0.dtype, copy=True)
    dh[:, -1] += d_last
    total = scan_backward(keep, dh)  # the complete dL/dh_t
    g = candidate_value(u, candidate)
    slope: Tensor | float = 1.0
    if candidate == "positive":
        slope = torch.where(u >= 0, 1.0, g * (1 - g))
    dk, du = total * (g - before(h.to(h0.dtype), h0)) * z * keep, total * z * slope
    parts = [dk, du]
    if drive.shape[-1] == 3 * h0.shape[1]:
        k_f, k_i, _ = exact.split(h0.shape[1], dim=-1)
        parts = [-dk * torch.sigmoid(-k_f), dk * torch.sigmoid(-k_i), du]
    return torch.cat(parts, dim=-1).to(drive.dtype), keep[:, 0] * total[:, 0]
