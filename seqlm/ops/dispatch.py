"""Which code runs an op: one class that chooses, and one autograd Function for every gradient.

An op is a public function in `ops/<op>.py`.  A backend's code for it is in `ops/<backend>/<op>.py`:

    forward(*tensors, **options) -> outputs, saved      two tuples of tensors
    backward(saved, gradients, **options) -> gradients  one for every tensor argument, or None
    serves(*tensors, **options) -> bool                 optional: False for unsupported arguments

Without `backward`, autograd differentiates `forward`.  If a backend has no file for an op, or does
not serve the arguments, the next backend is asked.  After cpu and triton comes torch; after torch
comes reference, which has every op.  A file is imported when it is first needed, because numba and
triton take seconds to import.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from seqlm import runtime
from seqlm.ops import trial
from seqlm.ops.observer import recorder
from seqlm.ops.states import Tensors

FASTEST = {"cpu": "cpu", "cuda": "triton"}  # what "auto" means on a device
NEXT = {"cpu": "torch", "triton": "torch", "torch": "reference"}
Result = TypeVar("Result")
COMPILED_DTYPES = (torch.float32, torch.bfloat16)  # what the loops and the kernels read


def _untraced(function: Callable[..., Result], *arguments: object) -> Result:
    """function(*arguments), run as plain Python under torch.compile."""
    if torch.compiler.is_compiling():
        from seqlm.ops import untraced

        return untraced.call(function, *arguments)
    return function(*arguments)


@dataclass(frozen=True, slots=True)
class Code:
    """What a backend's file for an op offers."""

    backend: str
    forward: Callable[..., tuple[Tensors, tuple[Tensor | None, ...]]]
    backward: Callable[..., tuple[Tensor | None, ...]] | None
    serves: Callable[..., bool] | None


@cache
def _code(backend: str, name: str) -> Code | None:
    """A backend's code for an op; None if it has no file for it."""
    path = f"seqlm.ops.{backend}.{name}"
    if find_spec(path) is None:
        return None
    file = import_module(path)
    return Code(
        backend, file.forward, getattr(file, "backward", None), getattr(file, "serves", None)
    )


