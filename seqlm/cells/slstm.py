"""sLSTM: an LSTM with an exponential input gate, a normaliser n, and heads that do not mix.

    i_t = exp(i),   f_t = sigmoid(f),   o_t = sigmoid(o),   z_t = tanh(z)
    c_t = f_t c_{t-1} + i_t z_t,   n_t = f_t n_{t-1} + i_t,   h_t = o_t c_t / n_t
    [i, f, z, o] = W x_t + R h_{t-1} + b

R has one block a head.  c and n are kept as c e^-m and n e^-m, so that no exponential overflows:

    m_t = max(log f_t + m_{t-1}, i),   i'_t = exp(i - m_t),   f'_t = exp(log f_t + m_{t-1} - m_t)

The layer's output is h_t, normalised in each head to the mean 0 and the variance 1.  The paper's
projections after the cell are the MLP of the block, and its convolution is model.conv.

Source: Beck et al., xLSTM, arXiv 2405.04517, equations 8 to 17 and section 2.2.
"""

# B batch, T time, D model width, which is the state's too, H heads, S width of a head

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm.cells._contract import Recurrence, State
from seqlm.errors import UsageError
from seqlm.ops import Linear

HEADS = 4  # in the paper
LONGEST = 5.0  # largest initial forget bias: a memory of 150 characters
EPSILON = 1e-5  # added to the variance of a head
NOTHING = 1e30  # -m before the first character, so that the first step takes m = i and n = 1


class SLSTM(Recurrence):
    """sLSTM with D units; its state is (h, c, n, m).

    W starts as nn.Linear does, and R from U(-1/sqrt(S), 1/sqrt(S)) for heads of S units.  The
    forget bias rises from 0 to 5 over the units of a head, so that units start with memories of 2
    to 150 characters (not in the paper).

    heads: number of heads; 0 chooses 4, or the largest smaller number that divides the width.
    """

    group = "gated"

    def __init__(self, width: int, *, heads: int = 0):
        super().__init__()
        heads = heads or next(n for n in range(HEADS, 0, -1) if width % n == 0)
        if heads not in range(1, width + 1) or width % heads:
            raise UsageError(
                f"cell.heads is {heads}; it must be from 1 to {width} and divide the model's width "
                f"{width}, or be 0."
            )
        self.width, self.heads, size = width, heads, width // heads
        self.inputs = Linear(width, 4 * width, parts=4 * self.heads)  # (H, 4, S): i, f, z, o
        self.from_h = nn.Parameter(torch.empty(heads, size, 4 * size))
        nn.init.uniform_(self.from_h, -1 / sqrt(size), 1 / sqrt(size))
        self.norm = nn.Parameter(torch.ones(width))
        with torch.no_grad():
            bias = self.inputs.bias.view(heads, 4, size)
            bias[:, 1] = torch.linspace(0, LONGEST, size)

    def initial_state(self, batch: int) -> State:
        h, c, n = (self.zeros(batch, self.width) for _ in range(3))
        return h, c, n, torch.full_like(h, -NOTHING)

    def project(self, x: Tensor) -> Tensor:
        return self.inputs(x)

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        _, c, n, _ = state
        i, f, m, z, o = self._gates(drive, state)
        c = f * c + i * torch.tanh(z)
        n = f * n + i
        h = torch.sigmoid(o) * c / n
        return h, (h, c, n, m)

    def _gates(self, drive: Tensor, state: State) -> tuple[Tensor, ...]:
        """i'_t, f'_t, m_t, z, o: (B, D) each"""
        h, _, _, m = state
        heads = h.to(drive.dtype).unflatten(-1, (self.heads, -1)).transpose(0, 1)  # (H, B, S)
        mixed = torch.bmm(heads, self.from_h.to(drive.dtype)).transpose(0, 1)  # (B, H, 4 S)
        parts = (drive.unflatten(-1, (self.heads, -1)) + mixed).to(m.dtype).chunk(4, dim=-1)
        i, f, z, o = (part.flatten(-2) for part in parts)
        old = m - F.softplus(-f)  # log f_t + m_{t-1}
        m = torch.maximum(old, i)
        return torch.exp(i - m), torch.exp(old - m), m, z, o

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        """The share of c / n that a step keeps."""
        n = state[2]
        i, f, *_ = self._gates(self.project(x), state)
        return {"c/n": f * n / (f * n + i)}

    def readout(self, h: Tensor) -> Tensor:
        heads = h.unflatten(-1, (self.heads, -1))
        heads = heads - heads.mean(-1, keepdim=True)
        scale = torch.rsqrt(heads.square().mean(-1, keepdim=True) + EPSILON)
        return (heads * scale).flatten(-2) * self.norm.to(h.dtype)
