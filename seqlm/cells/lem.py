"""LEM, the long expressive memory: two coupled states with learned time steps.

    D_t  = dt sigmoid(W_1 y_{t-1} + V_1 x_t + b_1)
    D'_t = dt sigmoid(W_2 y_{t-1} + V_2 x_t + b_2)
    z_t  = (1 - D_t)  z_{t-1} + D_t  tanh(W_z y_{t-1} + V_z x_t + b_z)
    y_t  = (1 - D'_t) y_{t-1} + D'_t tanh(W_y z_t     + V_y x_t + b_y)

As published, the matrices W are dense.  With diagonal W a unit depends only on its own state, and
the layer trains in parallel over time.

Source: Rusch et al., Long Expressive Memory for Sequence
Modeling, ICLR 2022, equation 3.
"""

# B batch, T time, D model width, which is the state's too

from typing import Literal

import torch
from torch import Tensor, nn

from seqlm import ops
from seqlm.cells._contract import Recurrence, State
from seqlm.cells._recurrent import Diagonal, check, recurrent
from seqlm.errors import UsageError
from seqlm.ops import Linear

BOUND = 1.0


class LEM(Recurrence):
    """LEM with D units.

    V, b and dense W start from U(-1/sqrt(D), 1/sqrt(D)), as in the authors' code.  That code has
    two biases per gate; here is one, as in the equations.

    dt: the largest time step; a smaller one remembers longer.
    recurrence: whether the matrices W are dense or diagonal.
    bound: largest weight of a diagonal recurrence.
    solver: how a diagonal recurrence is solved over time.
    """

    from_y: Linear | Diagonal
    from_z: Linear | Diagonal
    over_time = "step by step, or diagonal: parallel"
    group = "four"

    def __init__(
        self,
        width: int,
        *,
        dt: float = 1.0,
        recurrence: Literal["dense", "diagonal"] = "dense",
        bound: float = BOUND,
        solver: Literal["auto", "sequential", "newton"] = "auto",
    ):
        super().__init__()
        if not 0 < dt <= 1:
            raise UsageError(f"cell.dt is {dt}; it must be above 0 and at most 1.")
        check(recurrence, bound, BOUND, solver)
        self.dt, self.width, self.solver = dt, width, solver
        self.inputs = Linear(width, 4 * width, parts=4)  # V and b: gate of z, gate of y, z, y
        self.from_y = recurrent(recurrence, bound, width, 3)  # W_1, W_2, W_z
        self.from_z = recurrent(recurrence, bound, width, 1)  # W_y
        for linear in self.children():
            if isinstance(linear, nn.Linear):
                for parameter in linear.parameters():
                    nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    def initial_state(self, batch: int) -> State:
        return self.zeros(batch, self.width), self.zeros(batch, self.width)

    def project(self, x: Tensor) -> Tensor:
        return self.inputs(x)

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        y, z = state
        gate_z, gate_y, new_z, new_y = self._parts(drive, y)
        z = mix(z, new_z, gate_z, self.dt)
        y = mix(y, new_y + self.from_z(z.to(drive.dtype)), gate_y, self.dt)
        return y, (y, z)

    def _parts(self, drive: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """The logits of the gates of z and y, and what enters z and y, the latter without W_y z."""
        # matrix products are in the drive's dtype; the state keeps its own, more exact one
        from_x, new_y = drive.split((3 * self.width, self.width), dim=-1)
        return *(from_x + self.from_y(y.to(drive.dtype))).chunk(3, dim=-1), new_y

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        y, _ = state
        gate_z, gate_y, *_ = self._parts(self.project(x), y)
        steps = {"y": gate_y, "z": gate_z}
        return {part: 1 - time_step(gate.to(y.dtype), self.dt) for part, gate in steps.items()}

    def scan(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        y, z = state
        if not isinstance(self.from_y, Diagonal):
            h, y, z = ops.lem_scan(drive, y, z, self.from_y.weight, self.from_z.weight, self.dt)
            return h, (y, z)
        if self.solver != "newton" and ops.fused("diagonal_lem_scan", drive, *state):
            weights = torch.cat([self.from_y.weight, self.from_z.weight])
            h, y, z = ops.diagonal_lem_scan(drive, y, z, weights, self.dt)
            return h, (y, z)
        return ops.diagonal_scan(self.recur, drive, state, self.solver, bound=1.0)


def mix(old: Tensor, new: Tensor, gate: Tensor, dt: float) -> Tensor:
    """(1 - D) old + D tanh(new) with D = dt sigmoid(gate), in the dtype of the state `old`."""
    return torch.lerp(old, torch.tanh(new.to(old.dtype)), time_step(gate.to(old.dtype), dt))


def time_step(gate: Tensor, dt: float) -> Tensor:
    """D = dt sigmoid(gate)"""
    return dt * torch.sigmoid(gate)
