"""rglru: the real-gated linear recurrent unit of Griffin.

    r_t = sigmoid(k_t),   i_t = sigmoid(j_t),   [k, j, u] = W x + b
    a_t = exp(-8 softplus(L) r_t),   h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t

The gates depend on the input only.  In the paper the matrices of the gates are block-diagonal and
read u; here they are dense and read x, so that one product computes all three parts.  The paper
puts a convolution in front (`model.conv` does that) and multiplies h by a second branch, which is
left out.

Source: De et al., Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient
Language Models, arXiv 2402.19427, section 2.4 and appendix A.
"""

# B batch, T time, D model width, H state width

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm.cells._contract import State
from seqlm.cells._expanded import Expanded
from seqlm.ops import linear_scan

SHARPNESS = 8  # the paper's c: a lies between exp(-8 softplus(L)) and 1
LEAST_KEPT, MOST_KEPT = 0.9, 0.999  # range of exp(-8 softplus(L)) at the start


class RGLRU(Expanded):
    """RG-LRU with a projection from its H units back to D.

    As published, L starts so that exp(-8 softplus(L)), the least that a unit keeps in a step, is
    uniform in [0.9, 0.999].  Matrices start as nn.Linear does.

    expansion: H, the width of the state, in multiples of D.
    """

    group = "linear"

    def __init__(self, width: int, *, expansion: float = 1.0):
        super().__init__(width, expansion, parts=3)
        rate = -torch.empty(self.hidden).uniform_(LEAST_KEPT, MOST_KEPT).log() / SHARPNESS
        self.L = nn.Parameter(torch.expm1(rate).log())  # the inverse of softplus

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        keep, new = self._terms(drive.to(h.dtype))
        h = keep * h + new
        return h, (h,)

    def scan(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        (h0,) = state
        h, last = linear_scan(*self._terms(drive.to(h0.dtype)), h0)
        return h, (last,)

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        return {"h": self._terms(self.project(x).to(state[0].dtype))[0]}

    def _terms(self, drive: Tensor) -> tuple[Tensor, Tensor]:
        """a_t, and what is added to a_t h_{t-1}, in the state's dtype: a is too close to 1 for
        bfloat16."""
        r, i, u = drive.chunk(3, dim=-1)
        log_a = -SHARPNESS * F.softplus(self.L.to(drive.dtype)) * torch.sigmoid(r)
        # 1 - a^2, accurate for a near 1; above 0, where the square root has a gradient
        lost = (-torch.expm1(2 * log_a)).clamp(min=torch.finfo(drive.dtype).tiny)
        return torch.exp(log_a), lost.sqrt() * torch.sigmoid(i) * u
