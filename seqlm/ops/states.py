"""What ops share: a type, the dtype of a state, the state before each step."""

# B batch, T time, H state width

import torch
from torch import Tensor

# a backend's `forward` returns two of these, outputs and saved; `backward` takes two, returns one
Tensors = tuple[Tensor, ...]


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype a state is carried in: float32, or float64 where an input is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def before(h: Tensor, h0: Tensor) -> Tensor:
    """h_{t-1} for every t: (B, T, ...), from h: (B, T, ...) and the first state h0: (B, ...)."""
    return torch.cat([h0.unsqueeze(1), h[:, :-1]], dim=1)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products on x: autocast's where autocast is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
