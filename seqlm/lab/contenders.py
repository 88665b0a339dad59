"""What `seqlm bench` times: seqlm, what people would use in its place, and the floors below both.

A contender is built in a process of its own and gives one call, which does a piece of work.
"""

# B batch, T length, D width, V vocabulary

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm import graphs, ops
from seqlm.cells import find
from seqlm.config import Config, OptimConfig, cell_key, stack
from seqlm.generate import stepper
from seqlm.model import build, parameter_count
from seqlm.runtime import Runtime, autocast, keep_memory
from seqlm.text.corpus import open_corpus
from seqlm.text.prepare import prepare
from seqlm.training.trainer import Learner, make_optimizer

VOCABULARY = 65  # tiny Shakespeare's
SCAN, GATED = (16, 1024, 512), (64, 1024, 768)
DECODED, CONTEXT = 100, 256
LOOP = {"backend": "reference", "graphs": "off"}


class Work(NamedTuple):
    call: Callable[[], object]
    dtype: str  # of its matrix products, or of all where it has none
    characters: int | None = None  # in a call
    parameters: int | None = None
    bytes: int | None = None  # that a call reads and writes at least, where that is what limits it


class Contender(NamedTuple):
    name: str
    build: Callable[[Config], Work]
    beside: Callable[[Config], bool] = lambda config: True  # what it says something about
    package: str | None = None  # that must be installed

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(("seqlm", "floor"))


def device_of(config: Config) -> str:
    return Runtime.pick(config.runtime).device.value


def _dtype(config: Config) -> str:
    return Runtime.pick(config.runtime).dtype.value


def _theirs(config: Config) -> str:
    """The dtype of what others' layers multiply: as they come on the CPU, seqlm's on a GPU."""
    return _dtype(config) if _gpu(config) else "float32"


def _tokens(config: Config, *shape: int) -> Tensor:
    tokens = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    return tokens.to(device_of(config))


def seqlm_step(config: Config, **runtime: str) -> Work:
    """A whole step of `seqlm train`: batch, loss, gradients, clipping, optimizer."""
    config = config.updated({f"runtime.{key}": value for key, value in runtime.items()})
    keep_memory()
    characters = config.train.batch * config.train.length
    symbols = [chr(ord("0") + i) for i in range(VOCABULARY)]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        random = np.random.default_rng(0).choice(symbols, 2 * characters)
        text.write_text("".join([*symbols, *random]), encoding="utf-8")
        corpus = open_corpus(prepare([str(text)], out=Path(folder) / "corpus")[0])
        runtime = Runtime.pick(config.runtime)
        learner = Learner(config, corpus, runtime)
    dtype, size = runtime.dtype.value, parameter_count(learner.model)
    return Work(partial(learner.learn, 1e-3), dtype, characters, size)


def _training(config: Config, model: nn.Module, loss: Callable[[Tensor], Tensor]) -> Work:
    """A step of a model that seqlm has nothing to do with."""
    device, dtype = device_of(config), _theirs(config)
    optimizer = make_optimizer(model.to(device), OptimConfig())
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


def minlm(config: Config) -> nn.Module:
    from minGRU_pytorch.minLM import minLM

    name = stack(config.cell.name)[0]
    options, m = config.cell.options[name], config.model
    shape = dict(num_tokens=VOCABULARY, dim=m.width, depth=m.layers, ff_mult=m.mlp)
    shape |= dict(expansion=options["expansion"], use_lstm=name == "minlstm")
    return minLM(**shape, enable_conv=m.conv > 0, conv_kernel_size=max(m.conv, 1))


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


def products(config: Config) -> Work:
    """The three matrix products of every linear layer of seqlm's step, and nothing else."""
    keep_memory()
    characters = config.train.batch * config.train.length
    dtype, triples = getattr(torch, _dtype(config)), []
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


def _layer(config: Config, layer: nn.Module, run: Callable[[Tensor], Tensor], dtype: str) -> Work:
    """`run` of a layer, forward and backward."""
    keep_memory()  # here for all of them
    batch, length, device = config.train.batch, config.train.length, device_of(config)
    layer.to(device)
    x = torch.randn(batch, length, config.model.width, device=device, requires_grad=True)

    def call() -> tuple[()]:
        with autocast(device, dtype):
            y = run(x)
        y.float().sum().backward()
        return ()

    return Work(call, dtype, batch * length)


