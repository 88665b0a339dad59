"""The scan whose gates are 2 x 2 blocks, for cells of two coupled states."""

# B batch, T time, H state width

from torch import Tensor

from seqlm.errors import ShapeError
from seqlm.ops.dispatch import Op
from seqlm.ops.states import state_dtype

_op = Op("block_scan")


def block_scan(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """Solve h_t = A_t h_{t-1} + b_t for t = 1 .. T, where a unit's state is a pair of numbers.

    a: (B, T, 2, 2, H), row and column of every unit's block.  b: (B, T, 2, H), T >= 1.
    h0: (B, 2, H), the state before the first step.
    Returns h: (B, T, 2, H) in b's dtype, and h_T: (B, 2, H), a copy and not a view.  The state is
    carried in float32 at least (float64 where an input is), and h_T comes in that dtype.  A backend
    may compute the gradient of a from h as it is returned, in b's dtype.
    Raises ShapeError when the three shapes disagree.
    Source: Blelloch, Prefix Sums and Their Applications, 1990, section 1.4.
    """
    batch, time, width = (len(b), b.shape[1], b.shape[3]) if b.ndim == 4 else (None, 0, None)
    right = (batch, time, 2, 2, width), (batch, time, 2, width), (batch, 2, width)
    if time < 1 or (a.shape, b.shape, h0.shape) != right:
        raise ShapeError(
            "A block scan takes gates (B, T, 2, 2, H) and inputs (B, T, 2, H) with T >= 1 and a "
            f"state (B, 2, H); it was given {tuple(a.shape)}, {tuple(b.shape)} and "
            f"{tuple(h0.shape)}."
        )
    h, last = _op(a, b, h0.to(state_dtype(a, b, h0)))
    return h, last
