"""LEM's recurrence over a whole sequence."""

# B batch, T time, D width

from torch import Tensor

from seqlm.errors import ShapeError
from seqlm.ops.dispatch import Op
from seqlm.ops.states import state_dtype

_op = Op("lem_scan")


def lem_scan(
    drive: Tensor, y0: Tensor, z0: Tensor, from_y: Tensor, from_z: Tensor, dt: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y_t for t = 1 .. T in the drive's dtype, and the last y and z in the state's dtype.

    drive: (B, T, 4 D), what the input adds to the gate of z, the gate of y, the new z and the new
    y.  y0, z0: (B, D).  from_y: (3 D, D), the weights of y in the first three; from_z: (D, D),
    the weights of z in the last.  Raises ShapeError for other shapes.
    Source: Rusch et al., Long Expressive Memory for Sequence Modeling, ICLR 2022, equation 3.
    """
    shapes = [tuple(x.shape) for x in (drive, y0, z0, from_y, from_z)]
    batch, time = drive.shape[:2] if drive.ndim == 3 else (None, 0)
    width = y0.shape[-1]
    state, weights = (batch, width), [(3 * width, width), (width, width)]
    if time < 1 or shapes != [(batch, time, 4 * width), state, state, *weights]:
        raise ShapeError(
            "LEM's scan takes a drive (B, T, 4 D) with T >= 1, states (B, D) and weights (3 D, D) "
            f"and (D, D); it was given {', '.join(map(str, shapes))}."
        )
    dtype = state_dtype(drive, y0)
    h, y, z = _op(drive, y0.to(dtype), z0.to(dtype), from_y, from_z, dt=dt)
    return h, y, z
