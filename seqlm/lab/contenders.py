"""The contenders of `seqlm bench`: seqlm, other libraries, and lower bounds ("floors").

A contender is built in its own process.  Its `build` returns the call to be timed.
"""

# B batch, T length, D width, V vocabulary

from collections.abc import Callable, Mapping
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm import graphs, ops
from seqlm.cells import find
from seqlm.config import Config, cell_key, stack
from seqlm.generation.generate import stepper
from seqlm.model import build, parameter_count, round_matrices
from seqlm.runtime import Runtime, autocast, keep_memory
from seqlm.temporary import scratch
from seqlm.text.corpus import open_corpus
from seqlm.text.prepare import prepare
from seqlm.training.trainer import Trainer

VOCABULARY = 65  # as in tiny Shakespeare
SCAN_SHAPE, GATED_SHAPE = (16, 1024, 512), (64, 1024, 768)  # (B, T, D)
DECODED = 100  # characters in one call


class Work(NamedTuple):
    call: Callable[[], object]
    dtype: str  # of the matrix products; without matrix products, of all numbers
    characters: int | None = None  # in one call
    parameters: int | None = None
    bytes: int | None = None  # that one call moves, if memory bandwidth is the limit


Built = TypeVar("Built")


class Contender(NamedTuple, Generic[Built]):
    name: str
    build: Callable[[Config], Built]
    applies: Callable[[Config], bool] = lambda config: True  # whether it suits the configuration
    package: str | None = None  # the package that it needs

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(("seqlm", "floor"))


def device_of(config: Config) -> str:
    return Runtime.pick(config.runtime).device.value


def _dtype(config: Config) -> str:
    return Runtime.pick(config.runtime).dtype.value


def other_dtype(config: Config) -> str:
    """The dtype of other libraries' products: their default on the CPU, seqlm's on a GPU."""
    return _dtype(config) if _on_gpu(config) else "float32"


def _tokens(config: Config, *shape: int) -> Tensor:
    tokens = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    return tokens.to(device_of(config))


def _in_float32(build_work: Callable[[Config], Work], config: Config) -> Work:
    return build_work(config.updated({"runtime.dtype": "float32"}))


def seqlm_step(config: Config) -> Work:
    """A whole step of `seqlm train`: batch, loss, gradients, clipping, optimizer."""
    keep_memory()
    characters = config.train.batch * config.train.length
    symbols = [chr(ord("0") + i) for i in range(VOCABULARY)]
    runtime = Runtime.pick(config.runtime)
    with scratch() as folder:
        text = folder / "text.txt"
        random = np.random.default_rng(0).choice(symbols, 2 * characters)
        text.write_text("".join([*symbols, *random]), encoding="utf-8")
        corpus = open_corpus(prepare([str(text)], out=folder / "corpus")[0])
        trainer = Trainer(config, corpus, runtime)
    size = parameter_count(trainer.model)
    return Work(partial(trainer.step, 1.0), runtime.dtype.value, characters, size)


def _training(config: Config, model: nn.Module, loss: Callable[[Tensor], Tensor]) -> Work:
    """The training step of another library's model."""
    device, dtype = device_of(config), other_dtype(config)
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=3e-3, fused=True)
    batch, length = config.train.batch, config.train.length
    tokens = _tokens(config, batch, length + 1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, dtype):
            cost = loss(tokens)
        cost.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Work(step, dtype, batch * length, parameter_count(model))


def minlm(config: Config, vocabulary: int = VOCABULARY) -> nn.Module:
    """The language model of minGRU-pytorch, in the shape of seqlm's."""
    from minGRU_pytorch.minLM import minLM

    name = stack(config.cell.name)[0]
    m = config.model
    return minLM(
        num_tokens=vocabulary,
        dim=m.width,
        depth=m.layers,
        ff_mult=m.mlp,
        expansion=config.cell.options[name]["expansion"],
        use_lstm=name == "minlstm",
        enable_conv=m.conv > 0,
        conv_kernel_size=max(m.conv, 1),
        dropout=m.dropout,
    )


def minlm_step(config: Config) -> Work:
    model = minlm(config)
    return _training(config, model, lambda tokens: model(tokens, return_loss=True))


