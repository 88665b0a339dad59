"""minGRU: a gated recurrence whose gate and candidate depend on the input only.

    h_t = (1 - z_t) h_{t-1} + z_t g(u_t),   z_t = sigmoid(k_t),   [k, u] = W x + b

Source: Feng et al., Were RNNs All We Needed?, arXiv 2410.01201, section 3.1, appendices A and B.
"""

# B batch, T time, D model width, H state width

from typing import Literal

import torch
from torch import Tensor

from seqlm.cells._contract import State
from seqlm.cells._expanded import Expanded
from seqlm.ops import gated_scan, gated_step
from seqlm.ops.gated_scan import gate_and_candidate


class MinGRU(Expanded):
    """minGRU with a projection from its H units back to D.

    forget_bias: subtracted from the initial bias of the gate z, so that z starts near
    1 / (1 + e^forget_bias), the share of the state that a step forgets.  A large value helps to
    remember over many steps (not in the paper).
    candidate: "positive" (g(u) > 0, the paper's numerically stable version) or "linear" (vanilla).
    expansion: H, the width of the state, in multiples of D.
    """

    group = "four"

    def __init__(
        self,
        width: int,
        *,
        forget_bias: float = 0.0,
        candidate: Literal["positive", "linear"] = "positive",
        expansion: float = 1.0,
    ):
        super().__init__(width, expansion, parts=2)
        self.candidate = candidate
        with torch.no_grad():
            self.inputs.bias[: self.hidden] -= forget_bias

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        h = gated_step(drive, h, self.candidate)
        return h, (h,)

    def scan(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        (h0,) = state
        h, last = gated_scan(drive, h0, self.candidate)
        return h, (last,)

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        gate, _ = gate_and_candidate(self.project(x).to(state[0].dtype), self.hidden)
        return {"h": torch.sigmoid(-gate)}
