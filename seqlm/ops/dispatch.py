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

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from seqlm import runtime
from seqlm.ops import trial
from seqlm.ops.states import Tensors

FASTEST = {"cpu": "cpu", "cuda": "triton"}  # what "auto" means on a device
NEXT = {"cpu": "torch", "triton": "torch", "torch": "reference"}
COMPILED_DTYPES = (torch.float32, torch.bfloat16)  # what the loops and the kernels read


@dataclass(frozen=True, slots=True)
class Code:
    """What a backend's file for an op offers."""

    backend: str
    forward: Callable[..., tuple[Tensors, tuple[Tensor | None, ...]]]
    backward: Callable[..., tuple[Tensor | None, ...]] | None
    serves: Callable[..., bool] | None


@cache
def _code(backend: str, name: str) -> Code | None:
    """A backend's code for an op; None where it has no file for it."""
    path = f"seqlm.ops.{backend}.{name}"
    if find_spec(path) is None:
        return None
    file = import_module(path)
    optional = (getattr(file, part, None) for part in ("backward", "serves"))
    return Code(backend, file.forward, *optional)


class Op:
    """An op by its name: `Op("gated_scan")(drive, h0, candidate="linear")` -> its outputs."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *tensors: Tensor | None, **form: Any) -> Tensors:
        """Run the op; tensors are what a gradient may be wanted of, the form is everything else."""
        if torch.compiler.is_compiling():
            from seqlm.ops import untraced

            return untraced.call(self.run, tensors, form)
        return self.by(self.code(tensors, form), tensors, form)

    def run(self, tensors: tuple[Tensor | None, ...], form: dict[str, Any]) -> Tensors:
        return self.by(self.code(tensors, form), tensors, form)

    def code(self, tensors: tuple[Tensor | None, ...], form: dict[str, Any]) -> Code:
        """The code that serves these tensors, on the backend that holds now or one behind it."""
        first, backend = tensors[0], runtime.current_backend()
        assert first is not None
        if backend == "auto":
            backend = "cpu" if first.is_cpu else FASTEST.get(first.device.type, "torch")
        while backend != "reference":
            if backend == "torch" or _reads(backend, first, tensors):
                code = _code(backend, self.name)
                if code is not None and (code.serves is None or code.serves(*tensors, **form)):
                    if backend != "triton" or not self.trial_fault(first.device, first.dtype):
                        return code
            backend = NEXT[backend]
        return self.reference()

    def reference(self) -> Code:
        code = _code("reference", self.name)
        assert code is not None, self.name
        return code

    def by(self, code: Code, tensors: tuple[Tensor | None, ...], form: dict[str, Any]) -> Tensors:
        """The outputs of a code, with its gradient where one is wanted."""
        if code.backward is not None and torch.is_grad_enabled():
            if any(x is not None and x.requires_grad for x in tensors):
                return _Differentiated.apply(self.name, code, form, *tensors)
        return code.forward(*tensors, **form)[0]

    def trial_fault(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """What is wrong with triton's kernels of the op; None where they are right."""
        return trial.fault(self.name, device, dtype, self._by_triton, self._by_torch)

    def _by_triton(self, tensors: Tensors, form: dict[str, Any]) -> Tensors:
        code = _code("triton", self.name)
        assert code is not None, self.name
        return self.by(code, tensors, form)

    def _by_torch(self, tensors: Tensors, form: dict[str, Any]) -> Tensors:
        with runtime.using_backend("torch"):
            return self.run(tensors, form)


def fused(name: str, *tensors: Tensor) -> bool:
    """Whether a backend has a fast form of the op for these tensors, beside the plain loop."""
    if torch.compiler.is_compiling():
        from seqlm.ops import untraced

        return untraced.call(_has_fast_form, name, tensors)
    return _has_fast_form(name, tensors)


def _has_fast_form(name: str, tensors: Tensors) -> bool:
    return Op(name).code(tensors, {}).backend != "reference"


def try_kernels(device: str) -> dict[str, str]:
    """Try triton's kernels of every op on a device; {"OP on DEVICE in DTYPE": "passed" or a fault}.

    Empty where triton cannot run on the device at all.
    """
    if runtime.why_not("triton", device) is None:
        for name in trial.CASES:
            for dtype in COMPILED_DTYPES:
                Op(name).trial_fault(torch.device(device), dtype)
    return trial.results()


def _reads(backend: str, first: Tensor, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether compiled code of a backend can run here, and reads all of the tensors."""
    on_cpu = first.is_cpu
    if backend == "cpu" and not on_cpu:
        return False
    for x in tensors:
        if x is not None and (x.dtype not in COMPILED_DTYPES or x.is_cpu != on_cpu):
            return False
    return runtime.why_not(backend, "cpu" if on_cpu else first.device.type) is None


class _Differentiated(torch.autograd.Function):
    """An op whose gradient is written by hand.

    ctx is Any because it carries the attributes that `forward` gives it.
    """

    @staticmethod
    def forward(
        ctx: Any, name: str, code: Code, form: dict[str, Any], *tensors: Tensor | None
    ) -> Tensors:
        outputs, saved = code.forward(*tensors, **form)
        ctx.name, ctx.code, ctx.form = name, code, form
        ctx.save_for_backward(*saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
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
