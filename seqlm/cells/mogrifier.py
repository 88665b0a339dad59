"""Mogrifier LSTM: an LSTM whose input and state gate each other in several rounds before a step.

    x^i = 2 sigmoid(Q^i h^{i-1}) x^{i-2}   for odd i
    h^i = 2 sigmoid(R^i x^{i-1}) h^{i-2}   for even i

where x^{-1} = x_t and h^0 = h_{t-1}, for i = 1 .. rounds.  With the last x and h of the rounds:

    i_t, f_t, o_t = sigmoid(W x + U h + b),   g_t = tanh(W_g x + U_g h + b_g)
    c_t = f_t c_{t-1} + i_t g_t,   h_t = o_t tanh(c_t)

Source: Melis et al., Mogrifier LSTM, arXiv 1909.01792, equations 1 and 2.
"""

# B batch, T time, D model width, which is the state's too

import torch
from torch import Tensor, nn

from seqlm import ops
from seqlm.cells._contract import State
from seqlm.cells._lstm import LSTMStep
from seqlm.errors import UsageError
from seqlm.ops import Linear


class Mogrifier(LSTMStep):
    """Mogrifier LSTM with D units; its state is (h, c).

    W, U and b start from U(-1/sqrt(D), 1/sqrt(D)), as in nn.LSTM; Q and R as nn.Linear does.

    rounds: number of rounds; 0 is an LSTM.
    rank: each of Q and R is the product of two matrices of this rank; 0: one full matrix.
    """

    group = "gated"

    def __init__(self, width: int, *, rounds: int = 5, rank: int = 0):
        super().__init__()
        if not 0 <= rounds <= 64:
            raise UsageError(f"cell.rounds is {rounds}; it must be from 0 to 64.")
        if not 0 <= rank <= width:
            raise UsageError(
                f"cell.rank is {rank}; it must be from 1 to {width}, the model's width, or 0."
            )
        self.width = width
        self.inputs = Linear(width, 4 * width, parts=4)  # i, f, g, o
        self.from_h = Linear(width, 4 * width, bias=False, parts=4)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)
        self.rounds = nn.ModuleList(_matrix(width, rank) for _ in range(rounds))

    def project(self, x: Tensor) -> Tensor:
        return x  # the first round changes x by the state

    def logits(self, drive: Tensor, h: Tensor) -> Tensor:
        x = drive
        for number, matrix in enumerate(self.rounds, 1):
            if number % 2:
                x = 2 * torch.sigmoid(matrix(h)) * x
            else:
                h = 2 * torch.sigmoid(matrix(x)) * h
        return self.inputs(x) + self.from_h(h)

    def scan(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        h, c = state
        rounds = [_product(matrix) for matrix in self.rounds]
        h, *last = ops.mogrifier_scan(
            drive,
            h,
            c,
            torch.stack(rounds) if rounds else drive.new_empty(0, self.width, self.width),
            torch.cat([self.inputs.weight, self.from_h.weight], dim=1),
            self.inputs.bias,
        )
        return h, tuple(last)


def _matrix(width: int, rank: int) -> nn.Module:
    """Q^i or R^i"""
    if not rank:
        return Linear(width, width, bias=False)
    return nn.Sequential(Linear(width, rank, bias=False), Linear(rank, width, bias=False))


def _product(matrix: nn.Module) -> Tensor:
    """The full matrix, (D, D), of Q^i or R^i."""
    first, *second = matrix.parameters()
    return second[0] @ first if second else first
