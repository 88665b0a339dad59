"""A trial of kernels that cannot be tested where they are written: once a process, where they run.

Before triton's kernels of an op first run on a device in a dtype, a small case is computed by them
and by PyTorch's operations.  Where values or gradients differ, or something fails, the op is left
to PyTorch, with one warning that names it.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqlm.runtime import first_line

Run = Callable[[tuple[Tensor, ...], dict[str, Any]], tuple[Tensor, ...]]

# relative to the norm of what PyTorch computes in float32.  float32: the order of sums.  bfloat16:
# kernels round what they store.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

# op: shapes of its tensors, how many of the first are in the dtype of the trial (the others, states
# and weights, are in float32), and its form.  B 2, T 5, D 3.
CASES: dict[str, tuple[tuple[tuple[int, ...], ...], int, dict[str, Any]]] = {
    "linear_scan": (((2, 5, 3), (2, 5, 3), (2, 3)), 2, {}),
    "gated_scan": (((2, 5, 9), (2, 3)), 1, {"candidate": "positive"}),
    "gated_step": (((2, 6), (2, 3)), 1, {"candidate": "positive"}),
    "block_scan": (((2, 5, 2, 2, 3), (2, 5, 2, 3), (2, 2, 3)), 2, {}),
    "lem_scan": (((2, 5, 12), (2, 3), (2, 3), (9, 3), (3, 3)), 1, {"dt": 0.7}),
    "cfc_scan": (
        ((2, 5, 4), (2, 3), (4, 3), (9, 4), (9,)),
        1,
        {"activation": "lecun_tanh", "gated": True},
    ),
    "diagonal_lem_scan": (((2, 5, 12), (2, 3), (2, 3), (4, 3)), 1, {"dt": 0.7}),
    "diagonal_cfc_scan": (((2, 5, 12), (2, 3), (3, 3)), 1, {"gated": True, "tau": 1.5}),
    "causal_conv": (((2, 8, 3), (3, 1, 4), (3,)), 1, {}),
    "rms_norm": (((2, 5, 3), (3,)), 1, {}),
}

_faults: dict[tuple[str, str, torch.dtype], str | None] = {}


def fault(
    name: str, device: torch.device, dtype: torch.dtype, kernels: Run, plain: Run
) -> str | None:
    """What is wrong with the kernels of an op on a device; None where they are right."""
    key = name, device.type, dtype
    if key not in _faults:
        _faults[key] = _difference(name, device, dtype, kernels, plain)
        if _faults[key] is not None:
            warnings.warn(
                f"Triton's kernels of {name} are left out on this {device.type} in "
                f"{str(dtype).removeprefix('torch.')}: {_faults[key]}. PyTorch's operations run in "
                "their place.",
                RuntimeWarning,
                stacklevel=2,
            )
    return _faults[key]


def results() -> dict[str, str]:
    """{"OP on DEVICE in DTYPE": "passed", or what is wrong}, of the trials of this process."""
    return {
        f"{name} on {device} in {str(dtype).removeprefix('torch.')}": found or "passed"
        for (name, device, dtype), found in _faults.items()
    }


def _difference(
    name: str, device: torch.device, dtype: torch.dtype, kernels: Run, plain: Run
) -> str | None:
    tensors = _case(name, device, dtype)
    form = CASES[name][2]
    # whatever mode the caller is in, the trial compares the same numbers, with their gradients
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        try:
            ours = _values_and_gradients(kernels, tensors, form)
        except Exception as error:  # each part of a long tool chain fails in its own way
            return f"triton fails here: {first_line(error)}"
        theirs = _values_and_gradients(plain, [x.float() for x in tensors], form)
    for i, (found, right) in enumerate(zip(ours, theirs, strict=True)):
        distance = (found.double() - right.double()).norm() / (right.double().norm() + 1e-30)
        if not distance <= TOLERANCE[dtype]:  # not where it is NaN either
            kind = "value" if i < len(ours) - len(tensors) else "gradient"
            return f"a {kind} is off by {distance:.2g} of its norm"
    return None


def _case(name: str, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    shapes, narrow, _ = CASES[name]
    numbers = torch.Generator().manual_seed(0)  # of its own: training draws from the global one
    tensors = [torch.randn(shape, generator=numbers) / 2 for shape in shapes]
    return [x.to(device, dtype if i < narrow else None) for i, x in enumerate(tensors)]


def _values_and_gradients(run: Run, tensors: list[Tensor], form: dict[str, Any]) -> list[Tensor]:
    own = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = run(tuple(own), form)
    loss = torch.zeros((), device=tensors[0].device)
    for y in outputs:
        weights = torch.arange(1, y.numel() + 1, device=y.device).sin().view_as(y)
        loss = loss + (y.float() * weights).sum()
    return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, own)]
