"""DeltaNet: the gated delta rule, whose state is a matrix that corrects what it holds for a key.

    S_t = a_t (I - beta_t k_t k_t') S_{t-1} + beta_t k_t v_t',   o_t = S_t' q_t      for each head
    q_t = unit(silu(W_q x_t)),   k_t = unit(silu(W_k x_t)),   v_t = silu(W_v x_t)
    beta_t = sigmoid(w_beta x_t),   a_t = exp(-A softplus(w_a x_t + c))
    y_t = W_o (norm(o_t) silu(W_r x_t))

unit(x) = x / |x| in each head.  The published layer has a convolution over 4 characters before each
silu; here the block has one (model.conv = 4).

Source: Yang et al., Gated Delta Networks, arXiv 2412.06464, section 3.
"""

# B batch, T time, D model width, H heads, K key width, which is the values' too

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlm import ops
from seqlm.cells._contract import State
from seqlm.cells._matrix import HeadDecay, MatrixCell
from seqlm.ops import Linear

EPSILON = 1e-6  # added to |x|^2, as in the authors' code


class DeltaNet(MatrixCell):
    """The gated delta rule with H heads, K = V.  The state is S: (B, H, K, V).

    Matrices start as nn.Linear does; A from U(1, 16), and c so that softplus(c) is between 0.001
    and 0.1, as in Mamba-2's code.

    heads: number of heads; 0 chooses it so that V is near 64.  V is D / heads, rounded.
    """

    def __init__(self, width: int, *, heads: int = 0):
        super().__init__(width, heads)
        self.inputs = Linear(width, 4 * self.heads * self.values, bias=False, parts=4)  # r, q, k, v
        self.gates = Linear(width, 2 * self.heads, bias=False)  # of beta and of a
        self.decay = HeadDecay(self.heads)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        (S,) = self.initial_state(len(x)) if state is None else state
        r, *qkv = F.silu(self.inputs(x)).chunk(4, dim=-1)
        q, k, v = (self.in_heads(y) for y in qkv)
        beta, a = self.gates(x).to(S.dtype).chunk(2, dim=-1)
        log_a, _ = self.decay(a)
        o, S = ops.delta_scan(unit(q), unit(k), v, log_a, torch.sigmoid(beta).unsqueeze(-1), S)
        return self.readout(o, r).to(x.dtype), (S,)

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        _, a = self.gates(x).to(state[0].dtype).chunk(2, dim=-1)
        return {"S": self.decay(a)[0].exp().squeeze(-1)}


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPSILON)
