"""A recurrence whose output is its state, as a plain loop over time."""

# B batch, T time, H state width

from collections.abc import Callable

from torch import Tensor

from seqlm.ops.loop_over_time import loop_over_time


def fold(step: Callable[..., Tensor], drives: tuple[Tensor, ...], h0: Tensor) -> Tensor:
    """h_t = step(drives_t, h_{t-1}); drives (B, T, ...), h0 (B, ...) -> h (B, T, ...)."""

    def twice(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        h = step(*inputs)
        return h, h

    return loop_over_time(twice, drives, h0)[0]
