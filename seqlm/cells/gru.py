"""GRU: the gated recurrent unit as in nn.GRU, a baseline.

    r_t = sigmoid(W_r x_t + U_r h_{t-1} + b),   z_t = sigmoid(W_z x_t + U_z h_{t-1} + b)
    n_t = tanh(W_n x_t + b_n + r_t (U_n h_{t-1} + c_n))
    h_t = (1 - z_t) n_t + z_t h_{t-1}

Source: Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, 2014.  As in
nn.GRU, r_t multiplies U_n h_{t-1} + c_n; in the paper it multiplies h_{t-1}.
"""

# B batch, T time, D model width, which is the state's too

from collections.abc import Sequence

import torch
from torch import Tensor

from seqlm.cells._contract import State
from seqlm.cells._torch_rnn import TorchRNN


class GRU(TorchRNN):
    """nn.GRU of one layer with D units."""

    gates = 3

    def initial_state(self, batch: int) -> State:
        return (self.zeros(batch, self.width),)

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        z, new = self._gate_and_candidate(drive, h)
        h = torch.lerp(new, h, z)
        return h, (h,)

    def _gate_and_candidate(self, drive: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """z_t and n_t"""
        r, z, n = drive.to(h.dtype).chunk(3, dim=-1)
        h_r, h_z, h_n = self.from_h(h.to(drive.dtype)).to(h.dtype).chunk(3, dim=-1)
        return torch.sigmoid(z + h_z), torch.tanh(n + torch.sigmoid(r + h_r) * h_n)

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        return {"h": self._gate_and_candidate(self.project(x), *state)[0]}

    def _sequence(
        self, x: Tensor, state: list[Tensor], weights: list[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        (h0,) = state
        # flags: biases, layers, dropout, training, bidirectional, batch first
        h, last = torch.gru(x, h0, weights, True, 1, 0.0, self.training, False, True)
        return h, (last,)
