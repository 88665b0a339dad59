"""Which code runs an op: one class that chooses, and one autograd Function for every gradient.

An op is a public function in `ops/<op>.py`.  What computes it stands in `ops/<backend>/<op>.py`:

    forward(*tensors, **form) -> outputs, saved      two tuples of tensors
    backward(saved, gradients, **form) -> gradients  one for every tensor argument, or None
    serves(*tensors, **form) -> bool                 optional: False where it cannot do a case

Without `backward`, autograd differentiates `forward`.  A backend that has no file for an op, or
that does not serve a case, leaves it to the next one: cpu and triton to torch, torch to reference,
which has every op.  A file is imported when it is first wanted, since numba and triton take
seconds.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqlm import runtime
from seqlm.ops import trial

FASTEST = {"cpu": "cpu", "cuda": "triton"}  # the backend that "auto" means on a device
NEXT = {"cpu": "torch", "triton": "torch", "torch": "reference"}
COMPILED = ("cpu", "triton")  # backends that read memory themselves, and so only these:
COMPILED_DTYPES = (torch.float32, torch.bfloat16)


class Op:
    """An op by its name: `Op("gated_scan")(drive, h0, candidate="linear")` -> its outputs."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *tensors: Tensor | None, **form: Any) -> tuple[Tensor, ...]:
        """Run the op; tensors are what a gradient may be wanted of, the form is everything else."""
        if torch.compiler.is_compiling():
            from seqlm.ops.untraced import run

            return run(self, tensors, form)
        return self.run(tensors, form)

    def run(self, tensors: tuple[Tensor | None, ...], form: dict[str, Any]) -> tuple[Tensor, ...]:
        return run_code(self.name, self.code(tensors, form), tensors, form)

    def code(self, tensors: tuple[Tensor | None, ...], form: dict[str, Any]) -> ModuleType:
        """The file that computes the op on these tensors, on the backend that holds now."""
        backend = runtime.current_backend()
        if backend == "auto":
            backend = FASTEST.get(tensors[0].device.type, "torch")
        while backend != "reference":
            if backend not in COMPILED or _reads(backend, tensors):
                code = _code(backend, self.name)
                if code is not None and self._serves(backend, code, tensors, form):
                    return code
            backend = NEXT[backend]
        return _code("reference", self.name)

    def _serves(self, backend: str, code: ModuleType, tensors: tuple, form: dict) -> bool:
        if hasattr(code, "serves") and not code.serves(*tensors, **form):
            return False
        return backend != "triton" or self.trial_fault(tensors[0].device, tensors[0].dtype) is None

    def trial_fault(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """What is wrong with triton's kernels of the op; None where they are right."""
        return trial.fault(self.name, device, dtype, self._by_triton, self._by_torch)

    def _by_triton(self, tensors: tuple, form: dict) -> tuple[Tensor, ...]:
        return run_code(self.name, _code("triton", self.name), tensors, form)

    def _by_torch(self, tensors: tuple, form: dict) -> tuple[Tensor, ...]:
        with runtime.using_backend("torch"):
            return self.run(tensors, form)


def fused(name: str, *tensors: Tensor) -> bool:
    """Whether a backend has a fast form of the op for these tensors, beside the plain loop."""
    if torch.compiler.is_compiling():
        from seqlm.ops import untraced

        return untraced.fused(name, *tensors)
    return Op(name).code(tensors, {}) is not _code("reference", name)


@cache
def _code(backend: str, name: str) -> ModuleType | None:
    path = f"seqlm.ops.{backend}.{name}"
    return import_module(path) if find_spec(path) else None


def _reads(backend: str, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether compiled code of a backend can run here, and reads all of the tensors."""
    device = "cpu" if backend == "cpu" else tensors[0].device.type
    for x in tensors:
        if x is not None and (x.dtype not in COMPILED_DTYPES or x.device.type != device):
            return False
    return runtime.why_not(backend, device) is None


def run_code(
    name: str, code: ModuleType, tensors: tuple[Tensor | None, ...], form: dict[str, Any]
) -> tuple[Tensor, ...]:
    """The outputs of a file's `forward`, with its `backward` where a gradient is wanted."""
    if hasattr(code, "backward") and torch.is_grad_enabled():
        if any(x is not None and x.requires_grad for x in tensors):
            return _Differentiated.apply(name, code, form, *tensors)
    return code.forward(*tensors, **form)[0]


class _Differentiated(torch.autograd.Function):
    """An op whose gradient is written by hand."""

    @staticmethod
    def forward(ctx, name: str, code: ModuleType, form: dict[str, Any], *tensors: Tensor | None):
        outputs, saved = code.forward(*tensors, **form)
        ctx.name, ctx.code, ctx.form = name, code, form
        ctx.save_for_backward(*saved)
        return outputs

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        # create_graph=True: autograd would record `backward` and differentiate only those parts of
        # it that are PyTorch's operations, which gives wrong numbers without a word
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"The gradient of {ctx.name} is written by hand and cannot be differentiated again "
                '(create_graph=True). Compute forwards and backwards on the backend "reference", '
                'which can: with seqlm.runtime.using_backend("reference").'
            )
        wanted = ctx.needs_input_grad[3:]
        found = ctx.code.backward(ctx.saved_tensors, gradients, **ctx.form)
        return None, None, None, *(d if w else None for d, w in zip(found, wanted, strict=True))


def _trial_of_triton(device: str) -> str | None:
    """Why triton's kernels cannot run on a device: it needs a C compiler, above all."""
    return Op("linear_scan").trial_fault(torch.device(device), torch.float32)


runtime.TRIALS["triton"] = _trial_of_triton
