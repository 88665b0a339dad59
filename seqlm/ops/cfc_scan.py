"""CfC's recurrence, with a backbone of one layer, over a whole sequence."""

# B batch, T time, D width, U backbone units

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlm.errors import ShapeError
from seqlm.ops.dispatch import Op
from seqlm.ops.states import before, state_dtype


def lecun_tanh(x: Tensor) -> Tensor:
    return 1.7159 * torch.tanh(0.666 * x)


# of the backbone; compiled code receives the index of an activation in this order
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "lecun_tanh": lecun_tanh,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
}

_op = Op("cfc_scan")


def cfc_scan(
    drive: Tensor, h0: Tensor, from_h: Tensor, heads: Tensor, bias: Tensor,
    activation: str, gated: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns h_t for t = 1 .. T in the drive's dtype, and the last h in the state's dtype.

        p = activation(drive_t + from_h h_{t-1}),   [f_1, f_2, k] = heads p + bias,   s = sigmoid(k)
        h_t = tanh(f_1) (1 - s) + s tanh(f_2)      without `gated`, tanh(f_1) + s tanh(f_2)

    drive: (B, T, U).  h0: (B, D).  from_h: (U, D).  heads: (3 D, U), bias: (3 D,); k is the sum of
    the two published time heads, which are both linear in p.  Raises ShapeError for other shapes.
    Source: Hasani et al., Closed-form continuous-time neural networks, 2022, equation 10.
    """
    shapes = [tuple(x.shape) for x in (drive, h0, from_h, heads, bias)]
    (batch, time, units), width = drive.shape, h0.shape[-1]
    weights = (units, width), (3 * width, units), (3 * width,)
    if time < 1 or shapes != [(batch, time, units), (batch, width), *weights]:
        raise ShapeError(
            "CfC's scan takes a drive (B, T, U) with T >= 1, a state (B, D), weights (U, D) and "
            f"(3 D, U), a bias (3 D,); it was given {', '.join(map(str, shapes))}."
        )
    h0 = h0.to(state_dtype(drive, h0))
    h, last = _op(drive, h0, from_h, heads, bias, activation=activation, gated=gated)
    return h, last


def index_of(activation: str) -> int:
    """The index by which compiled code selects an activation."""
    return list(ACTIVATIONS).index(activation)


def weight_gradients(
    d_drive: Tensor, d_heads: Tensor, saved: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/d(from_h, heads, bias), each one product or sum over all steps.

    d_drive: (B, T, U).  d_heads: (B, T, 3 D), dL/d(f_1, f_2, k).  saved: as compiled code keeps it.
    """
    h0, from_h, heads, bias, h, kept = saved
    units = len(from_h)
    d_p, d_f = d_drive.flatten(0, 1), d_heads.flatten(0, 1)
    d_from_h = d_p.t() @ before(h, h0.to(h.dtype)).flatten(0, 1)
    d_weights = d_f.t() @ kept[..., units : 2 * units].flatten(0, 1)
    d_bias = d_f.sum(0, dtype=torch.float32)
    return d_from_h.to(from_h.dtype), d_weights.to(heads.dtype), d_bias.to(bias.dtype)
