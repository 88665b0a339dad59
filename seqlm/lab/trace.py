"""The step of a model as a list of ONNX operators, recorded while it runs once.

The step runs under a mode of PyTorch that sees every operator of ATen, PyTorch's own set.  Each of
them becomes one or a few operators of ONNX.  An operator that depends on weights alone is not
recorded; its result becomes a constant.  So a cell is exported from its own code, and a new cell
needs no code here unless it uses an operator that LOWERED lacks.
"""

# B batch, D width, K kernel

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqlm.cells import State
from seqlm.config import cell_key, stack
from seqlm.errors import SeqlmError, not_finite
from seqlm.ops.observer import Observer
from seqlm.run import Run
from seqlm.runtime import using_backend

SYMBOL, LOGITS = "symbol", "logits"
Value = Tensor | str | float  # an operator's input: a tensor, the name of a value, or a number


class Node(NamedTuple):
    """An operator of ONNX with one output.

    Reshape, Slice, ReduceMean and ReduceSum have attributes for what ONNX takes as inputs.
    """

    operator: str
    inputs: tuple[str, ...]
    output: str
    shape: tuple[int, ...]  # of the output, for a batch of 1
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Graph:
    """A step: `symbol` and the states of `state_names` -> the values named in `outputs`.

    The first output is the logits; the others are the new states in the order of the old ones.
    """

    cell: str  # a cell from a file by its name, since the path is nobody's business
    initial: State
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    @property
    def state_names(self) -> list[str]:
        return [f"state_{i}" for i in range(len(self.initial))]

    def matrices(self) -> set[str]:
        """The names of the constants that are matrices of products, or the embedding."""
        place = {"Gemm": 1, "Gather": 0}
        return {n.inputs[place[n.operator]] for n in self.nodes if n.operator in place}


def trace(run: Run) -> Graph:
    """Record one step of the run's model.

    Raises SeqlmError for a cell whose step uses an operator that cannot be exported, and for
    weights that are not finite.
    """
    model = copy.deepcopy(run.model).cpu().eval()
    cell = ",".join(map(cell_key, stack(run.config.cell.name)))
    symbol, state = torch.tensor([model.beginning]), model.initial_state(1)
    recorder = _Recorder(Graph(cell, state), model)
    for name, tensor in zip([SYMBOL, *recorder.graph.state_names], [symbol, *state], strict=True):
        recorder.bind(tensor, name)
    # the reference consists of PyTorch's operators, which the mode sees; loops are opaque to it
    with torch.no_grad(), using_backend("reference"), recorder:
        logits, new_state = model.step(symbol, state)
    if not logits.isfinite().all():
        raise not_finite()
    recorder.graph.outputs.extend(recorder.name(tensor) for tensor in (logits, *new_state))
    return recorder.graph


