"""What the cells share whose state is a matrix for each head: their base class, and a decay."""

# B batch, T time, D model width, H heads, K key width, V value width

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm import ops
from seqlm.cells._contract import Cell, State
from seqlm.cells._ssm import before_softplus, log_step_sizes
from seqlm.errors import UsageError
from seqlm.ops import Linear

HEAD_WIDTH = 64  # default width of a head's values


class MatrixCell(Cell):
    """Heads with a state (K, V) each, and an output layer behind their norms.

    heads: number of heads; 0 chooses it so that V is near 64.  V is D / heads, rounded.
    key_share: K / V, rounded to whole keys.
    The state's first part is (B, H, K, V).  `forward` also computes single steps.
    """

    over_time = "parallel in chunks"
    group = "attention"

    def __init__(self, width: int, heads: int, key_share: float = 1.0):
        super().__init__()
        self.heads = heads or max(1, round(width / HEAD_WIDTH))
        if not 1 <= self.heads <= width:
            raise UsageError(
                f"cell.heads is {heads}; it must be from 1 to {width}, the model's width, or 0."
            )
        self.values = round(width / self.heads)
        self.keys = max(1, round(key_share * self.values))
        self.norm = nn.Parameter(torch.ones(self.values))
        self.outputs = Linear(self.heads * self.values, width)

    def initial_state(self, batch: int) -> State:
        shape = batch, self.heads, self.keys, self.values
        return (self.zeros(batch, self.heads * self.keys * self.values).view(shape),)

    def in_heads(self, x: Tensor) -> Tensor:
        """(..., H S) -> (..., H, S)"""
        return x.unflatten(-1, (self.heads, -1))

    def readout(self, o: Tensor, gate: Tensor) -> Tensor:
        """o: (B, T, H, V), gate: (B, T, H V) -> (B, T, D); each head is normed by itself."""
        o = ops.rms_norm(o.to(self.norm.dtype), self.norm)  # autocast rounds only in products
        return self.outputs(o.flatten(2) * gate)


class HeadDecay(nn.Module):
    """One decay for each head: a = exp(-A d) with d = softplus(z + c).

    A starts from U(1, 16), and c so that d is between 0.001 and 0.1, as in Mamba-2's code.
    Source: Dao and Gu, Transformers are SSMs, arXiv 2405.21060.
    """

    def __init__(self, heads: int):
        super().__init__()
        self.bias = nn.Parameter(before_softplus(log_step_sizes(heads).exp()))  # c
        self.log_A = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z: (..., H), in the state's dtype -> log a and d, (..., H, 1) each."""
        d = F.softplus(z + self.bias.to(z.dtype))
        log_a = -torch.exp(self.log_A.to(z.dtype)) * d
        return log_a.unsqueeze(-1), d.unsqueeze(-1)
