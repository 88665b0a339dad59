"""The language model: an embedding, blocks with any cell, and an output layer."""

# B batch, T time, D model width, V vocabulary

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, cycle, islice
from math import sqrt
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seqlm import cells, ops
from seqlm.cells import Cell, State
from seqlm.cells._contract import Composite
from seqlm.cells._conv import CausalConv
from seqlm.config import Config, cell_files, cell_key, stack
from seqlm.errors import UsageError
from seqlm.ops import Linear

LOGITS = 1 << 24  # cap on logits in memory; larger vocabularies use shorter chunks


class RMSNorm(nn.Module):
    """`ops.rms_norm` with its weight."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight)


class Dropout(nn.Dropout):
    """Dropout with one mask for all steps of a sequence: (B, T, D) -> (B, T, D).

    A unit that is dropped is missing over the whole sequence, so that the state cannot replace it.
    Random numbers are needed for one step only.  Outside training it returns x at once, because
    torch's own takes a twentieth of a small model's step.

    Source: Gal and Ghahramani 2016, arXiv 1512.05287.
    """

    def __call__(self, x: Tensor) -> Tensor:
        if not (self.training and self.p):
            return x
        one_step = torch.ones_like(x[:, :1] if x.ndim == 3 else x)
        return x * super().__call__(one_step)


class MLP(nn.Module):
    """D -> hidden -> D.  SwiGLU takes 2/3 of the hidden width for its third matrix, so that both
    activations cost the same (Shazeer, GLU Variants Improve Transformer, 2020)."""

    def __init__(self, width: int, ratio: float, activation: str, dropout: float):
        super().__init__()
        self.gated = activation == "swiglu"
        hidden = max(1, round(width * ratio * (2 / 3 if self.gated else 1)))
        parts = 2 if self.gated else 1
        self.inputs = Linear(width, parts * hidden, parts=parts)
        self.outputs = Linear(hidden, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = ops.gelu(x)
        return self.outputs(self.dropout(x))


class Block(Composite):
    """x + conv(x), then x + cell(norm(x)), then x + mlp(norm(x)); convolution and MLP optional.

    The state is the convolution's window, if any, followed by the cell's state.
    """

    def __init__(
        self, width: int, cell: Cell, *, mlp: float, activation: str, conv: int, dropout: float
    ):
        super().__init__()
        self.conv = CausalConv(width, conv) if conv else None
        self.cell_norm = RMSNorm(width)
        self.cell = cell
        self.mlp_norm = RMSNorm(width) if mlp else None
        self.mlp = MLP(width, mlp, activation, dropout) if mlp else None
        self.dropout = Dropout(dropout)

    def initial_state(self, batch: int) -> State:
        window = () if self.conv is None else self.conv.initial_state(batch)
        return window + self.cell.initial_state(batch)

    def _run(self, form: str, x: Tensor, state: State) -> tuple[Tensor, State]:
        window = ()
        if self.conv is not None:
            y, window = getattr(self.conv, form)(x, state[:1])
            x, state = x + y, state[1:]
        y, state = getattr(self.cell, form)(self.cell_norm(x), state)
        x = x + self.dropout(y)
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, window + state


class LanguageModel(nn.Module):
    """Symbols -> logits of the next symbol, through a stack of blocks.

        logits, state = model(tokens, state)        (B, T) int64 -> (B, T, V)
        logits, state = model.step(token, state)    (B,) int64 -> (B, V)

    state=None stands for the initial state.  Symbol V, one past the vocabulary, stands for the
    beginning of text.  It is only an input; the caller puts it first.
    cell: one name, or several separated by commas, which are repeated over the layers.
    cell_options: {option: value} for all cells, {cell: {option: value}} for one of them.
    Raises UsageError for an unknown cell or option, for a value out of range, and for more cells
    than layers.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 256,
        layers: int = 4,
        cell: str = "mingru",
        cell_options: Mapping[str, Any] | None = None,
        *,
        mlp: float = 4.0,
        activation: str = "gelu",
        conv: int = 0,
        dropout: float = 0.0,
        tie: bool = False,
    ):
        super().__init__()
        if conv == 1:
            raise UsageError("model.conv is 1; it must be 0 (no convolution) or at least 2.")
        if len(stack(cell)) > layers:
            raise UsageError(
                f"--cell names {len(stack(cell))} cells, {cell}, and the model has {layers} "
                "layers. Give more --layers, or name fewer cells."
            )
        if not mlp and activation != "gelu":
            raise UsageError(
                f"model.activation is {activation}, but model.mlp is 0: there is no MLP. Remove "
                "one of them."
            )
        options = cells.resolved_options(cell, cell_options or {})
        self.vocab_size, self.width = vocab_size, width
        self.embedding = nn.Embedding(vocab_size + 1, width)
        self.dropout = Dropout(dropout)
        block: dict[str, Any] = dict(mlp=mlp, activation=activation, conv=conv, dropout=dropout)
        self.blocks = nn.ModuleList(
            Block(width, cells.find(name)(width, **options[cell_key(name)]), **block)
            for name in islice(cycle(stack(cell)), layers)
        )
        self.norm = RMSNorm(width)
        self.head = None if tie else Linear(width, vocab_size)
        self._initialise()
        # number of the state's tensors in each block
        self.parts = [len(block.initial_state(1)) for block in self._blocks()]

    def _blocks(self) -> Iterable[Block]:
        return cast(Iterable[Block], self.blocks)

    def _initialise(self) -> None:
        # tied weights are also those of the output layer, and logits should be near 0 at first
        nn.init.normal_(self.embedding.weight, std=0.02 if self.head is None else 1)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.1 / sqrt(self.width))
            nn.init.zeros_(self.head.bias)

    @property
    def beginning(self) -> int:
        """The symbol that stands for the beginning of text."""
        return self.vocab_size

    def init_from(self, weights: Mapping[str, Tensor], rows: Mapping[int, int]) -> None:
        """Copy the weights of a model that differs only in its vocabulary.

        rows: {symbol of this model: the same symbol in the other model}.  Rows of all other symbols
        keep their initial values.  The beginning symbol is copied.
        """
        new = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        old_beginning = len(weights["embedding.weight"]) - 1
        to, source = [*rows.keys()], [*rows.values()]
        for name, tensor in new.items():
            if name == "embedding.weight":
                tensor[[*to, self.beginning]] = weights[name][[*source, old_beginning]]
            elif name in ("head.weight", "head.bias"):
                tensor[to] = weights[name][source]
            else:
                tensor.copy_(weights[name])
        self.load_state_dict(new)

    def initial_state(self, batch: int) -> State:
        return tuple(chain.from_iterable(b.initial_state(batch) for b in self._blocks()))

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return self._run("forward", tokens, state)

    def step(self, token: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return self._run("step", token, state)

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring the weights of all cells within their bounds, after an optimizer step."""
        for module in self.modules():
            if isinstance(module, Cell):
                module.after_step()

    @torch.no_grad()
    def temper(self, temperature: float) -> None:
        """Divide the logits by a temperature, through the weights that they are linear in."""
        self.norm.weight.div_(temperature)
        if self.head is not None:
            self.head.bias.div_(temperature)

    def _run(self, form: str, tokens: Tensor, state: State | None) -> tuple[Tensor, State]:
        state = self.initial_state(len(tokens)) if state is None else state
        x = self.dropout(self.embedding(tokens))
        rest, end = state, ()
        for block, parts in zip(self.blocks, self.parts, strict=True):
            x, new = getattr(block, form)(x, rest[:parts])
            rest, end = rest[parts:], end + new
        x = self.norm(x)
        if self.head is None:
            return ops.linear(x, self.embedding.weight[: self.vocab_size]), end
        return self.head(x), end


def build(config: Config, vocab_size: int) -> LanguageModel:
    """The model of a configuration.  Initial weights are random numbers from torch's generator."""
    m = config.model
    return LanguageModel(
        vocab_size,
        m.width,
        m.layers,
        config.cell.name,
        config.cell.options,
        mlp=m.mlp,
        activation=m.activation,
        conv=m.conv,
        dropout=m.dropout,
        tie=m.tie,
    )


def blueprint(config: Config, vocab_size: int) -> LanguageModel:
    """The model of a configuration on the meta device: tensors with shapes but without memory.

    A model with a cell from a user's file gets memory, because the code in the file may read
    values.
    """
    if cell_files(config.cell.name):
        with torch.device("cpu"):
            return build(config, vocab_size)
    with without_memory():
        return build(config, vocab_size)


@contextmanager
def without_memory() -> Iterator[None]:
    """Models that are built in the block are on the meta device."""
    with torch.device("meta"), _WithoutNormal():
        yield


class _WithoutNormal(TorchFunctionMode):
    """Skips normal_ on meta tensors, which would load torch's compiler and take a second."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if function is nn.init.normal_:
            return arguments[0] if arguments else options["tensor"]
        return function(*arguments, **(options or {}))


@torch.no_grad()
def round_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the matrices of all linear layers to the numbers of `dtype`.

    They remain float32 tensors, and products of them float32 products.  One call for each character
    (`ops.cpu.recording`) reads matrices of bfloat16 numbers from copies of half the size.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(layer.weight.to(dtype))


def symbols_at_once(model: nn.Module) -> int:
    """The number of symbols, over all rows, whose logits may be in memory together."""
    return max(1, LOGITS // cast(int, model.vocab_size))


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
