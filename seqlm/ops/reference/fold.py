"""A recurrence as a plain loop over time."""

# B batch, T time, H state width

from collections.abc import Callable

import torch
from torch import Tensor


def fold(step: Callable[..., Tensor], drives: tuple[Tensor, ...], h0: Tensor) -> Tensor:
    """h_t = step(drives_t, h_{t-1}); drives (B, T, ...), h0 (B, ...) -> h (B, T, ...)."""
    h, steps = h0, []
    # unbind, not drive[:, t]: the gradient of each slice would be as large as the whole sequence
    for at_t in zip(*(drive.unbind(1) for drive in drives), strict=True):
        h = step(*at_t, h)
        steps.append(h)
    return torch.stack(steps, dim=1)
