"""hyena: a long convolution whose filter is a small network, between two gates.

    [q, k, v] = conv(W x + b),   z = k v
    y_t = W_o (q_t (E z_t + sum over j < context of f_j z_{t-j})) + b_o
    f_j = exp(-r j / context) network(j / context)

conv is a convolution over the last `kernel` characters.  The network, with sines between its
layers, reads j / context and its sines and cosines; it gives the filters of all channels.  The
rates r of the channels are constant.  The published filter is as long as the text; here it ends
after `context` characters, so that a text can go on for ever.  The state is those characters: its
size grows with the context, as that of attention does.

Source: Poli et al., Hyena Hierarchy: Towards Larger Convolutional Language Models, arXiv
2302.10866, section 3, order 2, whose first long convolution the authors' code leaves out.
"""

# B batch, T time, D model width, W context, K kernel

from collections.abc import Iterable
from itertools import pairwise
from math import log, pi
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm import ops
from seqlm.cells._contract import Cell, State
from seqlm.cells._conv import CausalConv
from seqlm.errors import UsageError
from seqlm.ops import Linear

LARGEST_CONTEXT = 4096  # characters
BANDS, HIDDEN, SINE = 16, 32, 10.0  # the network's sines and cosines, width, and sin(SINE x)
SLOWEST, FASTEST = log(100) / 1.5, log(100) / 0.3  # range of r


class Hyena(Cell):
    """Hyena of order 2 with D channels.

    As in the authors' code, r runs from 3.1 to 15.4 over the channels, so that a filter falls to
    1 % in 1.5 to 0.3 contexts, and E starts from normal numbers.  The layers start as PyTorch's do.
    The state is the windows of the two convolutions, (B, K - 1, 3 D) and (B, W - 1, D).

    context: length of the filters and of the window, in characters.
    kernel: length of the short convolution, in characters; 3 in the paper.
    """

    over_time = "parallel, O(T window)"
    group = "windows"

    def __init__(self, width: int, *, context: int = 256, kernel: int = 3):
        super().__init__()
        limits = {"context": (context, LARGEST_CONTEXT), "kernel": (kernel, 64)}
        for name, (value, most) in limits.items():
            if not 1 <= value <= most:
                raise UsageError(f"cell.{name} is {value}; it must be from 1 to {most:,}.")
        self.width, self.past = width, context - 1
        self.inputs = Linear(width, 3 * width, parts=3)
        self.conv = CausalConv(3 * width, kernel)
        sizes = [2 * BANDS + 1, HIDDEN, HIDDEN, width]
        self.network = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.skip = nn.Parameter(torch.randn(width))
        self.outputs = Linear(width, width)

    def initial_state(self, batch: int) -> State:
        window = self.zeros(batch, self.past * self.width).view(batch, self.past, self.width)
        return *self.conv.initial_state(batch), window

    def filters(self, exact: torch.dtype) -> Tensor:
        """f, from the last place to the first, with E added to f_0: (W, D)."""
        device, context = self.skip.device, self.past + 1
        place = torch.arange(context - 1, -1, -1, device=device, dtype=exact)[:, None] / context
        angles = 2 * pi * place * torch.arange(BANDS, device=device)
        f = torch.cat([place, angles.cos(), angles.sin()], dim=1)
        for number, layer in enumerate(cast(Iterable[nn.Linear], self.network)):
            f = torch.sin(SINE * f) if number else f
            f = F.linear(f, layer.weight.to(exact), layer.bias.to(exact))
        rates = torch.linspace(SLOWEST, FASTEST, self.width, device=device, dtype=exact)
        f = torch.exp(-rates * place) * f
        return torch.cat([f[:-1], f[-1:] + self.skip.to(exact)])

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.initial_state(len(x)) if state is None else state
        *short, window = state
        x_conv, end = self.conv(self.inputs(x), tuple(short))
        q, k, v = x_conv.chunk(3, dim=-1)
        z = torch.cat([window, (k * v).to(window.dtype)], dim=1)  # (B, W - 1 + T, D)
        # autocast would round the products, and the argument of a sine in the filters
        with torch.autocast(z.device.type, enabled=False):
            f = self.filters(z.dtype)
            y = ops.causal_conv(z, f.t().unsqueeze(1), torch.zeros_like(f[0]))
        end = *end, z[:, z.shape[1] - self.past :].clone()
        return self.outputs((q * y).to(x.dtype)).to(x.dtype), end
