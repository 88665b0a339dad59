"""Records a model's step, a function of tensors, as a program that one call runs.

The step runs once, and the operations on its tensors are written down with their addresses.  So
the step of the model stays the only formula.  A step that does anything else is not recorded.  The
program reads the weights where they are, and so notices when they change in place.  A matrix with
only numbers of bfloat16 is read from a copy of half the size, as long as it does not change.
"""

# B batch, D width, H state width, I inputs, O outputs, K kernel

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seqlm.graphs import Function, refuse_difference
from seqlm.ops.cpu import program
from seqlm.ops.cpu.activations import GELU, RELU, SILU, TANH
from seqlm.ops.cpu.helpers import helpers
from seqlm.ops.observer import Observer, recorder
from seqlm.ops.states import Tensors
from seqlm.runtime import first_line

MOST_ROWS = 64  # of a batch
# while recording: a prime number, so that the program's batch is not taken for another size
RECORDED_ROWS = 67

# PyTorch's operations, by their names
ALLOCATIONS = {"empty.memory_format", "empty_like", "new_empty", "empty_strided"}
ACTIVATIONS = {"tanh": TANH, "relu": RELU, "silu": SILU, "gelu": GELU}
SUMS = {"add.Tensor": 1.0, "sub.Tensor": -1.0}


class NotRecordable(Exception):
    """The step does something that no instruction does."""