class _Recorder(Observer):
    """Fills a graph with what PyTorch computes."""

    def __init__(self, graph: Graph, model: torch.nn.Module):
        super().__init__()
        self.graph = graph
        self.weights = {(w.data_ptr(), w.numel()): name for name, w in model.named_parameters()}
        self.names: dict[int, str] = {}  # of values that depend on the inputs, by id
        self.alive: list[Tensor] = []  # so that no id is used twice

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given: list[Any] = []
        for argument in (*args, *kwargs.values()):
            given += argument if isinstance(argument, list | tuple) else [argument]
        if any(id(x) in self.names for x in given):
            name = function.overloadpacket.__name__
            if function._schema.is_mutable:
                self._refuse_views_of(args[0], name)
                name = name.removesuffix("_")
            if name not in LOWERED:
                raise self.unsupported(name)
            LOWERED[name](self, result, *args, **kwargs)
        return result

    def _refuse_views_of(self, tensor: Tensor, operator: str) -> None:
        """A change in place would change views of the tensor, too, which have their own names."""
        memory = tensor.untyped_storage().data_ptr()
        if any(x is not tensor and x.untyped_storage().data_ptr() == memory for x in self.alive):
            raise self.unsupported(f"{operator} on a tensor with views")

    def unsupported(self, operator: str) -> SeqlmError:
        return SeqlmError(
            f"The step of {self.graph.cell} computes {operator}, which cannot be exported. Export "
            "a run with another cell, or write the cell with other operators."
        )

    def bind(self, tensor: Tensor, value: Value) -> None:
        """From now on, the tensor stands for a value of the graph."""
        if tensor.dtype not in (torch.float32, torch.bool, torch.int64):
            raise self.unsupported(f"numbers of the type {tensor.dtype}")
        self.alive.append(tensor)
        self.names[id(tensor)] = self.name(value)

    def name(self, value: Value) -> str:
        """The name of a value; a tensor that is not a value yet becomes a constant."""
        if isinstance(value, str):
            return value
        if isinstance(value, Tensor) and id(value) in self.names:
            return self.names[id(value)]
        constants = self.graph.constants
        if isinstance(value, Tensor):
            own = self.weights.get((value.data_ptr(), value.numel()))
            name = f"constant_{len(constants)}" if own is None else own
            if name in constants and constants[name].shape != value.shape:
                name = f"constant_{len(constants)}"
            constants[name] = value.detach().contiguous()
            return name
        constants[str(value)] = torch.tensor(value, dtype=torch.float32)
        return str(value)

    def emit(
        self, operator: str, inputs: Sequence[Value], shape: Sequence[int], **attributes: Any
    ) -> str:
        """Append a node; returns the name of its output."""
        name = f"value_{len(self.graph.nodes)}"
        names = tuple(self.name(value) for value in inputs)
        self.graph.nodes.append(Node(operator, names, name, tuple(shape), attributes))
        return name


# How operators of ATen are written: functions of the recorder, the result and the arguments.
Lowering = Callable[..., None]


def _same(operator: str, inputs: int) -> Lowering:
    """An operator that ONNX has, too; arguments beyond the inputs are not known to it."""

    def lower(r: _Recorder, out: Tensor, *args: Value, **options: Any) -> None:
        if len(args) > inputs or options:
            raise r.unsupported(f"{operator} with options")
        r.bind(out, r.emit(operator, args, out.shape))

    return lower


def _sum_of(operator: str) -> Lowering:
    def lower(r: _Recorder, out: Tensor, x: Value, y: Value, *, alpha: float = 1) -> None:
        if alpha != 1:
            shape = y.shape if isinstance(y, Tensor) else ()
            y = r.emit("Mul", (y, alpha), shape)
        r.bind(out, r.emit(operator, (x, y), out.shape))

    return lower


def _rsub(r: _Recorder, out: Tensor, x: Value, y: Value, alpha: float = 1) -> None:
    _sum_of("Sub")(r, out, y, x, alpha=alpha)


def _lerp(r: _Recorder, out: Tensor, start: Value, end: Value, weight: Value) -> None:
    difference = r.emit("Sub", (end, start), out.shape)
    r.bind(out, r.emit("Add", (start, r.emit("Mul", (weight, difference), out.shape)), out.shape))


def _silu(r: _Recorder, out: Tensor, x: Value) -> None:
    r.bind(out, r.emit("Mul", (x, r.emit("Sigmoid", (x,), out.shape)), out.shape))


def _expm1(r: _Recorder, out: Tensor, x: Value) -> None:
    """2 t / (1 - t) with t = tanh(x / 2), because exp(x) - 1 loses digits near 0."""
    t = r.emit("Tanh", (r.emit("Mul", (x, 0.5), out.shape),), out.shape)
    double, rest = r.emit("Mul", (t, 2.0), out.shape), r.emit("Sub", (1.0, t), out.shape)
    r.bind(out, r.emit("Div", (double, rest), out.shape))


