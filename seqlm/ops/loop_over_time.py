"""A recurrence as a plain loop over time."""

# B batch, T time

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

State = TypeVar("State")


def loop_over_time(
    step: Callable[..., tuple[Tensor, State]], drives: tuple[Tensor, ...], state: State
) -> tuple[Tensor, State]:
    """drives (B, T, ...) -> the outputs (B, T, ...) and the last state.

    step(*drives_t, state) returns an output (B, ...) and the next state.
    """
    outputs = []
    # unbind, not drive[:, t]: the gradient of each slice would be as large as the whole sequence
    for at_t in zip(*(drive.unbind(1) for drive in drives), strict=True):
        output, state = step(*at_t, state)
        outputs.append(output)
    return torch.stack(outputs, dim=1), state
