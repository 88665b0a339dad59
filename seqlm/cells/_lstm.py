"""The step of an LSTM, whatever its gates are computed from."""

# B batch, D width

import torch
from torch import Tensor

from seqlm.cells._contract import Recurrence, State


class LSTMStep(Recurrence):
    """An LSTM with D units; its state is (h, c).  A subclass says what the gates are."""

    width: int

    def initial_state(self, batch: int) -> State:
        return self.zeros(batch, self.width), self.zeros(batch, self.width)

    def logits(self, drive: Tensor, h: Tensor) -> Tensor:
        """(B, 4 D): the arguments of i, f, g and o, side by side."""
        raise NotImplementedError

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        _, c = state
        i, f, g, o = self._gates(drive, *state)
        c = f * c + i * torch.tanh(g)
        h = o * torch.tanh(c)
        return h, (h, c)

    def _gates(self, drive: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """i_t, f_t, the argument of g_t's tanh, o_t"""
        i, f, g, o = self.logits(drive, h.to(drive.dtype)).to(c.dtype).chunk(4, dim=-1)
        return torch.sigmoid(i), torch.sigmoid(f), g, torch.sigmoid(o)

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        return {"c": self._gates(self.project(x), *state)[1]}
