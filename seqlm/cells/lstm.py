"""LSTM: long short-term memory as in nn.LSTM, a baseline.

    i_t, f_t, o_t = sigmoid(W x_t + U h_{t-1} + b),   g_t = tanh(W_g x_t + U_g h_{t-1} + b_g)
    c_t = f_t c_{t-1} + i_t g_t,   h_t = o_t tanh(c_t)

Source: Hochreiter and Schmidhuber, Long Short-Term Memory, 1997; forget gate, Gers et al., 2000.
"""

# B batch, T time, D model width, which is the state's too

from collections.abc import Sequence

import torch
from torch import Tensor

from seqlm.cells._lstm import LSTMStep
from seqlm.cells._torch_rnn import TorchRNN


class LSTM(LSTMStep, TorchRNN):
    """nn.LSTM of one layer with D units; its state is (h, c)."""

    gates = 4

    def logits(self, drive: Tensor, h: Tensor) -> Tensor:
        return drive + self.from_h(h)

    def _sequence(
        self, x: Tensor, state: list[Tensor], weights: list[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        # flags: biases, layers, dropout, training, bidirectional, batch first
        h, *last = torch.lstm(x, state, weights, True, 1, 0.0, self.training, False, True)
        return h, last
