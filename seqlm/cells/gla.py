"""GLA: gated linear attention, whose state is a matrix that forgets by gates of the input.

    S_t = diag(a_t) S_{t-1} + k_t v_t',   o_t = S_t' q_t      for each head
    a_t = sigmoid(W_2 W_1 x_t + b)^(1/16),   y_t = W_o (norm(o_t) silu(r_t)),   [q, k, v, r] = W x

key = "tied" takes k_t = 1 - a_t: what a row of S forgets, it learns.  decay = "scalar" has one
decay a head and scales what is added:

    a_t = exp(-A d_t),   S_t = a_t S_{t-1} + d_t k_t v_t',   d_t = softplus(w x_t + c)

Source: Yang et al., Gated Linear Attention Transformers, arXiv 2312.06635, section 4.4.  Tied keys:
Qin et al., HGRN2, arXiv 2404.07904.  Scalar decay: Dao and Gu, Transformers are SSMs (Mamba-2),
arXiv 2405.21060.
"""

# B batch, T time, D model width, H heads, K key width, V value width

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlm import ops
from seqlm.cells._contract import State
from seqlm.cells._matrix import HeadDecay, MatrixCell
from seqlm.errors import UsageError
from seqlm.ops import Linear

TEMPERATURE = 16  # a root of the gate, so that it starts near 1
RANK = 16  # of the matrix of the gates
KEY_SHARE = 0.5  # K / V


class GLA(MatrixCell):
    """Gated linear attention with H heads, K = V / 2.  The state is S: (B, H, K, V).

    Matrices start as nn.Linear does; A from U(1, 16), and c so that d is between 0.001 and 0.1, as
    in Mamba-2's code.

    heads: number of heads; 0 chooses it so that V is near 64.  V is D / heads, rounded.
    decay: "vector" (a number for each key) or "scalar" (one for the head).
    key: "free", or "tied" to a vector decay.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 0,
        decay: Literal["vector", "scalar"] = "vector",
        key: Literal["free", "tied"] = "free",
    ):
        super().__init__(width, heads, KEY_SHARE)
        if (decay, key) == ("scalar", "tied"):
            raise UsageError(
                "cell.key is tied, but a scalar decay gives no keys. Set cell.decay to vector, or "
                "cell.key to free."
            )
        self.decay, self.key = decay, key
        inner, keys = self.heads * self.values, self.heads * self.keys
        self.inputs = Linear(width, 2 * inner, bias=False, parts=2)  # r, v
        pair = 2 if key == "free" else 1  # q, k; or q
        self.queries = Linear(width, pair * keys, bias=False, parts=pair)
        self.gates = Linear(width, RANK if decay == "vector" else self.heads, bias=False)
        self.decays = Linear(RANK, keys) if decay == "vector" else HeadDecay(self.heads)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        (S,) = self.initial_state(len(x)) if state is None else state
        r, v = self.inputs(x).chunk(2, dim=-1)
        log_a, d = self.log_decay(x, S.dtype)
        v = self.in_heads(v) if d is None else self.in_heads(v) * d.to(v.dtype)
        q, *k = (self.in_heads(y) for y in self.queries(x).chunk(self.queries.parts, dim=-1))
        o, S = ops.matrix_scan(q, k[0] if k else -torch.expm1(log_a), v, log_a, S)
        return self.readout(o, F.silu(r)).to(x.dtype), (S,)

    def log_decay(self, x: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """log a: (..., H, K) or (..., H, 1), in the dtype `exact`; and d of a scalar decay."""
        z = self.gates(x)
        if self.decay == "vector":
            return -F.softplus(-self.in_heads(self.decays(z).to(exact))) / TEMPERATURE, None
        log_a, d = self.decays(z.to(exact))
        return log_a, d

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        return {"S": self.log_decay(x, state[0].dtype)[0].exp().flatten(1)}