class Recurrent(nn.Module):
    """An embedding, a stack of torch's nn.GRU or nn.LSTM, and an output layer."""

    def __init__(self, kind: str, width: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.stack = getattr(nn, kind)(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.stack(self.embedding(tokens))[0])


def recurrent_step(config: Config, kind: str) -> Work:
    model = Recurrent(kind, config.model.width, config.model.layers)

    def loss(tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return _training(config, model, loss)


def matrix_products(config: Config) -> Work:
    """Only the matrix products of seqlm's training step: three for each linear layer."""
    keep_memory()
    characters = config.train.batch * config.train.length
    dtype = getattr(torch, _dtype(config))
    triples: list[tuple[Tensor, Tensor, Tensor]] = []
    for layer in build(config, VOCABULARY).to(device_of(config)).modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach().to(dtype)
            x, dy = (weight.new_ones(characters, size).normal_() for size in weight.shape[::-1])
            triples.append((x, dy, weight))

    def call() -> None:
        for x, dy, weight in triples:
            x @ weight.t()
            dy @ weight
            dy.t() @ x

    return Work(call, _dtype(config), characters)


def _layer(config: Config, layer: nn.Module, dtype: str, recorded: bool = False) -> Work:
    """A layer alone, forward and backward.  recorded: as a CUDA graph."""
    keep_memory()  # for other libraries too, so that all layers allocate alike
    batch, length, device = config.train.batch, config.train.length, device_of(config)
    layer.to(device)
    x = torch.randn(batch, length, config.model.width, device=device, requires_grad=True)

    def call() -> tuple[()]:
        with autocast(device, dtype):
            y = layer(x)[0]
        y.float().sum().backward()
        return ()

    return Work(graphs.Recorded(call) if recorded else call, dtype, batch * length)


def seqlm_layer(config: Config) -> Work:
    """The first cell of the stack; on a GPU it is recorded as a CUDA graph, as in training."""
    name, runtime = stack(config.cell.name)[0], Runtime.pick(config.runtime)
    cell = find(name)(config.model.width, **config.cell.options[cell_key(name)])
    return _layer(config, cell, runtime.dtype.value, recorded=runtime.graphs.value == "on")


def recurrent_layer(config: Config, kind: str) -> Work:
    layer = getattr(nn, kind)(config.model.width, config.model.width, batch_first=True)
    return _layer(config, layer, other_dtype(config))


def ncps_layer(config: Config) -> Work:
    from ncps.torch import CfC

    return _layer(config, CfC(config.model.width, config.model.width), other_dtype(config))


def _scan_inputs(config: Config) -> tuple[Tensor, Tensor]:
    keep_memory()  # for the floor too, so that both allocate alike
    device = device_of(config)
    return torch.rand(SCAN_SHAPE, device=device), torch.randn(SCAN_SHAPE, device=device)


def linear_scan(config: Config) -> Work:
    a, b = _scan_inputs(config)
    return Work(partial(ops.linear_scan, a, b, torch.zeros_like(a[:, 0])), "float32")


def addition(config: Config) -> Work:
    a, b = _scan_inputs(config)
    return Work(partial(torch.add, a, b, out=torch.empty_like(a)), "float32")


def _gated_inputs(config: Config) -> tuple[Tensor, Tensor]:
    """Logits and candidates, (B, T, 2D), and the initial state, (B, D)."""
    batch, length, width = GATED_SHAPE
    device, dtype = device_of(config), getattr(torch, _dtype(config))
    drive = torch.randn(batch, length, 2 * width, device=device).to(dtype)
    return drive, torch.zeros(batch, width, device=device)


def gated_scan(config: Config) -> Work:
    """Reads logits and candidates; writes states."""
    drive, h0 = _gated_inputs(config)
    call = partial(ops.gated_scan, drive, h0)
    return Work(call, _dtype(config), bytes=3 * drive.nbytes // 2)


def gated_gradient(config: Config) -> Work:
    """Reads logits, candidates, states and dL/dstates; writes the gradients of the first two."""
    drive, h0 = _gated_inputs(config)
    h, _ = ops.gated_scan(drive.requires_grad_(), h0)
    dh = torch.randn_like(h)
    call = partial(torch.autograd.grad, h, drive, dh, retain_graph=True)
    return Work(call, _dtype(config), bytes=3 * drive.nbytes)


def copy(config: Config) -> Work:
    x, _ = _gated_inputs(config)
    return Work(partial(torch.empty_like(x).copy_, x), _dtype(config), bytes=2 * x.nbytes)


def seqlm_decoding(config: Config, weights: str = "float32") -> Work:
    """Steps of the model; the likeliest symbol of each step is the input of the next.

    weights: the dtype that the matrices are rounded to.
    """
    model = build(config, VOCABULARY).to(device_of(config)).eval()
    round_matrices(model, getattr(torch, weights))
    first = _tokens(config, 1)
    step = stepper(model)

    @torch.inference_mode()
    def call() -> None:
        token, state = first, tuple(model.initial_state(1))
        for _ in range(DECODED):
            logits, *new_state = step(token, *state)
            token, state = logits.argmax(-1), tuple(new_state)

    return Work(call, weights, DECODED, parameter_count(model))


def minlm_decoding(config: Config) -> Work:
    model = minlm(config).to(device_of(config)).eval()
    first = _tokens(config, 1, 1)

    @torch.inference_mode()
    def call() -> None:
        token, state = first, None
        for _ in range(DECODED):
            logits, state = model(token, return_prev_hiddens=True, prev_hiddens=state)
            token = logits[:, -1:].argmax(-1)

    return Work(call, "float32", DECODED, parameter_count(model))


def weight_reads(config: Config) -> Work:
    """Reads as many numbers as the model has weights, once a character: their sum."""
    weights = torch.randn(parameter_count(build(config, VOCABULARY)), device=device_of(config))

    def call() -> None:
        for _ in range(DECODED):
            weights.sum()

    return Work(call, "float32", DECODED)


def _on_gpu(config: Config) -> bool:
    return device_of(config) == "cuda"


def _on_cpu(config: Config) -> bool:
    return device_of(config) == "cpu"


def _not_float32(config: Config) -> bool:
    return _dtype(config) != "float32"


def is_minlm(config: Config) -> bool:
    return {*stack(config.cell.name)} in ({"mingru"}, {"minlstm"})


def _minlm_decodes(config: Config) -> bool:
    return is_minlm(config) and not config.model.conv  # its convolution keeps no state


def _is_cfc(config: Config) -> bool:
    return cell_key(stack(config.cell.name)[0]) == "cfc"


MINLM = "minGRU_pytorch"
TRAINING, LAYER = "training step", "layer, forward + backward"
SCANNING, DECODING = "scan of (16, 1024, 512), forward", "decoding, batch 1"
GATING, GATING_BACK = "gated scan of (64, 1024, 768), forward", "the same, backward"
GROUPS: Mapping[str, tuple[Contender[Work], ...]] = {
    TRAINING: (
        Contender("seqlm", seqlm_step),
        Contender("seqlm, float32", partial(_in_float32, seqlm_step), _not_float32),
        Contender("minGRU-pytorch", minlm_step, is_minlm, MINLM),
        Contender("nn.GRU", partial(recurrent_step, kind="GRU")),
        Contender("nn.LSTM", partial(recurrent_step, kind="LSTM")),
        Contender("floor: matrix products", matrix_products),
    ),
    LAYER: (
        Contender("seqlm", seqlm_layer),
        Contender("seqlm, float32", partial(_in_float32, seqlm_layer), _not_float32),
        Contender("ncps CfC", ncps_layer, _is_cfc, "ncps"),
        Contender("nn.GRU", partial(recurrent_layer, kind="GRU")),
        Contender("nn.LSTM", partial(recurrent_layer, kind="LSTM")),
    ),
    SCANNING: (
        Contender("seqlm", linear_scan),
        Contender("floor: torch.add(a, b, out=c)", addition),
    ),
    GATING: (Contender("seqlm", gated_scan, _on_gpu), Contender("floor: copying", copy, _on_gpu)),
    GATING_BACK: (
        Contender("seqlm", gated_gradient, _on_gpu),
        Contender("floor: copying", copy, _on_gpu),
    ),
    DECODING: (
        Contender("seqlm", seqlm_decoding),
        Contender("seqlm, bfloat16 weights", partial(seqlm_decoding, weights="bfloat16"), _on_cpu),
        Contender("minGRU-pytorch", minlm_decoding, _minlm_decodes, MINLM),
        Contender("floor: weights read once", weight_reads),
    ),
}
