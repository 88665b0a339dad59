"""IndRNN: rectified units that depend only on their own state, a baseline.

    h_t = relu(W x_t + b + u h_{t-1}),   |u| <= bound

An optimizer step may take u past the bound; u is then brought back to it, so that it goes on
learning.  A clamp within the equation would have no gradient there.

Source: Li et al., Independently Recurrent Neural Network: Building A Longer and Deeper
RNN, CVPR 2018, equation 1 and section 3.
"""

# B batch, T time, D model width, which is the state's too

from typing import Literal

import torch
from torch import Tensor, nn

from seqlm import ops
from seqlm.cells._contract import Recurrence, State
from seqlm.errors import UsageError
from seqlm.ops import Linear


class IndRNN(Recurrence):
    """IndRNN with D units; u starts from U(0, bound).

    bound: largest |u|.
    solver: how the recurrence is solved over time.
    """

    over_time = "parallel"
    group = "gated"

    def __init__(
        self,
        width: int,
        *,
        bound: float = 0.99,
        solver: Literal["auto", "sequential", "newton"] = "auto",
    ):
        super().__init__()
        if not 0 < bound <= 1:
            raise UsageError(f"cell.bound is {bound}; it must be above 0 and at most 1.")
        self.width, self.bound, self.solver = width, bound, solver
        self.inputs = Linear(width, width)
        self.u = nn.Parameter(torch.empty(width).uniform_(0, bound))
        # weights of runs from before may be past the bound, where the equation then clamped them
        self.register_load_state_dict_post_hook(_bring_back)

    @torch.no_grad()
    def after_step(self) -> None:
        self.u.clamp_(-self.bound, self.bound)

    def initial_state(self, batch: int) -> State:
        return (self.zeros(batch, self.width),)

    def project(self, x: Tensor) -> Tensor:
        return self.inputs(x)

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        h = torch.relu(drive.to(h.dtype) + self.u.to(h.dtype) * h)
        return h, (h,)

    def scan(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        return ops.diagonal_scan(self.recur, drive, state, self.solver)


def _bring_back(cell: IndRNN, _: object) -> None:
    cell.after_step()
