"""h3: two state space models with products between them: a shift and a diagonal one.

    [q, k, v] = W x + b,   s_t = c + sum over j < kernel of w_j k_{t-j}
    y_t = W_o (q_t SSM(s v)_t) + b_o

The shift SSM holds the last characters of k, and its output s is a short convolution.  The second
one is the diagonal SSM of the cell s4d.  The products let a model compare a character with those
before it.

Source: Fu et al., Hungry Hungry Hippos: Towards Language Modeling with State Space Models, arXiv
2212.14052, section 3 and algorithm 1, with heads of one channel.
"""

# B batch, T time, D model width, N complex states of a channel, K kernel

from typing import Literal

from torch import Tensor

from seqlm.cells._contract import Composite, State
from seqlm.cells._conv import CausalConv
from seqlm.cells._ssm import DiagonalSSM
from seqlm.errors import UsageError
from seqlm.ops import Linear


class H3(Composite):
    """H3 with D channels.

    The diagonal SSM starts as in s4d, the shift SSM and the matrices as PyTorch's layers do.
    The state is the window of k, (B, K - 1, D), and the real and the imaginary parts of the
    diagonal SSM's state, (B, D N) each.

    states: number of complex numbers of a channel in the diagonal SSM; 32 in the paper.
    frequencies: imaginary parts of the diagonal SSM's A at the start, as in s4d.
    kernel: number of characters that the shift SSM holds; 64 in the paper, 3 or 4 in its successors
    Hyena and Mamba.
    """

    over_time = "parallel in chunks"
    group = "linear"

    def __init__(
        self,
        width: int,
        *,
        states: int = 16,
        frequencies: Literal["lin", "inv"] = "lin",
        kernel: int = 4,
    ):
        super().__init__()
        if not 1 <= kernel <= 64:
            raise UsageError(f"cell.kernel is {kernel}; it must be from 1 to 64.")
        self.inputs = Linear(width, 3 * width, parts=3)
        self.shift = CausalConv(width, kernel)
        self.ssm = DiagonalSSM(width, states, frequencies)
        self.outputs = Linear(width, width)

    def initial_state(self, batch: int) -> State:
        return self.shift.initial_state(batch) + self.ssm.initial_state(batch)

    def _run(self, form: str, x: Tensor, state: State) -> tuple[Tensor, State]:
        q, k, v = self.inputs(x).chunk(3, dim=-1)
        k, window = getattr(self.shift, form)(k, state[:1])
        y, state = getattr(self.ssm, form)(k * v, state[1:])
        return self.outputs((q * y).to(x.dtype)).to(x.dtype), window + state

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        return self.ssm.kept(x, state[1:])
