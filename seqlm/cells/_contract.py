"""The interface of a cell: Cell, which a Block uses, and Recurrence, which needs less code.

Each file in this folder whose name has no leading underscore is a cell.  It defines one subclass of
Cell.  The constructor takes the width D and, as keyword-only arguments, the cell's options.
"""

# B batch, T time, D model width, K drive width, H state width

import torch
from torch import Tensor, nn

from seqlm import ops

State = tuple[Tensor, ...]
"""The memory of a cell: tensors (B, ...) in float32 or float64, whose size does not depend on T."""


class Cell(nn.Module):
    """Mixes a sequence over time; the whole sequence and single steps give the same function."""

    over_time = "step by step"  # how it computes a sequence in training; shown to users
    group = "other"  # a heading of `seqlm cells`: four, linear, gated, attention or windows

    def initial_state(self, batch: int) -> State:
        """The state before the first character."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """x: (B, T, D) -> (B, T, D) and the state after it, which owns its memory."""
        raise NotImplementedError

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x: (B, D), one character -> (B, D) and the state after it.

        Here it is a sequence of length 1.
        """
        y, state = self(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        """The share of its own state that each unit keeps in a step: {part of the state: (B, H)}.

        x, state: as in `step`.  It is empty for a cell without a gate on its own state.
        """
        return {}

    def after_step(self) -> None:
        """Called without gradients after every optimizer step: bring weights within their bounds.

        Change them in place, since a recorded training step reads them from where they are.
        """

    def zeros(self, batch: int, width: int) -> Tensor:
        """(B, width) zeros on the cell's device, in the dtype of the state."""
        own = next(self.parameters())
        dtype = torch.promote_types(own.dtype, torch.float32)
        return torch.zeros(batch, width, device=own.device, dtype=dtype)


class Composite(Cell):
    """A cell made of other cells: both forms run the same parts, each by its form of that name."""

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.initial_state(len(x)) if state is None else state
        return self._run("forward", x, state)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self._run("step", x, state)

    def _run(self, form: str, x: Tensor, state: State) -> tuple[Tensor, State]:
        """`forward` and `step` of the cell; form: the name of the method to call on its parts."""
        raise NotImplementedError


def chosen_rows(mask: Tensor, new: State, old: State) -> State:
    """The rows of `new` where the mask, (B,) bool, is true, and those of `old` elsewhere.

    A state with one row stands for B equal ones.
    """
    return tuple(
        torch.where(mask.view(-1, *[1] * (before.ndim - 1)), after, before)
        for after, before in zip(new, old, strict=True)
    )


class Recurrence(Cell):
    """A cell defined by one step: write project, recur and readout; forward follows from them."""

    def project(self, x: Tensor) -> Tensor:
        """x: (..., D) -> drive (..., K): everything that can be computed without the state."""
        raise NotImplementedError

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        """drive: (B, K) -> (B, H) and the next state: the recurrence itself, written once."""
        raise NotImplementedError

    def scan(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        """drive: (B, T, K) -> (B, T, H): recur over time; a faster op may override this loop."""
        return ops.loop_over_time(self.recur, (drive,), state)

    def readout(self, h: Tensor) -> Tensor:
        """h: (..., H) -> (..., D); here the identity, for H = D."""
        return h

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.initial_state(len(x)) if state is None else state
        h, state = self.scan(self.project(x), state)
        return self.readout(h.to(x.dtype)), state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h, state = self.recur(self.project(x), state)
        return self.readout(h.to(x.dtype)), state
