"""A trial of triton's kernels on the GPU of this machine, once a process.

Without a GPU, tests can only run the kernels in an interpreter.  So before the kernels of an op
first run on a device in a dtype, they and PyTorch's operations compute the same small case.  If
values or gradients differ, or the kernels fail, PyTorch's operations run in their place from then
on, and one warning names the op.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.runtime import first_line

Compute = Callable[[str, Tensors, dict[str, Any]], Tensors]  # backend, tensors, options -> outputs

# relative to the norm of what PyTorch computes in float32.  float32: the order of sums differs.
# bfloat16: kernels round what they store.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

# for each op: the shapes of its tensors, the number of leading tensors in the dtype of the trial
# (states and weights follow, in float32), and its options.  B 2, T 5, D 3.
CASES: dict[str, tuple[tuple[tuple[int, ...], ...], int, dict[str, Any]]] = {
    "linear_scan": (((2, 5, 3), (2, 5, 3), (2, 3)), 2, {}),
    "gated_scan": (((2, 5, 9), (2, 3)), 1, {"candidate": "positive"}),
    "gated_step": (((2, 6), (2, 3)), 1, {"candidate": "positive"}),
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


def fault(name: str, device: torch.device, dtype: torch.dtype, compute: Compute) -> str | None:
    """What is wrong with the kernels of an op on a device; None if they passed."""
    key = name, device.type, dtype
    if key not in _faults:
        _faults[key] = _difference(name, device, dtype, compute)
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
    """{"OP on DEVICE in DTYPE": "passed", or the fault}, for the trials of this process."""
    return {
        f"{name} on {device} in {str(dtype).removeprefix('torch.')}": fault or "passed"
        for (name, device, dtype), fault in _faults.items()
    }


def _difference(
    name: str, device: torch.device, dtype: torch.dtype, compute: Compute
) -> str | None:
    shapes, narrow, options = CASES[name]
    generator = torch.Generator().manual_seed(0)  # training draws from the global generator
    tensors = [torch.randn(shape, generator=generator) / 2 for shape in shapes]
    tensors = [x.to(device, dtype if i < narrow else None) for i, x in enumerate(tensors)]
    # the trial does not depend on the modes of the caller, and always needs gradients
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        try:
            ours = _values_and_gradients(compute, "triton", tensors, options)
        except Exception as error:  # each part of a long tool chain fails in its own way
            return f"triton fails here: {first_line(error)}"
        theirs = _values_and_gradients(compute, "torch", [x.float() for x in tensors], options)
    for i, (ours_i, right) in enumerate(zip(ours, theirs, strict=True)):
        distance = (ours_i.double() - right.double()).norm() / (right.double().norm() + 1e-30)
        if not distance <= TOLERANCE[dtype]:  # `not <=` is also true for NaN
            kind = "value" if i < len(ours) - len(tensors) else "gradient"
            return f"a {kind} is off by {distance:.2g} of its norm"
    return None


def _values_and_gradients(
    compute: Compute, backend: str, tensors: list[Tensor], options: dict[str, Any]
) -> list[Tensor]:
    own = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = compute(backend, tuple(own), options)
    loss = torch.zeros((), device=tensors[0].device)
    for y in outputs:
        weights = torch.arange(1, y.numel() + 1, device=y.device).sin().view_as(y)
        loss = loss + (y.float() * weights).sum()
    return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, own)]
