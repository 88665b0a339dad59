"""Any recurrence in which no unit depends on another, in parallel over time or by a loop.

A unit's state is one number or two.  The cell writes its step once.
"""

# B batch, T time, K drive width, S numbers of a unit's state (1 or 2), H units

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from seqlm.errors import ShapeError
from seqlm.ops.dispatch import Op
from seqlm.ops.states import state_dtype

SOLVERS = ("auto", "sequential", "newton")
State = tuple[Tensor, ...]
Recur = Callable[[Tensor, State], tuple[Tensor, State]]

_op = Op("diagonal_scan")


@dataclass
class NewtonCounts:
    """What Newton's method did in a block; a lane is a unit of one row of the batch."""

    calls: int = 0
    iterations: int = 0  # the most of any call
    lanes: int = 0
    fell_back: int = 0  # lanes that did not converge, so that the loop computed them


_counts: ContextVar[NewtonCounts | None] = ContextVar("seqlm_newton_counts", default=None)


@contextmanager
def count_newton(counts: NewtonCounts) -> Iterator[NewtonCounts]:
    """Count in `counts` what Newton's method does in the block."""
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)


def add_counts(iterations: int, open_lanes: Tensor) -> None:
    """Count one call; open_lanes: (B, H), True where it did not converge."""
    counts = _counts.get()
    if counts is not None:
        counts.calls += 1
        counts.iterations = max(counts.iterations, iterations)
        counts.lanes += open_lanes.numel()
        counts.fell_back += int(open_lanes.sum())


def diagonal_scan(
    recur: Recur, drive: Tensor, state: State, solver: str = "auto", bound: float = torch.inf
) -> tuple[Tensor, State]:
    """Apply `recur` step by step to a drive (B, T, K): its outputs (B, T, H) in the drive's dtype,
    and the last state, in float32 at least.

    recur: (..., K), S states (..., H) -> its output and S new states; the output is the first new
    state.  It is elementwise: a unit's new state depends on that unit's old state and no other.
    bound: if |state| is at most this, so is |next state|.  It also limits Newton's iterates.
    solver: "newton", "sequential" (a loop), or "auto", the faster one.  Where Newton's method does
    not converge in 16 iterations, a loop computes those rows of the batch.  Both solvers give the
    same values and gradients up to rounding.  Under Newton's method, later steps and other rows of
    the batch change a result by rounding only.
    Raises ShapeError when shapes disagree.
    Source: Lim et al., Parallelizing non-linear sequential models over the sequence length, ICLR
    2024 (the iteration, its gradient); Danieli et al., ParaRNN, arXiv 2510.21450 (small blocks).
    """
    assert solver in SOLVERS, solver
    if drive.ndim != 3 or not drive.shape[1] or any(len(s) != len(drive) for s in state):
        raise ShapeError(
            "A diagonal scan takes a drive (B, T, K) with T >= 1 and states (B, H); it was given "
            f"{', '.join(str(tuple(x.shape)) for x in (drive, *state))}."
        )
    dtype = state_dtype(drive, *state)
    inputs, first = drive.to(dtype), torch.stack([s.to(dtype) for s in state], dim=1)

    def step(drive: Tensor, h: Tensor) -> Tensor:
        return torch.stack(recur(drive, h.unbind(-2))[1], dim=-2)

    with torch.autocast(drive.device.type, enabled=False):
        (h,) = _op(inputs, first, step=step, solver=solver, bound=bound)
    return h[:, :, 0].to(drive.dtype), tuple(s.clone() for s in h[:, -1].unbind(1))
