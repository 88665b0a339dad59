"""LSTM: long short-term memory as in nn.LSTM, a baseline.

    i_t, f_t, o_t = sigmoid(W x_t + U h_{t-1} + b),   g_t = tanh(W_g x_t + U_g h_{t-1} + b_g)
    c_t = f_t c_{t-1} + i_t g_t,   h_t = o_t tanh(c_t)

Source: Hochreiter and Schmidhuber, Long Short-Term Memory, 1997; forget gate, Gers et al., 2000.
"""

# B batch, T time, D model width, which is the state's too

from collections.abc import Sequence

import torch
from torch import Tensor

from seqlm.cells._contract import State
from seqlm.cells._torch_rnn import TorchRNN


class LSTM(TorchRNN):
    """nn.LSTM of one layer with D units; its state is (h, c)."""

    gates = 4

    def initial_state(self, batch: int) -> State:
        return self.zeros(batch, self.width), self.zeros(batch, self.width)

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        _, c = state
        i, f, g, o = self._gates(drive, *state)
        c = f * c + i * torch.tanh(g)
        h = o * torch.tanh(c)
        return h, (h, c)

    def _gates(self, drive: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """i_t, f_t, the argument of g_t's tanh, o_t"""
        i, f, g, o = (drive + self.from_h(h.to(drive.dtype))).to(c.dtype).chunk(4, dim=-1)
        return torch.sigmoid(i), torch.sigmoid(f), g, torch.sigmoid(o)

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        return {"c": self._gates(self.project(x), *state)[1]}

    def _sequence(
        self, x: Tensor, state: list[Tensor], weights: list[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        # flags: biases, layers, dropout, training, bidirectional, batch first
        h, *last = torch.lstm(x, state, weights, True, 1, 0.0, self.training, False, True)
        return h, last
