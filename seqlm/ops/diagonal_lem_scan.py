"""The recurrence of a diagonal LEM in one forward and one backward pass over time."""

# B batch, T time, D width

from torch import Tensor

from seqlm.errors import ShapeError
from seqlm.ops.dispatch import Op
from seqlm.ops.states import state_dtype

_op = Op("diagonal_lem_scan")


def diagonal_lem_scan(
    drive: Tensor, y0: Tensor, z0: Tensor, weights: Tensor, dt: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y_t for t = 1 .. T in the drive's dtype, and the last y and z in the state's dtype.

    drive: (B, T, 4 D), what the input adds to the gate of z, the gate of y, the new z and the new
    y.  y0, z0: (B, D).  weights: (4, D), in the same order: the first three multiply y, the last z.
    Raises ShapeError for other shapes.
    Source: Rusch et al., Long Expressive Memory for Sequence Modeling, ICLR 2022, equation 3, with
    diagonal matrices.
    """
    shapes = [tuple(x.shape) for x in (drive, y0, z0, weights)]
    batch, time = drive.shape[:2] if drive.ndim == 3 else (None, 0)
    width = y0.shape[-1]
    state = batch, width
    if time < 1 or shapes != [(batch, time, 4 * width), state, state, (4, width)]:
        raise ShapeError(
            "A diagonal LEM's scan takes a drive (B, T, 4 D) with T >= 1, states (B, D) and "
            f"weights (4, D); it was given {', '.join(map(str, shapes))}."
        )
    dtype = state_dtype(drive, y0)
    h, y, z = _op(drive, y0.to(dtype), z0.to(dtype), weights.to(dtype), dt=dt)
    return h, y, z
