"""The matrix scan in chunks of time: products of matrices within a chunk, a loop over chunks."""

# B batch, T time, H heads, K key width, V value width, N chunks, L chunk length, W half a block

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlm.ops.states import Tensors

LONGEST = 16  # steps of a chunk, a power of 2


def serves(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, S0: Tensor) -> bool:
    return q.shape[1] > 1  # one step is no chunk


def forward(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, S0: Tensor) -> tuple[Tensors, Tensors]:
    with torch.autocast(q.device.type, enabled=False):
        q_c, k_c, v_c, log_a_c = (in_chunks(x.to(S0.dtype)) for x in (q, k, v, log_a))
        o, last = scan(q_c, k_c, v_c, log_a_c, S0)
    return (o.flatten(2, 3)[:, :, : q.shape[1]].transpose(1, 2).to(v.dtype), last), ()


def in_chunks(x: Tensor, longest: int = LONGEST) -> Tensor:
    """(B, T, H, S) -> (B, H, N, L, S); zeros, which change no state, fill the last chunk."""
    length = min(longest, 1 << (x.shape[1] - 1).bit_length())
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % length))
    return x.unflatten(2, (-1, length))


def scan(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, S0: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, log_a: (B, H, N, L, K), v: (B, H, N, L, V) -> o: (B, H, N, L, V) and S_T."""
    scores, start, end = within_blocks(q, k, log_a)
    added = (k * end.exp()).mT @ v  # (B, H, N, K, V), what a chunk adds to the state
    kept = start[..., -1, :].exp().unsqueeze(-1)  # (B, H, N, K, 1), what it leaves of it
    S, before = S0, []
    for kept_n, added_n in zip(kept.unbind(2), added.unbind(2), strict=True):
        before.append(S)
        S = torch.addcmul(added_n, kept_n, S)
    return scores @ v + (q * start.exp()) @ torch.stack(before, dim=2), S


def within_blocks(q: Tensor, k: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each step of a chunk sees of the others, (B, H, N, L, L), and the logarithms of the
    decay since the chunk's start, its own included, and of the decay until the chunk's end.

    Two blocks of W steps become one of 2 W steps.  Step i of the second block sees step j of the
    first as q_i' diag(a_{j+1} ... a_i) k_j.  The decay is the product of two: from j to the end of
    the first block, and from the start of the second to i.  Neither is above 1, so nothing
    overflows, and no decay is divided by another.
    """
    half, length = 1, q.shape[-2]
    scores = (q * k).sum(-1)[..., None, None]  # (B, H, N, L / W, W, W)
    start, end = log_a.unsqueeze(-2), torch.zeros_like(log_a).unsqueeze(-2)  # (..., L / W, W, K)
    while half < length:
        start_1, start_2 = pairs(start)
        end_1, end_2 = pairs(end)
        scores_1, scores_2 = pairs(scores)
        k_1 = k.unflatten(3, (-1, 2, half))[:, :, :, :, 0] * end_1.exp()
        q_2 = q.unflatten(3, (-1, 2, half))[:, :, :, :, 1] * start_2.exp()
        seen = q_2 @ k_1.mT
        first = torch.cat([scores_1, torch.zeros_like(seen)], dim=-1)  # nothing of the future
        scores = torch.cat([first, torch.cat([seen, scores_2], dim=-1)], dim=-2)
        start, end = (
            torch.cat([start_1, start_2 + start_1[..., -1:, :]], dim=-2),
            torch.cat([end_1 + start_2[..., -1:, :], end_2], dim=-2),
        )
        half *= 2
    return scores.squeeze(3), start.squeeze(3), end.squeeze(3)


def pairs(blocks: Tensor) -> tuple[Tensor, ...]:
    """(B, H, N, 2 M, ...) -> every first and every second block, (B, H, N, M, ...) each."""
    return blocks.unflatten(3, (-1, 2)).unbind(4)