def _logaddexp(r: _Recorder, out: Tensor, x: Value, y: Value) -> None:
    """max(x, y) + log(1 + exp(-|x - y|))"""
    apart = r.emit("Abs", (r.emit("Sub", (x, y), out.shape),), out.shape)
    rest = r.emit("Softplus", (r.emit("Neg", (apart,), out.shape),), out.shape)
    r.bind(out, r.emit("Add", (r.emit("Max", (x, y), out.shape), rest), out.shape))


def _rsqrt(r: _Recorder, out: Tensor, x: Value) -> None:
    r.bind(out, r.emit("Reciprocal", (r.emit("Sqrt", (x,), out.shape),), out.shape))


def _ones_like(r: _Recorder, out: Tensor, x: Value, **_: Any) -> None:
    zeros = r.emit("Mul", (x, 0.0), out.shape)  # not a constant, because the batch has any size
    r.bind(out, r.emit("Add", (zeros, 1.0), out.shape))


def _pow(r: _Recorder, out: Tensor, x: Value, exponent: Value) -> None:
    if exponent != 2:
        raise r.unsupported("a power other than a square")
    r.bind(out, r.emit("Mul", (x, x), out.shape))


def _clamp(
    r: _Recorder, out: Tensor, x: Value, low: Value | None = None, high: Value | None = None
) -> None:
    if low is not None:
        x = r.emit("Max", (x, low), out.shape)
    r.bind(out, x if high is None else r.emit("Min", (x, high), out.shape))


def _alias(r: _Recorder, out: Tensor, x: Tensor, *shape: Any, **options: Any) -> None:
    """The same numbers in the same shape."""
    if out.shape != x.shape or out.dtype != x.dtype:
        raise r.unsupported(f"{x.dtype} {tuple(x.shape)} as {out.dtype} {tuple(out.shape)}")
    r.bind(out, x)


def _reshape(r: _Recorder, out: Tensor, x: Value, *_: Any) -> None:
    r.bind(out, r.emit("Reshape", (x,), out.shape))


def _transpose(r: _Recorder, out: Tensor, x: Tensor, first: int = 0, second: int = 1) -> None:
    order = [*range(x.ndim)]
    order[first], order[second] = order[second], order[first]
    r.bind(out, r.emit("Transpose", (x,), out.shape, perm=order))


def _permute(r: _Recorder, out: Tensor, x: Tensor, order: Sequence[int]) -> None:
    r.bind(out, r.emit("Transpose", (x,), out.shape, perm=[axis % x.ndim for axis in order]))


def _part(r: _Recorder, x: Tensor, dim: int, start: int, size: int) -> str:
    """Name of x at start .. start + size - 1 of a dimension."""
    axis = dim % x.ndim
    shape = [*x.shape]
    shape[axis] = size
    return r.emit("Slice", (x,), shape, axis=axis, start=start, end=start + size)


def _split(r: _Recorder, out: Sequence[Tensor], x: Tensor, size: Any, dim: int = 0) -> None:
    start = 0
    for part in out:
        r.bind(part, _part(r, x, dim, start, part.shape[dim]))
        start += part.shape[dim]


