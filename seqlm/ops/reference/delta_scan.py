"""S_t = a_t (I - beta_t k_t k_t') S_{t-1} + beta_t k_t v_t', o_t = S_t' q_t, step by step."""

import torch
from torch import Tensor

from seqlm.ops.states import Tensors


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, beta: Tensor, S0: Tensor
) -> tuple[Tensors, Tensors]:
    S, outputs = S0, []
    exact = (x.to(S0.dtype).unbind(1) for x in (q, k, v, log_a, beta))
    for q_t, k_t, v_t, log_a_t, beta_t in zip(*exact, strict=True):  # (B, H, K), v_t: (B, H, V)
        S = log_a_t.exp().unsqueeze(-1) * S
        held = (k_t.unsqueeze(-1) * S).sum(-2)
        S = S + k_t.unsqueeze(-1) * (beta_t * (v_t - held)).unsqueeze(-2)
        outputs.append((q_t.unsqueeze(-1) * S).sum(-2))
    return (torch.stack(outputs, dim=1).to(v.dtype), S), ()
