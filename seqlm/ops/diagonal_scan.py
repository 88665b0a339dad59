"""Any recurrence whose units see only themselves, solved in parallel over time by Newton's method.

A unit is a state of one number or two.  All T steps are one system of equations, h_t = f(h_{t-1}),
whose linear part is a scan; its solution's gradient is one more scan, from the last step to the
first.  f is written once, by the cell, and torch derives it.
"""

# B batch, T time, K drive width, S numbers of a unit's state (1 or 2), H units

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.autograd.function import once_differentiable

from seqlm.errors import ShapeError
from seqlm.ops import _reference, _torch, backend
from seqlm.ops.block_scan import block_scan
from seqlm.ops.linear_scan import accumulator, before, linear_scan

SOLVERS = ("auto", "sequential", "newton")
MOST = 16  # iterations; of LEM with weights below 1/2, six do
LONG = 256  # steps from which on Newton's method is faster than a loop in Python,
FEW = 256  # where the units of a batch are no more than these, or are not on the CPU
ROUNDING = 8  # units in the last place that a solution may be away from its equation
State = tuple[Tensor, ...]
Recur = Callable[[Tensor, State], tuple[Tensor, State]]


@dataclass
class Solves:
    """What Newton's method did within `watched`; a lane is one unit of one row of the batch."""

    calls: int = 0
    iterations: int = 0  # the most that a call took
    lanes: int = 0
    fell_back: int = 0  # lanes that did not converge, which the sequential solver did in its place


_watched: ContextVar[Solves | None] = ContextVar("seqlm_solves", default=None)


@contextmanager
def watched(solves: Solves) -> Iterator[Solves]:
    """Count what the solver does in the block."""
    token = _watched.set(solves)
    try:
        yield solves
    finally:
        _watched.reset(token)


def diagonal_scan(
    recur: Recur, drive: Tensor, state: State, solver: str = "auto", bound: float = torch.inf
) -> tuple[Tensor, State]:
    """Fold `recur` over a drive (B, T, K): its outputs (B, T, H) in the drive's dtype, and the last
    state, in float32 at least.

    recur: (..., K), S states (..., H) -> its output, which is the first of them, and S new states;
    elementwise: a unit's new state depends on that unit's old one and on no other.
    bound: of every |state| after any step from states within it; iterates stay within, too.
    solver: "newton", "sequential" (a loop), or "auto", the one that is faster.  Where newton does
    not converge in 16 iterations, the rows of the batch are done by the loop.  Both give the same
    to rounding, in values and gradients; newton is causal and keeps rows apart to rounding only.
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
    exact = accumulator(drive, *state)
    inputs, first = drive.to(exact), torch.stack([s.to(exact) for s in state], dim=1)

    def step(drive: Tensor, h: Tensor) -> Tensor:
        return torch.stack(recur(drive, h.unbind(-2))[1], dim=-2)

    with torch.autocast(drive.device.type, enabled=False):
        if backend.of(drive, *state) == "reference":
            h = _reference.fold(step, (inputs,), first)
        else:
            with torch.no_grad():
                many = drive.device.type == "cpu" and first[:, 0].numel() > FEW
                faster = drive.shape[1] >= LONG and not many
                if solver == "newton" or (solver == "auto" and faster):
                    h = _newton(step, inputs, first, bound)
                else:
                    h = _reference.fold(step, (inputs,), first)
            if torch.is_grad_enabled():
                old = before(h, first)  # with a gradient for the first state alone
                h = _OverTime.apply(step(inputs, old), _linearised(step, inputs, old)[1])
    return h[:, :, 0].to(drive.dtype), tuple(s.clone() for s in h[:, -1].unbind(1))


class _OverTime(torch.autograd.Function):
    """The identity, behind which a gradient goes back through all steps before."""

    @staticmethod
    def forward(ctx, h: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(slopes)
        ctx.backend = backend.of(h)
        return h.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor) -> tuple[Tensor, None]:
        with backend.using(ctx.backend):
            whole = _scan(*_torch.reversed_gates(*_blocks(*ctx.saved_tensors, dh)))
        return whole.flip(1).view_as(dh), None


def _linearised(step: Callable, drive: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """f at `old`, (..., S, H), and its derivatives, (..., S, S, H): new by old."""
    _load_duals()
    # inference mode would leave derivatives out; they go forwards, one for every number of a unit
    with torch.inference_mode(False), torch.no_grad(), dual_level():
        slopes = []
        for i in range(old.shape[-2]):
            one = torch.zeros_like(old, memory_format=torch.contiguous_format)
            one[..., i, :] = 1
            new, by_this = unpack_dual(step(drive, make_dual(old.clone(), one)))
            slopes.append(by_this)
    return new, torch.stack(slopes, dim=-2)


@cache
def _load_duals() -> None:
    """At the first dual number torch loads scripts of its own, and warns that it has them."""
    with warnings.catch_warnings(), dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        make_dual(torch.zeros(1), torch.zeros(1))


def _blocks(slopes: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """As the scans take them: a state of one number has no dimension for it."""
    return (slopes, h) if h.shape[2] == 2 else (slopes[:, :, 0, 0], h[:, :, 0])


def _scan(a: Tensor, b: Tensor) -> Tensor:
    scan = linear_scan if a.ndim == b.ndim else block_scan
    return scan(a, b, torch.zeros_like(b[:, 0]))[0]


def _newton(step: Callable, drive: Tensor, first: Tensor, bound: float) -> Tensor:
    limit = first.abs().clamp(min=bound).unsqueeze(1)
    h = step(drive, torch.zeros_like(first).unsqueeze(1).expand(-1, drive.shape[1], -1, -1))
    tolerance = ROUNDING * torch.finfo(h.dtype).eps
    open_lanes = torch.ones_like(first[:, 0], dtype=torch.bool)  # (B, H)
    iterations = 0
    while iterations < MOST and open_lanes.any():
        new, slopes = _linearised(step, drive, before(h, first))
        residual = new - h
        correction = _scan(*_blocks(slopes, residual)).view_as(h)
        moved = torch.minimum(torch.maximum(h + correction, -limit), limit)
        h = torch.where(open_lanes[:, None, None], moved, h)
        # both small: the last correction's square is what is left, and it is below rounding, too
        solved = residual.abs() <= tolerance * new.abs().clamp(min=1)  # not where it is NaN
        solved &= correction.abs() <= tolerance**0.5
        open_lanes &= ~solved.all(2).all(1)
        iterations += 1
    rows = open_lanes.any(1)
    if rows.any():
        exact = _reference.fold(step, (drive[rows],), first[rows])
        h[rows] = torch.where(open_lanes[rows][:, None, None], exact, h[rows])
    _note(iterations, open_lanes)
    return h


def _note(iterations: int, open_lanes: Tensor) -> None:
    solves = _watched.get()
    if solves is not None:
        solves.calls += 1
        solves.iterations = max(solves.iterations, iterations)
        solves.lanes += open_lanes.numel()
        solves.fell_back += int(open_lanes.sum())
