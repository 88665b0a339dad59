"""h_t = a_t h_{t-1} + b_t in about 3 sqrt(T) PyTorch calls instead of T.

Gates are numbers, or 2 x 2 blocks of them: then a is (B, T, 2, 2, H), b is (B, T, 2, H), and so on.
"""

# B batch, T time, H state width, C chunks, L chunk length

from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor

from seqlm.ops.states import before

Scan = Callable[[Tensor, Tensor, Tensor], Tensor]  # a, b, h0 -> h


def scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t; a, b (B, T, H), h0 (B, H), all of one dtype -> h (B, T, H).

    Time is cut into chunks that run side by side.  A first pass finds the linear function that maps
    a chunk's start to its end, a short loop over chunks finds the starts, and a second pass writes
    h.  There is no division and no logarithm, so products of gates may underflow to 0 safely.
    """
    time = b.shape[1]
    length = isqrt(time)
    chunks = time // length
    whole = chunks * length
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    a_c, b_c, h_c = (x[:, :whole].unflatten(1, (chunks, length)) for x in (a, b, h))

    # (B, C, H) each: a chunk ends in factor * start + offset
    factor, offset = a_c[:, :, 0].clone(), b_c[:, :, 0].clone()
    for t in range(1, length):
        factor = _product(a_c[:, :, t], factor, offset)
        offset = advance(a_c[:, :, t], offset, b_c[:, :, t])

    starts = torch.empty_like(offset)
    start = h0
    for c in range(chunks):
        starts[:, c] = start
        start = advance(factor[:, c], start, offset[:, c])

    for t in range(length):
        starts = advance(a_c[:, :, t], starts, b_c[:, :, t])
        h_c[:, :, t] = starts
    start = h[:, whole - 1]
    for t in range(whole, time):
        start = advance(a[:, t], start, b[:, t])
        h[:, t] = start
    return h


def scan_backward(a: Tensor, dh: Tensor, scan: Scan = scan) -> Tensor:
    """The complete dL/dh_t: d_t = dh_t + a_{t+1}' d_{t+1}, (B, T, H).

    dh: dL/dh_t through the output alone.  The recurrence is a scan from the last step to the first,
    whose gates are shifted by one step.
    """
    return scan(*reversed_gates(a, dh), torch.zeros_like(dh[:, 0])).flip(1)


def input_gradients(a: Tensor, h: Tensor, h0: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """dL/da and dL/dh0; total: the complete dL/dh_t."""
    old = before(h, h0)
    if a.ndim == h.ndim:
        return total * old, a[:, 0] * total[:, 0]
    return total.unsqueeze(3) * old.unsqueeze(2), (a[:, 0] * total[:, 0].unsqueeze(2)).sum(1)


def reversed_gates(a: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """The gates and inputs of that scan, both in reversed time; blocks are transposed."""
    later = torch.zeros_like(a)
    later[:, :-1] = a[:, 1:] if a.ndim == dh.ndim else a[:, 1:].transpose(2, 3)
    return later.flip(1), dh.flip(1)


def advance(a: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """a h + b."""
    if a.ndim == h.ndim:
        return torch.addcmul(b, a, h)
    return b + (a * h.unsqueeze(-3)).sum(-2)


def _product(a: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """a factor, a product of numbers, or of blocks where a has more dimensions than the offset."""
    if a.ndim == offset.ndim:
        return a * factor
    return (a.unsqueeze(-2) * factor.unsqueeze(-4)).sum(-3)
