"""aaren: attention with a constant query as a recurrence, whose state is an average of the past.

    s_t = q w_t / sqrt(S),   [w, v] = the keys and values of x      in each head of S units
    h_t = sum over j <= t of exp(s_j) v_j / sum over j <= t of exp(s_j)

The query q is learned and the same for every character, so one learned vector for each head takes
the place of q and the matrix of the keys: [s, v] = W x + b.  The paper's state is the largest score
m, the sum c of exp(s_j - m) and the weighted sum a.  Here it is l = m + log c and h = a / c:

    z_t = exp(s_t - l_t) = sigmoid(s_t - l_{t-1}),   l_t = log(exp(l_{t-1}) + exp(s_t))
    h_t = (1 - z_t) h_{t-1} + z_t v_t

No exponential overflows, since every z is at most 1, and h is a scan over time.  Nothing of the
past fades unless larger scores follow: after t characters z is about 1 / t.  So over a long text
the state hardly changes any more; train with train.state=reset, or on short documents.

Source: Feng et al., Attention as an RNN, arXiv 2405.13956, sections 3.1 to 3.3.
"""

# B batch, T time, D model width, H heads, S units of a head, E = H S

import torch
from torch import Tensor

from seqlm.cells._contract import Recurrence, State
from seqlm.errors import UsageError
from seqlm.ops import Linear, gated_scan

HEAD_WIDTH = 16  # default width of a head
EMPTY = -1e30  # l before the first character: the log of a weight that is 0 beside any other


class Aaren(Recurrence):
    """Aaren with heads of S = D / heads units, rounded, and a projection back to D.

    The state is h, (B, E), and l, (B, H), `total` in the code.  Matrices start as nn.Linear does.

    heads: number of heads; 0 chooses it so that S is near 16.  All units of a head share the
    weights of their average, so more heads remember more different things.
    """

    over_time = "parallel scan"
    group = "attention"

    def __init__(self, width: int, *, heads: int = 0):
        super().__init__()
        if not 0 <= heads <= width:
            raise UsageError(f"cell.heads is {heads}; it must be from 1 to {width}, or 0.")
        self.heads = heads or max(1, round(width / HEAD_WIDTH))
        self.units = max(1, round(width / self.heads))
        self.inner = self.heads * self.units
        self.inputs = Linear(width, self.heads + self.inner)
        self.outputs = Linear(self.inner, width)

    def initial_state(self, batch: int) -> State:
        return self.zeros(batch, self.inner), self.zeros(batch, self.heads) + EMPTY

    def project(self, x: Tensor) -> Tensor:
        return self.inputs(x)

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        h, total = state
        s, v = drive.to(h.dtype).split((self.heads, self.inner), dim=-1)
        h, v = h.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))
        h = torch.lerp(h, v, torch.sigmoid(s - total).unsqueeze(-1)).flatten(-2)
        return h, (h, torch.logaddexp(total, s))

    def scan(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        h0, before = state
        s, v = drive.to(h0.dtype).split((self.heads, self.inner), dim=-1)
        before = before.unsqueeze(1)
        total = torch.logaddexp(before, torch.logcumsumexp(s, dim=1))
        gate = s - torch.cat([before, total[:, :-1]], dim=1)
        drive = torch.cat([gate.repeat_interleave(self.units, dim=-1), v], dim=-1)
        h, last = gated_scan(drive, h0, "linear")
        return h, (last, total[:, -1].clone())

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        h, total = state
        s = self.project(x).to(h.dtype)[..., : self.heads]
        return {"h": torch.sigmoid(total - s).repeat_interleave(self.units, dim=-1)}

    def readout(self, h: Tensor) -> Tensor:
        return self.outputs(h)
