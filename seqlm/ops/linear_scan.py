"""The general first-order scan, for any cell that is linear in its state."""

# B batch, T time, H state width

from torch import Tensor

from seqlm.errors import ShapeError
from seqlm.ops.dispatch import Op
from seqlm.ops.states import state_dtype

_op = Op("linear_scan")


def linear_scan(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """Solve h_t = a_t h_{t-1} + b_t for t = 1 .. T, elementwise in H.

    a, b: (B, T, H), any real values, T >= 1.  h0: (B, H), the state before the first step.
    Returns h: (B, T, H) in b's dtype, and h_T: (B, H), a copy and not a view.  The state is carried
    in float32 at least (float64 where an input is), and h_T comes in that dtype.  A backend may
    compute the gradient of a from h as it is returned, in b's dtype.
    Raises ShapeError when the three shapes disagree.
    Source: Blelloch, Prefix Sums and Their Applications, 1990, section 1.4; gradient: Martin and
    Cundy, Parallelizing Linear Recurrent Neural Nets Over Sequence Length, 2018, section 2.2.
    """
    batch, time, width = a.shape if a.ndim == 3 else (None, 0, None)
    if b.shape != a.shape or h0.shape != (batch, width) or time < 1:
        raise ShapeError(
            "A scan takes two tensors (B, T, H) with T >= 1 and a state (B, H); it was given "
            f"{tuple(a.shape)}, {tuple(b.shape)} and {tuple(h0.shape)}."
        )
    h, last = _op(a, b, h0.to(state_dtype(a, b, h0)))
    return h, last
