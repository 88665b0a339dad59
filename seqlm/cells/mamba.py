"""Mamba: a selective state space model, a baseline.

    [v, g] = W_in x,   u = silu(conv(v)),   [r, B_t, C_t] = W_x u,   d = softplus(W_d r + b_d)
    h_t = exp(d A) h_{t-1} + d B_t u_t,   y = (C_t h_t + D u_t) silu(g),   output W_out y

h has `states` numbers per channel; A < 0.

Source: Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023,
algorithm 2 and section 3.4; A and the bias of d start as in the authors' code.
"""

# B batch, T time, D model width, E inner width, N states a channel, R rank of d

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm import ops
from seqlm.cells._contract import Cell, State
from seqlm.cells._conv import CausalConv
from seqlm.cells._ssm import before_softplus, log_step_sizes
from seqlm.errors import UsageError
from seqlm.ops import Linear


class Mamba(Cell):
    """Mamba's mixer.  The state is the convolution's window and h: (B, E N).

    expansion: number of channels, in multiples of D.
    states: numbers in the state of a channel.
    kernel: length of the convolution, in characters.
    """

    over_time = "parallel scan"
    group = "linear"
    scan = staticmethod(ops.linear_scan)

    def __init__(self, width: int, *, expansion: float = 2.0, states: int = 16, kernel: int = 4):
        super().__init__()
        limits = {"expansion": (expansion, 64), "states": (states, 1024), "kernel": (kernel, 64)}
        for name, (value, most) in limits.items():
            if not 0 < value <= most:
                raise UsageError(f"cell.{name} is {value}; it must be above 0 and at most {most}.")
        self.inner, self.states = max(1, round(expansion * width)), states
        self.rank = ceil(width / 16)
        self.inputs = Linear(width, 2 * self.inner, parts=2)
        self.conv = CausalConv(self.inner, kernel)
        self.selection = Linear(self.inner, self.rank + 2 * states, bias=False)
        self.step_size = Linear(self.rank, self.inner)
        rates = torch.arange(1, states + 1, dtype=torch.float32).log()
        self.log_A = nn.Parameter(rates.repeat(self.inner))  # log(-A): (E N,)
        self.skip = nn.Parameter(torch.ones(self.inner))
        self.outputs = Linear(self.inner, width)
        self.step_size.bias.data = before_softplus(log_step_sizes(self.inner).exp())

    def initial_state(self, batch: int) -> State:
        return *self.conv.initial_state(batch), self.zeros(batch, self.inner * self.states)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        *window, h0 = self.initial_state(len(x)) if state is None else state
        v, gate = self.inputs(x).chunk(2, dim=-1)
        v, window = self.conv(v, tuple(window))
        u = F.silu(v)
        rank, B, C = self.selection(u).split((self.rank, self.states, self.states), dim=-1)
        exact = h0.dtype  # the recurrence is computed in the state's dtype
        d = F.softplus(self.step_size(rank).to(exact)).unsqueeze(-1)  # (B, T, E, 1)
        A = -torch.exp(self.log_A.to(exact)).view(self.inner, self.states)
        new = d * u.to(exact).unsqueeze(-1) * B.to(exact).unsqueeze(-2)
        h, last = self.scan(torch.exp(d * A).flatten(2), new.flatten(2), h0)
        y = (h.unflatten(2, (self.inner, self.states)) @ C.to(exact).unsqueeze(-1)).squeeze(-1)
        y = y + self.skip.to(exact) * u.to(exact)
        return self.outputs(y.to(x.dtype) * F.silu(gate)).to(x.dtype), (*window, last)