def seqlm_layer(config: Config, solver: str | None = None, **runtime: str) -> Work:
    """The first cell of the stack alone, forward and backward."""
    config = config.updated({f"runtime.{key}": value for key, value in runtime.items()})
    name, runtime = stack(config.cell.name)[0], Runtime.pick(config.runtime)
    options = dict(config.cell.options[cell_key(name)])
    if solver is not None:
        options["solver"] = solver
    cell = find(name)(config.model.width, **options)

    work = _layer(config, cell, lambda x: cell(x)[0], runtime.dtype.value)
    call = work.call

    def under_runtime() -> tuple[()]:
        with runtime.active():
            return call()

    if runtime.graphs.value == "off":
        return work._replace(call=under_runtime)
    return work._replace(call=graphs.Recorded(under_runtime))  # as training does


def recurrent_layer(config: Config, kind: str) -> Work:
    layer = getattr(nn, kind)(config.model.width, config.model.width, batch_first=True)
    return _layer(config, layer, lambda x: layer(x)[0], _theirs(config))


def looped_layer(config: Config) -> Work:
    """A GRU step by step in Python: what minGRU's authors compare theirs with.

    Source: Feng et al., Were RNNs All We Needed?, arXiv 2410.01201, section 4.1.
    """
    width = config.model.width
    layer = nn.GRUCell(width, width)

    def run(x: Tensor) -> Tensor:
        h, steps = x.new_zeros(len(x), width), []
        for x_t in x.unbind(1):
            h = layer(x_t, h)
            steps.append(h)
        return torch.stack(steps, dim=1)

    return _layer(config, layer, run, _theirs(config))


def ncps_layer(config: Config) -> Work:
    from ncps.torch import CfC

    layer = CfC(config.model.width, config.model.width)
    return _layer(config, layer, lambda x: layer(x)[0], _theirs(config))


def _scan_inputs(config: Config) -> tuple[Tensor, Tensor]:
    keep_memory()  # here for both
    device = device_of(config)
    return torch.rand(SCAN, device=device), torch.randn(SCAN, device=device)


def linear_scan(config: Config) -> Work:
    a, b = _scan_inputs(config)
    h0, runtime = a.new_zeros(SCAN[0], SCAN[2]), Runtime.pick(config.runtime)

    def call() -> None:
        with runtime.active():
            ops.linear_scan(a, b, h0)

    return Work(call, "float32")


def torch_add(config: Config) -> Work:
    a, b = _scan_inputs(config)
    return Work(partial(torch.add, a, b, out=torch.empty_like(a)), "float32")


def _gated_inputs(config: Config, parts: int) -> Tensor:
    batch, length, width = GATED
    dtype = getattr(torch, _dtype(config))
    return torch.randn(batch, length, parts * width, device=device_of(config)).to(dtype)


def gated_scan(config: Config) -> Work:
    """Logits and candidates are read, and states written."""
    drive = _gated_inputs(config, 2)
    h0 = torch.zeros(GATED[0], GATED[2], device=drive.device)
    runtime = Runtime.pick(config.runtime)

    def call() -> None:
        with runtime.active():
            ops.gated_scan(drive, h0)

    return Work(call, _dtype(config), bytes=3 * drive.nbytes // 2)


def gated_gradient(config: Config) -> Work:
    """Logits, candidates, states and their gradient are read, and two gradients written."""
    drive = _gated_inputs(config, 2).requires_grad_()
    h0 = torch.zeros(GATED[0], GATED[2], device=drive.device)
    with Runtime.pick(config.runtime).active():
        h, _ = ops.gated_scan(drive, h0)
    dh = torch.randn_like(h)
    call = partial(torch.autograd.grad, h, drive, dh, retain_graph=True)
    return Work(call, _dtype(config), bytes=3 * drive.nbytes)


def warp_scan(config: Config) -> Work:
    """The recurrence alone, without the gates, and with time last, as it wants it."""
    from accelerated_scan.warp import scan

    a, b = (x.mT.contiguous() for x in _gated_inputs(config, 2).chunk(2, dim=-1))
    return Work(partial(scan, a.sigmoid(), b), _dtype(config), bytes=3 * a.nbytes)


def copied(config: Config) -> Work:
    x = _gated_inputs(config, 2)
    return Work(partial(torch.empty_like(x).copy_, x), _dtype(config), bytes=2 * x.nbytes)


def seqlm_decoding(config: Config) -> Work:
    """Steps of the model, each from the likeliest symbol of the one before."""
    model = build(config, VOCABULARY).to(device_of(config)).eval()
    first = _tokens(config, 1)
    runtime = Runtime.pick(config.runtime)
    with runtime.active():
        step = stepper(model)

    @torch.inference_mode()
    def call() -> None:
        token, state = first, model.initial_state(1)
        with runtime.active():
            for _ in range(DECODED):
                logits, *state = step(token, *state)
                token = logits.argmax(-1)

    return Work(call, "float32", DECODED, parameter_count(model))


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


class Transformer(nn.Module):
    """A causal Transformer of the same width, layers and MLP, in torch's modules; its heads are 64
    wide, or wider where that does not divide the width."""

    def __init__(self, width: int, layers: int, mlp: float):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.zeros(CONTEXT, width))
        shape = dict(dim_feedforward=round(mlp * width), dropout=0.0, activation="gelu")
        heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
        layer = nn.TransformerEncoderLayer(width, heads, **shape, batch_first=True, norm_first=True)
        self.stack = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions
        return self.head(self.stack(x, mask=self.mask, is_causal=True)[:, -1])


