"""minLSTM: minGRU with separate forget and input gates.

    h_t = f'_t h_{t-1} + i'_t g(u_t)
    f = sigmoid(k_f), i = sigmoid(k_i),   [k_f, k_i, u] = W x + b

With `normalize`, f' = f / (f + i) and i' = i / (f + i): the state's size does not depend on T.
Source: Feng et al., Were RNNs All We Needed?, arXiv 2410.01201, section 3.2, appendices A and B.
"""

# B batch, T time, D model width, H state width

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm.cells._contract import Recurrence, State
from seqlm.cells.mingru import expanded
from seqlm.ops import gated_scan, gated_step, linear_scan
from seqlm.ops.gated_scan import candidate_value


class MinLSTM(Recurrence):
    """minLSTM with H = expansion * D units and a projection back to D.

    normalize: scale the two gates to sum to 1; without it the state may grow with T.
    forget_bias: added to the forget gate's bias at the start; more remembers longer.
    candidate: "positive" (g(u) > 0, the numerically stable version) or "linear" (vanilla).
    """

    def __init__(
        self,
        width: int,
        *,
        normalize: bool = True,
        forget_bias: float = 0.0,
        candidate: Literal["positive", "linear"] = "positive",
        expansion: float = 1.0,
    ):
        super().__init__()
        self.normalize, self.candidate = normalize, candidate
        self.hidden = expanded(width, expansion)
        self.inputs = nn.Linear(width, 3 * self.hidden)
        self.outputs = nn.Linear(self.hidden, width)
        with torch.no_grad():
            self.inputs.bias[: self.hidden] += forget_bias

    def initial_state(self, batch: int) -> State:
        return (self.zeros(batch, self.hidden),)

    def project(self, x: Tensor) -> Tensor:
        return self.inputs(x)

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        k_f, k_i, u = drive.chunk(3, dim=-1)
        if self.normalize:
            h = gated_step(gate_logit(k_f, k_i), u, *state, self.candidate)
        else:
            keep, new = self.gates(k_f, k_i, u)
            h = keep * state[0] + new
        return h, (h,)

    def scan(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        k_f, k_i, u = drive.chunk(3, dim=-1)
        if self.normalize:
            h, last = gated_scan(gate_logit(k_f, k_i), u, *state, self.candidate)
        else:
            h, last = linear_scan(*self.gates(k_f, k_i, u), *state)
        return h, (last,)

    def gates(self, k_f: Tensor, k_i: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of the state, and what is added to it, without normalisation."""
        return torch.sigmoid(k_f), torch.sigmoid(k_i) * candidate_value(u, self.candidate)

    def readout(self, h: Tensor) -> Tensor:
        return self.outputs(h)


def gate_logit(k_f: Tensor, k_i: Tensor) -> Tensor:
    """logit of i / (f + i) = log i - log f: never 0 / 0, however small the two gates are.

    In float32 at least: rounded to bfloat16 the difference would lose what the gates hold.
    """
    exact = torch.promote_types(k_f.dtype, torch.float32)
    return F.softplus(-k_f.to(exact)) - F.softplus(-k_i.to(exact))