class Recorder(Observer):
    """Writes down what runs under it: PyTorch's operations, and the ops of seqlm.

    An op of seqlm only allocates its output here, so that values are meaningless while recording.
    """

    def __init__(self, weights: Sequence[Tensor]):
        super().__init__()
        self.instructions: list[list[int]] = []
        self.constants: list[tuple[float, float]] = []
        self.weights = {x.untyped_storage().data_ptr() for x in weights}
        self.copied = [x for x in weights if _is_bfloat16(x)]
        self.halves = {x.data_ptr(): x.detach().bfloat16() for x in self.copied}
        self.made: set[int] = set()  # storages that the program itself writes
        self.kept: list[Tensor] = []  # so that no two of them share memory

    def make(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """New memory of the program."""
        x = torch.empty(shape, dtype=dtype)
        self._keep(x)
        return x

    def _keep(self, x: Tensor) -> None:
        self.kept.append(x)
        self.made.add(x.untyped_storage().data_ptr())

    def add(
        self,
        operation: int,
        out: Tensor,
        *operands: Tensor | None,
        option: int = 0,
        alpha: float = 1.0,
        beta: float = 0.0,
    ) -> None:
        """Add an instruction; an operand's rows are repeated for those of `out`."""
        if not 1 <= out.ndim <= 3:
            raise NotRecordable(f"{out.ndim} dimensions")
        *before, width = out.shape
        places, widths, alone = self._place(out, out.shape), [], True
        for x in operands:
            own = width if x is None or x.shape[-1:] in ((), (1,)) else x.shape[-1]
            place = [0, 0, 0] if x is None else self._place(x, (*before, own))
            if x is not None and not place[1] and self._is_made(x):
                alone = False  # every row needs the same row, which one thread has written
            places += place
            widths.append(own)
        rows, inner = (*before, 1, 1)[:2]
        if rows != RECORDED_ROWS and not rows * inner % RECORDED_ROWS:
            raise NotRecordable("rows of a batch that are rearranged")
        linear = operation in (program.LINEAR, program.HALF_LINEAR)
        apart = not alone or rows != RECORDED_ROWS or linear
        a, b, *_ = *widths, 0, 0
        head = [operation, rows, inner, width, a, b, option, apart]
        self.instructions.append((head + places + [0] * 9)[: program.COLUMNS])
        self.constants.append((alpha, beta))

    def _is_made(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self.made

    def _place(self, x: Tensor, shape: Sequence[int]) -> list[int]:
        """The address of x, and the numbers from row to row and from inner row to inner row."""
        if not x.ndim:
            raise NotRecordable("a number in a tensor")
        if x.dtype == torch.bfloat16:  # a copy of a weight
            return [x.data_ptr(), 0, 0]
        if not self._is_made(x) and x.untyped_storage().data_ptr() not in self.weights:
            raise NotRecordable("a tensor that is neither an input nor a weight")
        if x.dtype == torch.int64:
            return [x.data_ptr(), 0, 0]
        if x.dtype != torch.float32:
            raise NotRecordable(str(x.dtype))
        *steps, last = x.expand(*shape).stride()
        if last != 1 and shape[-1] != 1:
            raise NotRecordable("a tensor whose rows have gaps")
        outer, inner = (*steps, 0, 0)[:2]
        return [x.data_ptr(), outer, inner]

    def finished(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The program, its constants, and which instructions work on the rows of the batch."""
        table = np.array(self.instructions, dtype=np.int64)
        apart = table[:, program.MEETS].astype(bool)
        table[:, program.MEETS] = apart | np.append(apart[1:], True)
        batched = table[:, program.ROWS] == RECORDED_ROWS
        return table, np.array(self.constants, dtype=np.float32), batched

    # PyTorch's operations

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.name().removeprefix("aten::").removesuffix(".default")
        result = function(*args, **(kwargs or {}))
        if name in ALLOCATIONS:
            self._keep(result)
        elif name in ("clone", "_to_copy") or (function.is_view and name != "as_strided"):
            self._view(args[0], result)
        elif kwargs or not isinstance(result, Tensor):
            raise NotRecordable(name)
        elif name == "cat":
            self._cat(result, *args)
        else:
            self._keep(result)
            self._elementwise(name, result, *args)
        return result

    def _view(self, x: Tensor, result: Any) -> None:
        """A view, or a copy if PyTorch cannot make it a view."""
        here = x.untyped_storage().data_ptr()
        for y in result if isinstance(result, tuple | list) else [result]:
            if y.untyped_storage().data_ptr() != here:
                self._keep(y)
                self.add(program.COPY, y.view(x.shape) if y.is_contiguous() else y, x)

    def _cat(self, y: Tensor, parts: Sequence[Tensor], dim: int = 0) -> None:
        self._keep(y)
        start = 0
        for x in parts:
            size = x.shape[dim]
            self.add(program.COPY, y.narrow(dim, start, size), x)
            start += size

    def _elementwise(self, name: str, y: Tensor, x: Any, *others: Any) -> None:
        number = others[0] if others and isinstance(others[0], int | float) else None
        if name == "embedding" and len(others) == 1:
            self.add(program.ROW, y, x.view(-1), others[0], option=len(x))
        elif name in ACTIVATIONS and not others:
            self.add(program.ACTIVATION, y, x, option=ACTIVATIONS[name])
        elif name == "sigmoid":
            self.add(program.SIGMOID, y, x)
        elif name in SUMS and len(others) == 1:
            sign = SUMS[name]
            if number is None:
                self.add(program.SUM, y, x, others[0], alpha=sign)
            else:
                self.add(program.AFFINE, y, x, beta=sign * number)
        elif name == "rsub.Scalar" and len(others) == 1 and number is not None:
            self.add(program.AFFINE, y, x, alpha=-1.0, beta=number)
        elif name == "mul.Tensor":
            if number is None:
                self.add(program.PRODUCT, y, x, others[0])
            else:
                self.add(program.AFFINE, y, x, alpha=number)
        elif name == "pow.Tensor_Scalar" and number == 2:
            self.add(program.PRODUCT, y, x, x)
        elif name == "lerp.Tensor":
            self.add(program.MIX, y, x, *others)
        else:
            raise NotRecordable(name)

    # The ops of seqlm

    def run_op(self, name: str, tensors: Sequence[Any], options: Any) -> Tensors:
        record: Callable[..., Tensor] | None = getattr(self, f"_op_{name}", None)
        if record is None:
            raise NotRecordable(name)
        return (record(*tensors, **options),)

    def _op_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y, inputs = self.make(*x.shape[:-1], len(weight)), weight.shape[1]
        if x.ndim != 2 or x.shape[1] != inputs or not weight.is_contiguous():
            raise NotRecordable("a linear layer of other shapes")
        half = self.halves.get(weight.data_ptr())
        if half is None or half.shape != weight.shape:
            self.add(program.LINEAR, y, x, weight.view(-1), bias, option=inputs)
        else:
            self.add(program.HALF_LINEAR, y, x, half.view(-1), bias, option=inputs)
        return y

    def _op_rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        y = self.make(*x.shape)
        self.add(program.NORM, y, x, weight)
        return y

    def _op_gelu(self, x: Tensor) -> Tensor:
        y = self.make(*x.shape)
        self.add(program.ACTIVATION, y, x, option=GELU)
        return y

    def _op_gated_step(self, drive: Tensor, h: Tensor, candidate: str) -> Tensor:
        new = self.make(*h.shape)
        self.add(program.GATED, new, h, drive, option=candidate == "positive")
        return new

    def _op_causal_conv(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        batch, places, width = x.shape
        if places != weight.shape[-1] or not weight.is_contiguous() or not x.is_contiguous():
            raise NotRecordable("a convolution with several outputs")
        y = self.make(batch, 1, width)
        self.add(program.CONVOLUTION, y[:, 0], x.view(batch, -1), weight.view(-1), bias)
        return y


class Recording:
    """A step as a program with its memory, for any number of rows up to MOST_ROWS."""

    def __init__(self, step: Function, inputs: Tensors, weights: Sequence[Tensor]):
        found = Recorder(weights)
        copies = tuple(found.make(RECORDED_ROWS, *x.shape[1:], dtype=x.dtype) for x in inputs)
        copies[0].zero_()  # symbols that exist
        for x in copies:
            # the address that is read is set before each call; an int64 is copied as two words
            words = x.view(torch.float32).view(RECORDED_ROWS, *x.shape[1:-1], -1)
            found.add(program.COPY, words, words)
        token = recorder.set(found.run_op)
        try:
            with torch.inference_mode(), found:
                outputs = step(*copies)
        finally:
            recorder.reset(token)
        for y in outputs:
            found.add(program.COPY, found.make(*y.shape), y)
        self.program, self.constants, self.batched = found.finished()
        self.kept, self.lock, self.rows = found.kept, Lock(), RECORDED_ROWS
        self.halves = found.halves  # keeps their memory
        self.copied = [(x, x._version) for x in found.copied]
        self.shapes = [tuple(y.shape[1:]) for y in outputs]
        self.input_shapes = [x.shape[1:] for x in inputs]
        self.addresses = self.program.ctypes.data, self.constants.ctypes.data, len(self.program)
        self.read = self.program[: len(inputs), program.A]
        self.written = self.program[-len(outputs) :, program.OUT]

    def __call__(self, inputs: Tensors) -> Tensors | None:
        """The outputs, in new memory; None if a symbol does not exist.  inputs: contiguous."""
        rows = len(inputs[0])
        outputs = tuple([torch.empty(rows, *shape) for shape in self.shapes])
        with self.lock:
            if rows != self.rows:
                self.rows = self.program[self.batched, program.ROWS] = rows
            self.read[:] = [x.data_ptr() for x in inputs]
            self.written[:] = [y.data_ptr() for y in outputs]
            return outputs if helpers().run(*self.addresses) else None


class OneCall:
    """A model's step, recorded at its first call.

    Calls with inputs that the recording cannot take run the step itself.  So do all calls, if the
    step cannot be recorded, or if the recording gives other numbers, which a RuntimeWarning tells.
    """

    def __init__(self, model: nn.Module, step: Function):
        self.model, self.step = model, step
        self.recording: Recording | None = None
        self.lock = Lock()
        self.weights: list[tuple[dict[str, Any], str, int]] = []

    def __call__(self, *inputs: Tensor) -> Tensors:
        inputs = tuple([x.contiguous() for x in inputs])
        with self.lock:
            if self._moved():
                self._record(inputs)
            recording = self.recording
        if recording is None or not _fit(recording, inputs):
            return self.step(*inputs)
        result = recording(inputs)
        return self.step(*inputs) if result is None else result

    def _moved(self) -> bool:
        """Whether weights are elsewhere in memory, as PyTorch may put a new tensor in their place;
        or whether one of those that were copied has changed."""
        for weight, version in self.recording.copied if self.recording else ():
            if weight._version != version:
                return True
        for tensors, name, address in self.weights:
            x = tensors.get(name)
            if x is None or x.data_ptr() != address:
                return True
        return not self.weights

    def _record(self, inputs: Tensors) -> None:
        # where each weight stands in its module, and its address
        self.weights = [
            (tensors, name, x.data_ptr())
            for module in self.model.modules()
            for tensors in (module._parameters, module._buffers)
            for name, x in tensors.items()
            if x is not None
        ]
        self.recording = None
        weights = [tensors[name] for tensors, name, _ in self.weights]
        with suppress(NotRecordable):
            try:
                found = Recording(self.step, inputs, weights)
                _compare(found, self.step, inputs)
                self.recording = found
            except RuntimeError as error:  # from torch, or from refuse_difference
                text = f"Not compiled as one call, so slower: {first_line(error)}"
                warnings.warn(text, RuntimeWarning, stacklevel=5)


def _is_bfloat16(weight: Tensor) -> bool:
    """Whether a copy in bfloat16 is exact, and a later change of the weight can be seen."""
    if weight.ndim != 2 or weight.dtype != torch.float32 or weight.is_inference():
        return False
    return torch.equal(weight.bfloat16().float(), weight)


def _fit(recording: Recording, inputs: Tensors) -> bool:
    """Whether a recording can take these inputs."""
    symbols, *state = inputs
    if symbols.dtype is not torch.int64 or not 1 <= len(symbols) <= MOST_ROWS:
        return False
    for x in state:  # a loop, because all() of a generator takes twice as long
        if x.dtype is not torch.float32 or type(x) is not Tensor:
            return False
    return [x.shape[1:] for x in inputs] == recording.input_shapes


def _compare(recording: Recording, step: Function, inputs: Tensors) -> None:
    """Raises RuntimeError if a recording gives other numbers than the step."""
    if _fit(recording, inputs):
        # with another state, because the memory may still hold the right results for this one
        others = inputs[0], *(x + 0.125 for x in inputs[1:])
        right, result = step(*others), recording(others)
        if result is not None and all(y.isfinite().all() for y in right):
            refuse_difference(result, right)
