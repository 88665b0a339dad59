"""The delta scan in chunks of time: a triangular system within a chunk, a loop over chunks.

A step adds k_t u_t' to the decayed state, where u_t is beta_t times v_t less what the state holds
for k_t.  Within a chunk that depends on the steps before it, which is a triangular system for all
u, and on the state S before the chunk.  The solution is X - W S; X and W do not depend on S.

Source: Yang et al., Parallelizing Linear Transformers with the Delta Rule, arXiv 2406.06484; with
decays: Yang et al., Gated Delta Networks, arXiv 2412.06464.
"""

# B batch, T time, H heads, K key width, V value width, N chunks, L chunk length

import torch
from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.ops.torch.matrix_scan import in_chunks

LONGEST = 32  # steps of a chunk, a power of 2


def serves(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, beta: Tensor, S0: Tensor) -> bool:
    return q.shape[1] > 1  # one step is no chunk


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, beta: Tensor, S0: Tensor
) -> tuple[Tensors, Tensors]:
    with torch.autocast(q.device.type, enabled=False):
        q_c, k_c, v_c, log_a_c, beta_c = (
            in_chunks(x.to(S0.dtype), LONGEST) for x in (q, k, v, log_a, beta)
        )
        o, last = scan(q_c, k_c, v_c, log_a_c, beta_c, S0)
    return (o.flatten(2, 3)[:, :, : q.shape[1]].transpose(1, 2).to(v.dtype), last), ()


def scan(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, beta: Tensor, S0: Tensor
) -> tuple[Tensor, Tensor]:
    """q, k: (B, H, N, L, K), v: (B, H, N, L, V), log_a, beta: (B, H, N, L, 1) -> o, as v; S_T."""
    decays, start, end = decays_of(log_a)
    held = beta * decays * (k @ k.mT)
    right = beta * torch.cat([v, k * start.exp()], dim=-1)
    # unitriangular: the diagonal is read as 1.  The numbers of the inverse are not above 1 for keys
    # not longer than 1, so that a product with it is exact enough, and faster than a wide solution
    eye = torch.eye(held.shape[-1], dtype=held.dtype, device=held.device)
    inverse = torch.linalg.solve_triangular(held, eye, upper=False, unitriangular=True)
    solved = inverse @ right
    X, W = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    kept = start[..., -1:, :].exp()  # (B, H, N, 1, 1), what a chunk leaves of the state
    by = (k * end.exp()).mT
    S, before, added = S0, [], []
    for X_n, W_n, kept_n, by_n in zip(*(y.unbind(2) for y in (X, W, kept, by)), strict=True):
        before.append(S)
        added.append(X_n - W_n @ S)
        S = kept_n * S + by_n @ added[-1]
    earlier = (q * start.exp()) @ torch.stack(before, dim=2)
    return earlier + (decays * (q @ k.mT)) @ torch.stack(added, dim=2), S


def decays_of(log_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The decays from step j to step i of a chunk, (B, H, N, L, L), 0 for j > i; and the logarithms
    of the decay since the chunk's start, its own included, and of the decay until its end.

    log_a: (B, H, N, L, 1).  Each decay is a sum of its own steps only, so that no digits cancel.
    """
    length = log_a.shape[-2]
    total = log_a.expand(*log_a.shape[:-1], length).tril(-1).cumsum(-2)
    return total.exp().tril(), log_a.cumsum(-2), total[..., -1, :].unsqueeze(-1)