class Op:
    """An op by its name: `Op("gated_scan")(drive, h0, candidate="linear")` -> its outputs."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *tensors: Tensor | None, **options: Any) -> Tensors:
        """Run the op.  Tensors can have a gradient; options have none."""
        return _untraced(self.run, tensors, options)

    def run(self, tensors: tuple[Tensor | None, ...], options: dict[str, Any]) -> Tensors:
        record = recorder.get()
        if record is not None:
            return record(self.name, tensors, options)
        return self.compute(self.code(tensors, options), tensors, options)

    def code(self, tensors: tuple[Tensor | None, ...], options: dict[str, Any]) -> Code:
        """The code of the current backend; if it does not serve these, of the next that does."""
        first, backend = tensors[0], runtime.current_backend()
        assert first is not None
        device = "cpu" if first.is_cpu else first.device.type
        if backend == "auto":
            backend = FASTEST.get(device, "torch")
        # every call of an op runs this: the cheap tests that refuse most often come first
        while backend != "reference":
            compiled = backend != "torch"
            if not compiled or runtime.why_not(backend, device) is None:
                code = _code(backend, self.name)
                if code is not None and (code.serves is None or code.serves(*tensors, **options)):
                    if not compiled or self._compiled_code_reads(backend, tensors):
                        return code
            backend = NEXT[backend]
        return self._reference()

    def _compiled_code_reads(self, backend: str, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether all tensors are on one kind of device, in dtypes that a compiled backend reads,
        and triton's kernels passed their trial."""
        first = tensors[0]
        assert first is not None
        on_cpu = first.is_cpu
        for x in tensors:  # a loop, because all() of a generator takes twice as long
            if x is not None and (x.dtype not in COMPILED_DTYPES or x.is_cpu != on_cpu):
                return False
        return backend != "triton" or self.trial_fault(first.device, first.dtype) is None

    def _reference(self) -> Code:
        code = _code("reference", self.name)
        assert code is not None, self.name
        return code

    def compute(
        self, code: Code, tensors: tuple[Tensor | None, ...], options: dict[str, Any]
    ) -> Tensors:
        """The outputs of a code, connected to autograd where a gradient is needed."""
        if code.backward is not None and torch.is_grad_enabled():
            if any(x is not None and x.requires_grad for x in tensors):
                return _Differentiated.apply(self.name, code, options, *tensors)
        return code.forward(*tensors, **options)[0]

    def trial_fault(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """What is wrong with triton's kernels of the op; None if they passed their trial."""
        return trial.fault(self.name, device, dtype, self._on)

    def _on(self, backend: str, tensors: Tensors, options: dict[str, Any]) -> Tensors:
        """The outputs by a backend's code, or by the reference where it has none for the op."""
        return self.compute(_code(backend, self.name) or self._reference(), tensors, options)


def fused(name: str, *tensors: Tensor) -> bool:
    """Whether a backend has a faster form of the op for these tensors than the plain loop."""
    return _untraced(Op(name).code, tensors, {}).backend != "reference"


def in_one_call(model: nn.Module, step: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """The step of a model as one compiled call, where the backend cpu can do that; else itself.

    step: takes symbols, (B,) int64, and state tensors, and returns logits and state tensors.  It
    depends on nothing but these and the model's weights, which may change between calls.
    """

    compiled: Callable[..., Tensors] | None = None

    def call(*inputs: Tensor) -> Tensors:
        nonlocal compiled
        plain = model.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        if plain or runtime.current_backend() not in ("auto", "cpu"):
            return step(*inputs)
        if compiled is None:
            if runtime.why_not("cpu", inputs[0].device.type) is not None:
                return step(*inputs)
            from seqlm.ops.cpu.recording import OneCall

            compiled = OneCall(model, step)
        return compiled(*inputs)

    return call


def try_kernels(device: str) -> dict[str, str]:
    """Try triton's kernels of every op on a device; {"OP on DEVICE in DTYPE": "passed" or a fault}.

    Empty where triton cannot run on the device at all.
    """
    if runtime.why_not("triton", device) is None:
        for name in trial.CASES:
            for dtype in COMPILED_DTYPES:
                Op(name).trial_fault(torch.device(device), dtype)
    return trial.results()


class _Differentiated(torch.autograd.Function):
    """An op whose gradient is written by hand.

    ctx is Any because it carries the attributes that `forward` gives it.
    """

    @staticmethod
    def forward(
        ctx: Any, name: str, code: Code, options: dict[str, Any], *tensors: Tensor | None
    ) -> Tensors:
        outputs, saved = code.forward(*tensors, **options)
        ctx.name, ctx.code, ctx.options = name, code, options
        ctx.save_for_backward(*saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # create_graph=True: autograd would record `backward` and differentiate only the PyTorch
        # operations in it, which gives wrong numbers without an error
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"The gradient of {ctx.name} is written by hand and cannot be differentiated again "
                '(create_graph=True). Compute forwards and backwards on the backend "reference", '
                'which can: with seqlm.runtime.using_backend("reference").'
            )
        needed = ctx.needs_input_grad[3:]
        # it chooses its dtypes itself, also where the caller differentiates under autocast
        with torch.autocast(gradients[0].device.type, enabled=False):
            results = ctx.code.backward(ctx.saved_tensors, gradients, **ctx.options)
        return None, None, None, *(d if n else None for d, n in zip(results, needed, strict=True))


def _trial_of_triton(device: str) -> str | None:
    """Why triton's kernels cannot run on a device: most often, a C compiler is missing."""
    return Op("linear_scan").trial_fault(torch.device(device), torch.float32)


runtime.TRIALS["triton"] = _trial_of_triton
