"""LTC, the liquid time-constant network: units whose speed depends on the input and the state.

    dh/dt = -(1/tau + f) h + f A,   f = sigmoid(W x_t + R h + b)

A character lasts one unit of time.  The fused solver divides it into `unfolds` steps of length dt:

    h <- (h + dt f A) / (1 + dt (1/tau + f))

Each of these steps takes a product with R, so the cell is slow.

Source: Hasani et al., Liquid Time-constant Networks, arXiv 2006.04439, equations 1 and 3, and
algorithm 1.
"""

# B batch, T time, D model width, which is the state's too

from math import log

import torch
from torch import Tensor, nn

from seqlm.cells._contract import Recurrence, State
from seqlm.errors import UsageError
from seqlm.ops import Linear

SLOWEST = 1e-3  # smallest initial 1/tau


class LTC(Recurrence):
    """LTC with D units.

    W, R and b start as nn.Linear does.  1/tau starts between 0.001 and 1, the range of the leak in
    the authors' code, but uniform in its logarithm, so that all scales of time occur.  A starts as
    -1 or 1, as there.

    unfolds: the solver's steps for one character; the authors' code takes 6.
    """

    group = "gated"

    def __init__(self, width: int, *, unfolds: int = 3):
        super().__init__()
        if not 1 <= unfolds <= 64:
            raise UsageError(f"cell.unfolds is {unfolds}; it must be from 1 to 64.")
        self.width, self.unfolds = width, unfolds
        self.inputs = Linear(width, width)
        self.from_h = Linear(width, width, bias=False)
        # 1/tau is exp of this, and so stays above 0
        self.log_leak = nn.Parameter(torch.empty(width).uniform_(log(SLOWEST), 0))
        self.A = nn.Parameter(torch.empty(width).bernoulli_(0.5))
        with torch.no_grad():  # in place: else a model on the meta device loads torch's compiler
            self.A.mul_(2).sub_(1)

    def initial_state(self, batch: int) -> State:
        return (self.zeros(batch, self.width),)

    def project(self, x: Tensor) -> Tensor:
        return self.inputs(x)

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        h, _ = self._solve(drive, *state)
        return h, (h,)

    def _solve(self, drive: Tensor, h: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The state after a character, and the share of h that each of the steps keeps."""
        exact, dt = h.dtype, 1 / self.unfolds
        leak, A = torch.exp(self.log_leak.to(exact)), self.A.to(exact)
        kept = []
        for _ in range(self.unfolds):
            f = torch.sigmoid((drive + self.from_h(h.to(drive.dtype))).to(exact))
            kept.append(1 / (1 + dt * (leak + f)))
            h = kept[-1] * (h + dt * f * A)
        return h, kept

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        return {"h": torch.stack(self._solve(self.project(x), *state)[1]).prod(0)}
