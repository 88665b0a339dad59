"""coRNN: coupled, damped and driven oscillators, a baseline.

    z_t = z_{t-1} + dt (tanh(W y_{t-1} + Z z_{t-1} + V x_t + b) - gamma y_{t-1} - epsilon z_{t-1})
    y_t = y_{t-1} + dt z_t

Source: Rusch and Mishra, Coupled Oscillatory Recurrent Neural Network, ICLR 2021, equation 3.
"""

# B batch, T time, D model width, which is the state's too

import torch
from torch import Tensor

from seqlm.cells._contract import Recurrence, State
from seqlm.errors import UsageError
from seqlm.ops import Linear


class CoRNN(Recurrence):
    """coRNN with D oscillators; the state is (y, z).  Matrices start as nn.Linear does.

    dt: the time step.
    gamma: the squared frequency.
    epsilon: the damping.
    """

    group = "gated"

    def __init__(self, width: int, *, dt: float = 0.5, gamma: float = 1.0, epsilon: float = 1.0):
        super().__init__()
        for name, value in {"dt": dt, "gamma": gamma, "epsilon": epsilon}.items():
            if not value > 0:
                raise UsageError(f"cell.{name} is {value}; it must be above 0.")
        self.width, self.dt, self.gamma, self.epsilon = width, dt, gamma, epsilon
        self.inputs = Linear(width, width)
        self.from_state = Linear(2 * width, width, bias=False)  # W, Z

    def initial_state(self, batch: int) -> State:
        return self.zeros(batch, self.width), self.zeros(batch, self.width)

    def project(self, x: Tensor) -> Tensor:
        return self.inputs(x)

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        y, z = state
        force = drive + self.from_state(torch.cat(state, dim=-1).to(drive.dtype))
        z = z + self.dt * (torch.tanh(force.to(z.dtype)) - self.gamma * y - self.epsilon * z)
        y = y + self.dt * z
        return y, (y, z)
