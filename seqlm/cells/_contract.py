"""The contract of a cell: what a Block needs of it, and the shorter one that recurrences write.

A file in this folder is a cell: it holds one subclass of Cell, whose constructor takes the width
D and the cell's options as keyword-only arguments.
"""

# B batch, T time, D model width, K drive width, H state width

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]
"""What a cell remembers: tensors (B, ...) of at least float32, whose size does not depend on T."""


class Cell(nn.Module):
    """Mixes a sequence over time; the whole sequence and single steps give the same function."""

    over_time = "step by step"  # or how else it trains over a sequence

    def initial_state(self, batch: int) -> State:
        """The state before the first character."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """x: (B, T, D) -> (B, T, D) and the state after it, which owns its memory."""
        raise NotImplementedError

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x: (B, D), one character -> (B, D) and the state after it."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called without gradients after every optimizer step: bring weights within their bounds.

        Change them in place, since a recorded training step reads them from where they are.
        """

    def zeros(self, batch: int, width: int) -> Tensor:
        """(B, width) zeros where the cell lives, in the dtype its state is carried in."""
        own = next(self.parameters())
        dtype = torch.promote_types(own.dtype, torch.float32)
        return torch.zeros(batch, width, device=own.device, dtype=dtype)


class Recurrence(Cell):
    """A cell given by its step: write project, recur and readout, get the sequence for free."""

    def project(self, x: Tensor) -> Tensor:
        """x: (..., D) -> drive (..., K): all work that does not need the state."""
        raise NotImplementedError

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        """drive: (B, K) -> (B, H) and the next state: the recurrence itself, written once."""
        raise NotImplementedError

    def scan(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        """drive: (B, T, K) -> (B, T, H): recur over time; a fast op may replace this fold."""
        outputs = []
        # unbind, not drive[:, t]: the backward of a slice is as large as the whole sequence
        for at_t in drive.unbind(1):
            h, state = self.recur(at_t, state)
            outputs.append(h)
        return torch.stack(outputs, dim=1), state

    def readout(self, h: Tensor) -> Tensor:
        """h: (..., H) -> (..., D); as it is where H = D."""
        return h

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.initial_state(len(x)) if state is None else state
        h, state = self.scan(self.project(x), state)
        return self.readout(h.to(x.dtype)), state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h, state = self.recur(self.project(x), state)
        return self.readout(h.to(x.dtype)), state
