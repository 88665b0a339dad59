"""attention: causal self-attention over a sliding window, a baseline with a large state.

Every character attends to itself and the context - 1 characters before it: softmax(q k / sqrt(S)) v
in each head, with rotary positions.

Source: Vaswani et al., Attention Is All You Need, 2017; Su et al., RoFormer, 2021 (positions);
Beltagy et al., Longformer, 2020 (the window).
"""

# B batch, T time, D model width, H heads, S width of a head, E = H S, W window

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlm.cells._contract import Cell, State
from seqlm.errors import UsageError
from seqlm.ops import Linear

BASE = 10000.0  # base of the wavelengths of rotary positions
LARGEST_CONTEXT = 65536  # characters
HEAD_WIDTH = 64  # default width of a head


class Attention(Cell):
    """The state is the window's keys and values, (B, W, E) each, and their number, (B, 1).

    context: width of the window, in characters.
    heads: number of heads; 0 chooses it so that a head has a width near 64.  A head's width is
    D / heads, rounded to an even number.
    """

    over_time = "parallel, O(T window)"
    group = "attention"

    def __init__(self, width: int, *, context: int = 256, heads: int = 0):
        super().__init__()
        heads = heads or max(1, round(width / HEAD_WIDTH))
        if not 1 <= 2 * heads <= max(width, 2):
            raise UsageError(f"cell.heads is {heads}; it must be from 1 to {max(1, width // 2)}.")
        if not 1 <= context <= LARGEST_CONTEXT:
            raise UsageError(
                f"cell.context is {context}; it must be from 1 to {LARGEST_CONTEXT:,}."
            )
        self.heads, self.context = heads, context
        self.inner = heads * max(2, 2 * round(width / heads / 2))  # rotary positions need pairs
        self.inputs = Linear(width, 3 * self.inner, parts=3)
        self.outputs = Linear(self.inner, width)

    def initial_state(self, batch: int) -> State:
        shape = batch, self.context, self.inner
        keys, values = (self.zeros(batch, self.context * self.inner).view(shape) for _ in range(2))
        return keys, values, self.zeros(batch, 1)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.initial_state(len(x)) if state is None else state
        time, window = x.shape[1], self.context
        q, k, v = self.inputs(x).chunk(3, dim=-1)
        old_k, old_v, seen = state
        k, v = (torch.cat([o.to(n.dtype), n], dim=1) for o, n in ((old_k, k), (old_v, v)))
        ends = tuple(s[:, time:].to(o.dtype, copy=True) for s, o in ((k, old_k), (v, old_v)))
        # a block of W characters needs only its own keys and the W before: memory is O(T W)
        blocks = -(-time // window)  # rounded up
        y = torch.cat(
            [
                self._attend(
                    q[:, i : i + window],
                    k[:, i : i + 2 * window],
                    v[:, i : i + 2 * window],
                    window - seen if i == 0 else torch.zeros_like(seen),
                )
                for i in range(0, blocks * window, window)
            ],
            dim=1,
        )
        return self.outputs(y.to(x.dtype)).to(x.dtype), (*ends, (seen + time).clamp(max=window))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, empty: Tensor) -> Tensor:
        """q: (B, T, E), T <= W -> (B, T, E); k, v: (B, W + T, E), the W characters before first.

        empty: (B, 1), how many of the first keys belong to no character.
        """
        time, window = q.shape[1], self.context
        places = torch.arange(window + time, device=q.device)
        at = places[window:, None]
        near = (places <= at) & (places > at - window)  # (T, W + T)
        known = (places >= empty)[:, None, None]  # (B, 1, 1, W + T)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        q, k = _rotated(q, places[window:]), _rotated(k, places)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=near & known)
        return y.transpose(1, 2).flatten(2)


def _rotated(x: Tensor, places: Tensor) -> Tensor:
    """x: (B, H, T, S) with rotary positions: each pair is rotated in proportion to its place."""
    half = x.shape[-1] // 2
    exact = torch.promote_types(x.dtype, torch.float32)
    rates = BASE ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    angles = places.to(exact)[:, None] * rates
    cos, sin = angles.cos(), angles.sin()
    a, b = x.to(exact).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
