"""A diagonal recurrence solved in parallel over time by Newton's method, or by a loop.

All T steps are one system of equations, h_t = f(h_{t-1}), whose linear part is a scan; the gradient
of its solution is one more scan.
"""

# B batch, T time, K drive width, S numbers of a unit's state (1 or 2), H units

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import grad

from seqlm.ops.diagonal_scan import add_counts
from seqlm.ops.dispatch import Op
from seqlm.ops.reference.fold import fold
from seqlm.ops.states import Tensors, before
from seqlm.ops.torch.through_time import blocks, scan_from_zero
from seqlm.runtime import current_backend

MAX_ITERATIONS = 16  # LEM with weights below 1/2 needs six
# Newton's method is faster than a loop in Python for sequences of at least this many steps ...
NEWTON_STEPS = 256
NEWTON_LANES = 256  # ... and, on the CPU, at most this many units in all rows of the batch together
TOLERANCE_ULPS = 8  # units in the last place by which a solution may miss its equation

Step = Callable[[Tensor, Tensor], Tensor]  # drive (..., K), h (..., S, H) -> the new h

_through_time = Op("through_time")


def forward(
    drive: Tensor, first: Tensor, step: Step, solver: str, bound: float
) -> tuple[Tensors, Tensors]:
    """drive: (B, T, K), first: (B, S, H) -> h: (B, T, S, H)."""
    with torch.no_grad():
        many = drive.device.type == "cpu" and first[:, 0].numel() > NEWTON_LANES
        faster = drive.shape[1] >= NEWTON_STEPS and not many
        if solver == "newton" or (solver == "auto" and faster):
            h = newton(step, drive, first, bound)
        else:
            h = fold(step, (drive,), first)
    if torch.is_grad_enabled():
        # one more step from the solution connects the drive and the parameters to the graph.  Its
        # old states have no gradient but the first: `through_time` adds the gradient of the others
        old = before(h, first)
        slopes = linearised(step, drive, old)[1]
        (h,) = _through_time(step(drive, old), slopes, backend=current_backend())
    return (h,), ()


def newton(step: Step, drive: Tensor, first: Tensor, bound: float) -> Tensor:
    """The solution by iteration; a loop computes the rows of lanes that do not converge.

    All T steps are one system, h_t = f(h_{t-1}).  An iteration linearises f at the present states
    and solves the linear system, which is a scan.  After i iterations at least the first i states
    are correct, and usually all states converge quadratically.
    """
    # a state far outside the possible range would make the next linearisation useless
    limit = first.abs().clamp(min=bound).unsqueeze(1)
    h = step(drive, torch.zeros_like(first).unsqueeze(1).expand(-1, drive.shape[1], -1, -1))
    tolerance = TOLERANCE_ULPS * torch.finfo(h.dtype).eps
    open_lanes = torch.ones_like(first[:, 0], dtype=torch.bool)  # (B, H), not yet solved
    iterations = 0
    while iterations < MAX_ITERATIONS and open_lanes.any():
        new, slopes = linearised(step, drive, before(h, first))
        residual = new - h
        correction = scan_from_zero(*blocks(slopes, residual)).view_as(h)
        moved = torch.minimum(torch.maximum(h + correction, -limit), limit)
        h = torch.where(open_lanes[:, None, None], moved, h)
        # the remaining error is about the square of the last correction, so a correction below the
        # root of the tolerance leaves an error below rounding.  NaN compares as not solved.
        solved = residual.abs() <= tolerance * new.abs().clamp(min=1)
        solved &= correction.abs() <= tolerance**0.5
        open_lanes &= ~solved.all(2).all(1)
        iterations += 1
    rows = open_lanes.any(1)
    if rows.any():
        exact = fold(step, (drive[rows],), first[rows])
        h[rows] = torch.where(open_lanes[rows][:, None, None], exact, h[rows])
    add_counts(iterations, open_lanes)
    return h


def linearised(step: Step, drive: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """f at `old`, (..., S, H), and its slopes d(new state)/d(old state), (..., S, S, H).

    A unit's new state depends on no other unit, so the gradient of the sum over all units has the
    slopes of each.  (PyTorch's forward mode gives the same, but takes seconds to load.)
    """
    # inference mode computes no gradients, and its tensors cannot take part in one later
    with torch.inference_mode(False), torch.enable_grad():
        old = old.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        new = step(drive.clone() if drive.is_inference() else drive.detach(), old)
        slopes = [grad(part.sum(), old, retain_graph=True)[0] for part in new.unbind(-2)]
    return new.detach(), torch.stack(slopes, dim=-3)
