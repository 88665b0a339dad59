"""s4d: a diagonal state space model, whose complex states turn and fade at learned speeds.

    h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A x_t,   u_t = 2 Re(sum of C h_t) + E x_t
    y_t = p_t sigmoid(q_t),   [p, q] = W gelu(u) + b

Each channel of x has `states` complex numbers h, and its own dt, A, C and E.  Nothing in the
recurrence depends on the input.  Each complex number stands for itself and its conjugate.

Source: Gu et al., On the Parameterization and Initialization of Diagonal State Space Models, arXiv
2206.11893; the gate at the output is that of the authors' code.
"""

# B batch, T time, D model width, which is the number of channels, N complex states of a channel

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlm.cells._contract import Cell, State
from seqlm.cells._ssm import DiagonalSSM
from seqlm.ops import Linear


class S4D(Cell):
    """S4D with zero-order hold.

    As published, Re(A) starts from -1/2, dt log-uniform in [0.001, 0.1], C and E from normal
    numbers.  W starts as nn.Linear does.
    The state is the real and the imaginary parts of h, (B, D N) each.

    states: N, the number of complex numbers of a channel; 32 in the paper.
    frequencies: imaginary parts of A at the start: pi n ("lin", S4D-Lin in the paper) or
    (2 N / pi) (2 N / (2 n + 1) - 1) ("inv", S4D-Inv), for n = 0 .. N - 1.
    """

    over_time = "parallel in chunks"
    group = "linear"

    def __init__(self, width: int, *, states: int = 16, frequencies: Literal["lin", "inv"] = "lin"):
        super().__init__()
        self.ssm = DiagonalSSM(width, states, frequencies)
        self.outputs = Linear(width, 2 * width, parts=2)

    def initial_state(self, batch: int) -> State:
        return self.ssm.initial_state(batch)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        u, state = self.ssm(x, state)
        return self._readout(u, x), state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        u, state = self.ssm.step(x, state)
        return self._readout(u, x), state

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        return self.ssm.kept(x, state)

    def _readout(self, u: Tensor, x: Tensor) -> Tensor:
        p, q = self.outputs(F.gelu(u).to(x.dtype)).chunk(2, dim=-1)
        return (p * torch.sigmoid(q)).to(x.dtype)