def recomputed(config: Config) -> Work:
    """The whole context again for every character, as nanoGPT's `generate` does."""
    model = Transformer(config.model.width, config.model.layers, config.model.mlp or 4.0).eval()
    model.to(device_of(config))
    tokens, characters = _tokens(config, 1, CONTEXT), DECODED // 20

    @torch.inference_mode()
    def call() -> None:
        nonlocal tokens
        for _ in range(characters):
            new = model(tokens).argmax(-1, keepdim=True)
            tokens = torch.cat([tokens[:, 1:], new], dim=1)

    return Work(call, "float32", characters, parameter_count(model))


def streamed(config: Config) -> Work:
    """The weights read once a character: one matrix of all of them, times a vector."""
    parameters = parameter_count(build(config, VOCABULARY))
    matrix = torch.randn(parameters // 1024 + 1, 1024, device=device_of(config))
    vector = matrix[0].clone()

    def call() -> None:
        for _ in range(DECODED):
            matrix @ vector

    return Work(call, "float32", DECODED)


def _gpu(config: Config) -> bool:
    return device_of(config) == "cuda"


def _narrow(config: Config) -> bool:
    return _dtype(config) != "float32"


def _minlm(config: Config) -> bool:
    return {*stack(config.cell.name)} in ({"mingru"}, {"minlstm"})


def _minlm_decodes(config: Config) -> bool:
    return _minlm(config) and not config.model.conv  # with one it cannot keep a state


def _diagonal(config: Config) -> bool:
    """Whether the first cell has a choice of solvers."""
    options = config.cell.options[cell_key(stack(config.cell.name)[0])]
    return "solver" in options and options.get("recurrence") != "dense"


def _cfc(config: Config) -> bool:
    return cell_key(stack(config.cell.name)[0]) == "cfc"


MINLM = "minGRU_pytorch"
TRAINING, LAYER = "training step", "layer, forward + backward"
SCANNING, DECODING = "scan of (16, 1024, 512), forward", "decoding, batch 1"
GATING, GATING_BACK = "gated scan of (64, 1024, 768), forward", "the same, backward"
GROUPS: Mapping[str, tuple[Contender, ...]] = {
    TRAINING: (
        Contender("seqlm", seqlm_step),
        Contender("seqlm, float32", partial(seqlm_step, dtype="float32"), _narrow),
        Contender("minGRU-pytorch", minlm_step, _minlm, MINLM),
        Contender("nn.GRU", partial(recurrent_step, kind="GRU")),
        Contender("nn.LSTM", partial(recurrent_step, kind="LSTM")),
        Contender("floor: matrix products", products),
    ),
    LAYER: (
        Contender("seqlm", seqlm_layer),
        Contender("seqlm, float32", partial(seqlm_layer, dtype="float32"), _narrow),
        Contender("seqlm, Newton's method", partial(seqlm_layer, solver="newton"), _diagonal),
        Contender("seqlm, step by step", partial(seqlm_layer, solver="sequential"), _diagonal),
        Contender("ncps CfC", ncps_layer, _cfc, "ncps"),
        Contender("nn.GRU", partial(recurrent_layer, kind="GRU")),
        Contender("nn.LSTM", partial(recurrent_layer, kind="LSTM")),
        Contender("GRU, a loop in Python", looped_layer, _gpu),
        Contender("seqlm, a loop in Python", partial(seqlm_layer, **LOOP), _gpu),
    ),
    SCANNING: (
        Contender("seqlm", linear_scan),
        Contender("floor: torch.add(a, b, out=c)", torch_add),
    ),
    GATING: (
        Contender("seqlm", gated_scan, _gpu),
        Contender("accelerated-scan", warp_scan, _gpu, "accelerated_scan"),
        Contender("floor: copying", copied, _gpu),
    ),
    GATING_BACK: (
        Contender("seqlm", gated_gradient, _gpu),
        Contender("floor: copying", copied, _gpu),
    ),
    DECODING: (
        Contender("seqlm", seqlm_decoding),
        Contender("minGRU-pytorch", minlm_decoding, _minlm_decodes, MINLM),
        Contender("Transformer, 256 recomputed", recomputed),
        Contender("floor: weights read once", streamed),
    ),
}
