"""mLSTM: xLSTM's cell with a matrix as its memory and exponential input gates.

    C_t = f_t C_{t-1} + i_t k_t v_t',   n_t = f_t n_{t-1} + i_t k_t      for each head
    h_t = C_t' q_t / max(|n_t' q_t|, 1),   y_t = W_o (sigmoid(r_t) norm(h_t))
    i_t = exp(w_i x_t + b_i),   f_t = sigmoid(w_f x_t + b_f),   [q, k, v, r] = W x + b

The keys are divided by sqrt(K).  As i has no upper bound, the state holds C exp(-m) and n exp(-m):

    m_t = max(log f_t + m_{t-1}, log i_t),   f and i times exp(m_{t-1} - m_t) and exp(-m_t)

h does not depend on m, and no number of the state overflows.

Source: Beck et al., xLSTM: Extended Long Short-Term Memory, arXiv 2405.04517, section 2.3 and
appendix A.3; the norm of each head and the initial gates: the authors' code.
"""

# B batch, T time, D model width, H heads, K key width, which is the values' too

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm import ops
from seqlm.cells._contract import State
from seqlm.cells._matrix import MatrixCell
from seqlm.ops import Linear

FORGET_BIASES = 3.0, 6.0  # of the first and of the last head, which start at f = 0.95 and 0.998
SMALLEST_M = -80.0  # exp(-m) must not overflow: below it, h is 0 up to rounding


class MLSTM(MatrixCell):
    """The state is C and n side by side, (B, H, K, V + 1), and m: (B, H, 1).

    Matrices start as nn.Linear does, but those of the gates at 0.  b_f starts from 3 to 6 over the
    heads, b_i near 0.

    heads: number of heads; 0 chooses it so that V is near 64.  V is D / heads, rounded.
    """

    def __init__(self, width: int, *, heads: int = 0):
        super().__init__(width, heads)
        self.inputs = Linear(width, 4 * self.heads * self.values, parts=4)
        self.gates = Linear(width, 2 * self.heads)
        with torch.no_grad():
            nn.init.zeros_(self.gates.weight)
            forget, inputs = self.gates.bias.chunk(2)
            forget.copy_(torch.linspace(*FORGET_BIASES, self.heads))
            nn.init.normal_(inputs, std=0.1)

    def initial_state(self, batch: int) -> State:
        size = self.heads * self.keys * (self.values + 1)
        C = self.zeros(batch, size).view(batch, self.heads, self.keys, self.values + 1)
        return C, self.zeros(batch, self.heads).unsqueeze(-1)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        C, m0 = self.initial_state(len(x)) if state is None else state
        q, k, v, r = self.inputs(x).chunk(4, dim=-1)
        log_f, log_i = self.log_gates(x, C.dtype)
        m = stabiliser(log_f, log_i, m0)
        before = torch.cat([m0.unsqueeze(1), m[:, :-1]], dim=1)
        q, k, v = (self.in_heads(y) for y in (q, k, v))
        k = k * (torch.exp(log_i - m) * self.keys**-0.5)
        v = torch.cat([v.to(m.dtype), torch.ones_like(m)], dim=-1)  # the column of ones makes n
        o, C = ops.matrix_scan(q, k, v, log_f + before - m, C)
        h = o[..., :-1] / torch.maximum(o[..., -1:].abs(), torch.exp(-m.clamp(min=SMALLEST_M)))
        return self.readout(h, torch.sigmoid(r)).to(x.dtype), (C, m[:, -1].clone())

    def log_gates(self, x: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor]:
        """log f and log i, (..., H, 1) each, in the dtype `exact`."""
        f, i = self.gates(x).to(exact).unsqueeze(-1).chunk(2, dim=-2)
        return -F.softplus(-f), i

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        return {"C": self.log_gates(x, state[0].dtype)[0].exp().squeeze(-1)}


def stabiliser(log_f: Tensor, log_i: Tensor, m0: Tensor) -> Tensor:
    """m_t = max(log f_t + m_{t-1}, log i_t); log_f, log_i: (B, T, H, 1), m0: (B, H, 1).

    With F_t, the sum of log f up to t, m_t - F_t is the maximum of log i_s - F_s over s <= t.
    """
    m0 = m0.unsqueeze(1)
    if log_f.shape[1] == 1:  # a step has only operators that can be exported
        return torch.maximum(log_f + m0, log_i)
    total = log_f.cumsum(1)
    return total + torch.maximum(m0, (log_i - total).cummax(1).values)