def _slice(
    r: _Recorder,
    out: Tensor,
    x: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> None:
    if step != 1:
        raise r.unsupported("a slice with a step")
    first, _, _ = slice(start, end).indices(x.shape[dim])
    r.bind(out, _part(r, x, dim, first, out.shape[dim]))


def _select(r: _Recorder, out: Tensor, x: Tensor, dim: int, index: int) -> None:
    part = _part(r, x, dim, index % x.shape[dim], 1)
    r.bind(out, r.emit("Reshape", (part,), out.shape))


def _unbind(r: _Recorder, out: Sequence[Tensor], x: Tensor, dim: int = 0) -> None:
    for index, part in enumerate(out):
        _select(r, part, x, dim, index)


def _cat(r: _Recorder, out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> None:
    r.bind(out, r.emit("Concat", parts, out.shape, axis=dim % out.ndim))


def _stack(r: _Recorder, out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> None:
    axis = dim % out.ndim
    shape = [*out.shape]
    shape[axis] = 1
    rows = [r.emit("Reshape", (part,), shape) for part in parts]
    r.bind(out, r.emit("Concat", rows, out.shape, axis=axis))


def _mm(r: _Recorder, out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None = None) -> None:
    """x y, or x y + bias; the weights of a Gemm have a row for each output."""
    if id(y) in r.names or y.ndim != 2:
        product = r.emit("MatMul", (x, y), out.shape)
        r.bind(out, product if bias is None else r.emit("Add", (product, bias), out.shape))
    else:
        inputs = (x, y.t()) if bias is None else (x, y.t(), bias)
        r.bind(out, r.emit("Gemm", inputs, out.shape, transB=1))


def _addmm(r: _Recorder, out: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> None:
    _mm(r, out, x, y, bias)


def _embedding(r: _Recorder, out: Tensor, table: Tensor, symbols: Tensor, *_: Any) -> None:
    r.bind(out, r.emit("Gather", (table, symbols), out.shape))


def _reduce(operator: str) -> Lowering:
    def lower(
        r: _Recorder,
        out: Tensor,
        x: Tensor,
        dims: Sequence[int] | None = None,
        keepdim: bool = False,
        **_: Any,
    ) -> None:
        axes = [axis % x.ndim for axis in (range(x.ndim) if dims is None else dims)]
        kept = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
        total = r.emit(operator, (x,), kept, axes=axes)
        r.bind(out, total if keepdim else r.emit("Reshape", (total,), out.shape))

    return lower


def _convolution(
    r: _Recorder, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *options: Any
) -> None:
    """The depthwise convolution of a window as long as the kernel: (B, D, K) -> (B, D, 1)."""
    window = (weight.shape[0], 1, x.shape[2])
    if options != ([1], [0], [1], False, [0], len(weight)) or weight.shape != window:
        raise r.unsupported("a convolution that is not depthwise, or over more than one window")
    products = r.emit("Mul", (x, weight.transpose(0, 1)), x.shape)
    total = r.emit("ReduceSum", (products,), out.shape, axes=[2])
    r.bind(out, r.emit("Add", (total, bias.view(-1, 1)), out.shape))


UNARY = (
    "abs cos erf exp gelu log neg reciprocal relu sigmoid sin softplus sqrt tanh".split()
)  # names that ONNX writes with a capital letter
BINARY = {
    "mul": "Mul",
    "div": "Div",
    "maximum": "Max",
    "minimum": "Min",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "lt": "Less",
}
LOWERED: dict[str, Lowering] = {
    **{name: _same(name.capitalize(), 1) for name in UNARY},
    **{name: _same(operator, 2) for name, operator in BINARY.items()},
    "where": _same("Where", 3),
    "add": _sum_of("Add"),
    "sub": _sum_of("Sub"),
    "rsub": _rsub,
    "lerp": _lerp,
    "silu": _silu,
    "expm1": _expm1,
    "logaddexp": _logaddexp,
    "ones_like": _ones_like,
    "rsqrt": _rsqrt,
    "pow": _pow,
    "clamp": _clamp,
    **dict.fromkeys(["alias", "clone", "detach", "expand", "_to_copy"], _alias),
    **dict.fromkeys(["view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze"], _reshape),
    "t": _transpose,
    "transpose": _transpose,
    "permute": _permute,
    "split": _split,
    "split_with_sizes": _split,
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    "cat": _cat,
    "stack": _stack,
    "mm": _mm,
    "bmm": _mm,
    "addmm": _addmm,
    "embedding": _embedding,
    "mean": _reduce("ReduceMean"),
    "sum": _reduce("ReduceSum"),
    "convolution": _convolution,
}
