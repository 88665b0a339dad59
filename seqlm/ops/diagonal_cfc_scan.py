"""The recurrence of a diagonal CfC in one forward and one backward pass over time."""

# B batch, T time, D width, P parts of the drive

from torch import Tensor

from seqlm.errors import ShapeError
from seqlm.ops.dispatch import Op
from seqlm.ops.states import state_dtype

_op = Op("diagonal_cfc_scan")


def diagonal_cfc_scan(
    drive: Tensor, h0: Tensor, weights: Tensor, gated: bool, tau: float
) -> tuple[Tensor, Tensor]:
    """Returns h_t for t = 1 .. T in the drive's dtype, and the last h in the state's dtype.

        [f_1, f_2, k, l] = drive_t + [w_1 h_{t-1}, w_2 h_{t-1}, w_k h_{t-1}, 0],  s = sigmoid(tau k)
        c_t = tanh(f_1) (1 - s) + s tanh(f_2)      without `gated`, tanh(f_1) + s tanh(f_2)
        h_t = h_{t-1} + sigmoid(l) (c_t - h_{t-1})      c_t itself where the drive has no l

    drive: (B, T, 3 D) or (B, T, 4 D).  h0: (B, D).  weights: (3, D).
    Raises ShapeError for other shapes.
    Source: Hasani et al., Closed-form continuous-time neural networks, 2022, equation 10, without a
    backbone and with diagonal weights.
    """
    batch, time, parts = drive.shape if drive.ndim == 3 else (None, 0, 0)
    width = h0.shape[-1]
    fits = h0.shape == (batch, width) and weights.shape == (3, width)
    if time < 1 or not fits or parts not in (3 * width, 4 * width):
        raise ShapeError(
            "A diagonal CfC's scan takes a drive (B, T, 3 D) or (B, T, 4 D) with T >= 1, a state "
            f"(B, D) and weights (3, D); it was given {tuple(drive.shape)}, {tuple(h0.shape)} and "
            f"{tuple(weights.shape)}."
        )
    dtype = state_dtype(drive, h0)
    h, last = _op(drive, h0.to(dtype), weights.to(dtype), gated=gated, tau=tau)
    return h, last
