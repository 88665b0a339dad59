"""minLSTM: minGRU with separate forget and input gates.

    h_t = f'_t h_{t-1} + i'_t g(u_t)
    f = sigmoid(k_f), i = sigmoid(k_i),   [k_f, k_i, u] = W x + b

With `normalize`, f' = f / (f + i) and i' = i / (f + i), so that h cannot grow with T.  Without it,
f' = f and i' = i.
Source: Feng et al., Were RNNs All We Needed?, arXiv 2410.01201, section 3.2, appendices A and B.
"""

# B batch, T time, D model width, H state width

from typing import Literal

import torch
from torch import Tensor

from seqlm.cells._contract import State
from seqlm.cells._expanded import Expanded
from seqlm.ops import gated_scan, gated_step, linear_scan
from seqlm.ops.gated_scan import candidate_value, gate_and_candidate


class MinLSTM(Expanded):
    """minLSTM with a projection from its H units back to D.

    normalize: scale the two gates to sum to 1; without it the state may grow with T.
    forget_bias, input_bias: added to the initial biases of the two gates.  With normalize and an
    input bias of 0, f' starts near 2/3 at most, however large the forget bias is.  A negative input
    bias allows more (not in the paper).
    candidate: "positive" (g(u) > 0, the numerically stable version) or "linear" (vanilla).
    expansion: H, the width of the state, in multiples of D.
    """

    group = "four"

    def __init__(
        self,
        width: int,
        *,
        normalize: bool = True,
        forget_bias: float = 0.0,
        input_bias: float = 0.0,
        candidate: Literal["positive", "linear"] = "positive",
        expansion: float = 1.0,
    ):
        super().__init__(width, expansion, parts=3)
        self.normalize, self.candidate = normalize, candidate
        with torch.no_grad():
            self.inputs.bias[: self.hidden] += forget_bias
            self.inputs.bias[self.hidden : 2 * self.hidden] += input_bias

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        if self.normalize:
            h = gated_step(drive, h, self.candidate)
        else:
            keep, new = self.gates(drive.to(h.dtype))
            h = keep * h + new
        return h, (h,)

    def scan(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        (h0,) = state
        if self.normalize:
            h, last = gated_scan(drive, h0, self.candidate)
        else:
            h, last = linear_scan(*self.gates(drive.to(h0.dtype)), h0)
        return h, (last,)

    def gates(self, drive: Tensor) -> tuple[Tensor, Tensor]:
        """Without normalisation: the factor of the state, and the term that is added to it.

        drive: in the state's dtype, since bfloat16 rounds a factor above 0.998 to 1.
        """
        k_f, k_i, u = drive.chunk(3, dim=-1)
        return torch.sigmoid(k_f), torch.sigmoid(k_i) * candidate_value(u, self.candidate)

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        drive = self.project(x).to(state[0].dtype)
        if not self.normalize:
            return {"h": self.gates(drive)[0]}
        gate, _ = gate_and_candidate(drive, self.hidden)
        return {"h": torch.sigmoid(-gate)}
