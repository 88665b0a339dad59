"""The Mogrifier LSTM's recurrence over a whole sequence."""

# B batch, T time, D width, R rounds

from torch import Tensor

from seqlm.errors import ShapeError
from seqlm.ops.dispatch import Op
from seqlm.ops.states import state_dtype

_op = Op("mogrifier_scan")


def mogrifier_scan(
    x: Tensor, h0: Tensor, c0: Tensor, rounds: Tensor, gates: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns h_t for t = 1 .. T in x's dtype, and the last h and c in the state's dtype.

    x: (B, T, D).  h0, c0: (B, D).  rounds: (R, D, D), the matrices of the rounds: Q computes the
    gate of x from h in odd rounds, and R the gate of h from x in even ones.  gates: (4 D, 2 D), the
    matrices [W, U] of the arguments of i, f, g and o; bias: (4 D,).  Raises ShapeError for other
    shapes.
    Source: Melis et al., Mogrifier LSTM, arXiv 1909.01792, equations 1 and 2.
    """
    shapes = [tuple(tensor.shape) for tensor in (x, h0, c0, rounds, gates, bias)]
    batch, time, width = x.shape if x.ndim == 3 else (0, 0, 0)
    weights = [(len(rounds), width, width), (4 * width, 2 * width), (4 * width,)]
    if time < 1 or shapes != [(batch, time, width), *[(batch, width)] * 2, *weights]:
        raise ShapeError(
            "Mogrifier's scan takes x (B, T, D) with T >= 1, states (B, D) and weights (R, D, D), "
            f"(4 D, 2 D) and (4 D,); it was given {', '.join(map(str, shapes))}."
        )
    dtype = state_dtype(x, h0)
    h, last_h, last_c = _op(x, h0.to(dtype), c0.to(dtype), rounds, gates, bias)
    return h, last_h, last_c
