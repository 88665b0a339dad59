"""A short causal convolution over time, used by the blocks of a model and by some cells."""

# B batch, T time, D width, K kernel

import torch
from torch import Tensor, nn

from seqlm import ops
from seqlm.cells._contract import Cell, State


class CausalConv(Cell):
    """Depthwise convolution over the last `kernel` characters: a cell whose state is its window."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.width, self.past = width, kernel - 1
        bound = kernel**-0.5
        self.weight = nn.Parameter(torch.empty(width, 1, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound))

    def initial_state(self, batch: int) -> State:
        return (self.zeros(batch, self.width * self.past).view(batch, self.past, self.width),)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        (window,) = self.initial_state(len(x)) if state is None else state
        x = torch.cat([window.to(x.dtype), x], dim=1)  # (B, K - 1 + T, D)
        y = ops.causal_conv(x, self.weight, self.bias)
        return y, (x[:, x.shape[1] - self.past :].to(window.dtype, copy=True),)
