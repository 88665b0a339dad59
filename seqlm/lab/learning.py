"""How good a model is after a given time of training here: `seqlm bench --group learning`.

Contenders train one after another, each in its own process, for the same seconds, on the same text
and with as many characters in a step.  Validations do not count as training.
"""

# B batch, T length, D width, L layers, V vocabulary, N symbols

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm.cells import State
from seqlm.config import Config, OptimConfig
from seqlm.errors import SeqlmError, UsageError
from seqlm.evaluation import evaluate
from seqlm.evaluation.passage import passage_of_split
from seqlm.lab import bench
from seqlm.lab.contenders import MINLM, Contender, device_of, is_minlm, minlm, other_dtype
from seqlm.model import LanguageModel, blueprint, parameter_count, without_memory
from seqlm.progress import OnProgress, silent
from seqlm.runtime import Runtime, autocast, keep_memory
from seqlm.store.checkpoint import Progress
from seqlm.text.corpus import Corpus, open_corpus
from seqlm.training.batches import IGNORED, Batches
from seqlm.training.loop import expected_steps, share_done
from seqlm.training.trainer import Trainer, schedule

TIME_LIMIT = "5m"
VALIDATIONS = 10  # at equal distances in the training time
# published losses on tiny Shakespeare, in nats per character: minGRU's test loss in "Were RNNs All
# We Needed?" (arXiv 2410.01201), and the val loss of nanoGPT's README, 1.4697
THRESHOLDS = (1.548, 1.47)
MINLM_CONTEXT = 4096  # symbols; the package's model carries a state only one symbol at a time
CONTEXT = 256  # symbols in a window of the others without a state, as nanoGPT has on this text
LSTM_LAYERS = 2  # deeper stacks of nn.LSTM, which have no residual connections, learn more slowly
HEAD_WIDTH = 64


class Point(NamedTuple):
    """The progress of a contender after a step."""

    seconds: float  # of training
    steps: int
    nats: float | None  # per character of the val split; None: no validation after this step


@dataclass(frozen=True)
class TrainedContender:
    """The measurements of one contender."""

    contender: str
    recipe: str
    dtype: str  # of the matrix products in training
    parameters: int
    steps: int
    seconds: float  # of training; the last step may end after the limit
    chars: int  # trained on
    val_nats_per_char: float | None  # at the end; None: not a finite number
    protocol: str
    reached: dict[str, float | None]  # {threshold: seconds to the first validation at or below it}
    curve: list[dict[str, float | None]]  # of the validations


class About(NamedTuple):
    """What a contender's process sends before it trains."""

    recipe: str
    dtype: str
    parameters: int
    protocol: str


class Windowed(nn.Module):
    """A model that reads windows of `context` symbols and carries no state: (B, T) -> (B, T, V)."""

    def __init__(self, model: nn.Module, context: int, beginning: int):
        super().__init__()
        self.model, self.context, self.beginning = model, context, beginning

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return self.model(tokens), ()

    @torch.inference_mode()
    def nats(self, symbols: np.ndarray) -> float:
        """The sum of -ln p over all N symbols.

        Windows overlap by half, and only the new half of a window counts.  So each symbol is
        predicted from at least half a window of symbols before it, or from all where fewer exist.
        """
        known = self.context // 2
        new = self.context - known
        windows = max(1, -(-(len(symbols) - known) // new))
        y = torch.full([known + windows * new], IGNORED)
        y[: len(symbols)] = torch.from_numpy(symbols.astype(np.int64))
        x = torch.cat([torch.tensor([self.beginning]), y[:-1].clamp(min=0)])
        x, y = x.unfold(0, self.context, new), y.unfold(0, self.context, new).clone()
        y[1:, :known] = IGNORED
        device, total = next(self.parameters()).device, 0.0
        rows = max(1, evaluate.AT_ONCE // self.context)
        for inputs, targets in zip(x.split(rows), y.split(rows), strict=True):
            logits = self.model(inputs.to(device)).mT
            cost = F.cross_entropy(logits, targets.to(device), reduction="none")
            total += cost.double().sum().item()
        return total


class LSTM(nn.Module):
    """An embedding, nn.LSTM and an output layer, with the interface of `LanguageModel`.

    The state is that of nn.LSTM, rows first: (B, L, D) each.
    """

    def __init__(self, vocab_size: int, width: int, dropout: float):
        super().__init__()
        self.vocab_size = self.beginning = vocab_size
        self.embedding = nn.Embedding(vocab_size + 1, width)
        self.stack = nn.LSTM(width, width, LSTM_LAYERS, batch_first=True, dropout=dropout)
        self.head = nn.Linear(width, vocab_size)

    def initial_state(self, batch: int) -> State:
        zeros = self.head.weight.new_zeros(batch, LSTM_LAYERS, self.stack.hidden_size)
        return zeros, zeros

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.initial_state(len(tokens)) if state is None else state
        h, c = (part.transpose(0, 1).contiguous() for part in state)
        x, end = self.stack(self.embedding(tokens), (h, c))
        return self.head(x), tuple(part.transpose(0, 1) for part in end)


class Transformer(nn.Module):
    """A pre-norm decoder of PyTorch's layers, with learned positions: (B, T) -> (B, T, V)."""

    def __init__(
        self, vocab_size: int, width: int, layers: int, heads: int, context: int, dropout: float
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size + 1, width)
        self.positions = nn.Embedding(context, width)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.02)  # as in GPT-2
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(time, device=tokens.device)
        x = self.embedding(tokens) + self.positions.weight[:time]
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


class Plain:
    """A plain training loop in PyTorch, with what `_learn` uses of a `Trainer`.

    config: with the recipe; the corpus is the one at data.path.  build: vocabulary -> model.  kind:
    the optimizer, with PyTorch's defaults.
    """

    def __init__(
        self,
        config: Config,
        build: Callable[[int], nn.Module],
        kind: type[torch.optim.Adam] = torch.optim.AdamW,
    ):
        torch.manual_seed(config.train.seed)
        corpus = open_corpus(Path(config.data.path))
        self.config, self.beginning = config, corpus.tokenizer.vocab_size
        self.device, self.dtype = device_of(config), other_dtype(config)
        self.model = build(self.beginning).to(self.device)
        self.optimizer = kind(self.model.parameters(), fused=True)
        self.batches = Batches(corpus.symbols("train"), config.train, self.beginning)
        self.val = passage_of_split(corpus, "val", corpus.tokenizer)
        self.progress = Progress()
        self.state: State = ()

    def warm_up(self) -> None:
        """Compute the first gradients and discard them."""
        self._backward()

    def step(self, share: float) -> None:
        """Take one optimizer step with this share of the peak learning rate."""
        self.state = self._backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = share * self.config.optim.lr
        self.optimizer.step()
        self.progress.step += 1

    def _backward(self) -> State:
        """Compute the gradients of the next step; returns the state after its batch."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        (rows,) = self.batches.at(self.progress.step)
        x, y = (torch.from_numpy(side).to(self.device) for side in (rows.inputs, rows.targets))
        # a fresh state is 0 in all of these models
        fresh = torch.from_numpy(rows.fresh).to(self.device).view(-1, 1, 1)
        before = tuple(torch.where(fresh, 0, part) for part in self.state) or None
        with autocast(self.device, self.dtype):
            logits, end = self.model(x, before)
        F.cross_entropy(logits.float().flatten(0, 1), y.flatten()).backward()
        return tuple(part.detach() for part in end)


def _seqlm(config: Config) -> Trainer:
    keep_memory()
    return Trainer(config, open_corpus(Path(config.data.path)), Runtime.pick(config.runtime))


def _minlm(config: Config) -> Plain:
    """The optimizer, rate and clipping of the package's train.py, and its random windows."""
    config = _with(config, lr=1e-4, schedule="constant", clip=0.5, windows=True)

    def build(vocab_size: int) -> nn.Module:
        return Windowed(minlm(config, vocab_size + 1), MINLM_CONTEXT, vocab_size)

    return Plain(config, build, torch.optim.Adam)


def _lstm(config: Config) -> Plain:
    def build(width: int, vocab_size: int) -> nn.Module:
        return LSTM(vocab_size, width, config.model.dropout)

    return Plain(_with(config, lr=2e-3), _of_equal_size(config, build, 8))


def _transformer(config: Config) -> Plain:
    """The rate is nanoGPT's for tiny Shakespeare; the batches are random windows, as there."""
    config = _with(config, lr=1e-3, windows=True)
    model, context = config.model, config.train.length
    heads = max(1, round(model.width / HEAD_WIDTH))

    def build(width: int, vocab_size: int) -> nn.Module:
        shape = vocab_size, width, model.layers, heads, context, model.dropout
        return Windowed(Transformer(*shape), context, vocab_size)

    return Plain(config, _of_equal_size(config, build, 2 * heads))


def _with(
    config: Config,
    lr: float,
    schedule: str = "cosine",
    clip: float = 1.0,
    windows: bool = False,
) -> Config:
    """The configuration with another recipe.  A constant rate has no warmup.

    windows: read random windows of CONTEXT symbols, with as many symbols in a step.
    """
    warmup = OptimConfig().warmup if schedule == "cosine" else 0
    optim = replace(config.optim, lr=lr, schedule=schedule, warmup=warmup, clip=clip)
    train = replace(config.train, accumulate=1)
    if windows:
        symbols = train.batch * train.length
        length = min(CONTEXT, symbols)
        train = replace(train, state="reset", batch=symbols // length, length=length)
    return replace(config, optim=optim, train=train)


def _of_equal_size(
    config: Config, build: Callable[[int, int], nn.Module], unit: int
) -> Callable[[int], nn.Module]:
    """vocabulary -> `build(width, vocabulary)`, with about as many parameters as seqlm's model.

    The width is a multiple of `unit`.
    """

    def built(vocab_size: int) -> nn.Module:
        def size(width: int) -> int:
            with without_memory():
                return parameter_count(build(width, vocab_size))

        target, widths = parameter_count(blueprint(config, vocab_size)), range(unit, 1 << 14, unit)
        above = bisect_left(widths, target, key=size)
        near = widths[max(0, above - 1) : above + 1]
        return build(min(near, key=lambda width: abs(size(width) - target)), vocab_size)

    return built


CONTENDERS: tuple[Contender[Trainer | Plain], ...] = (
    Contender("seqlm", _seqlm),
    Contender("minGRU-pytorch", _minlm, is_minlm, MINLM),
    Contender("nn.LSTM", _lstm),
    Contender("Transformer", _transformer),
)


def measure(
    config: Config,
    corpus: Corpus,
    warn: Callable[[str], None] = print,
    tick: OnProgress = silent,
) -> list[TrainedContender]:
    """Train each contender for train.time_limit seconds, and measure how good it is.

    config: complete, with the corpus in data.path.  warn: called with the error of another
    library's contender, which is then left out.  Raises UsageError for a corpus of documents,
    InputError for a text that is too short, and SeqlmError when seqlm's own contender fails.
    """
    if corpus.ends("train") is not None:
        raise UsageError(
            f"{corpus.label} consists of documents, and --group learning needs a text that is one "
            "stream. Name another corpus, or prepare this text without --documents."
        )
    Batches(corpus.symbols("train"), config.train, beginning=0)  # a text that is too short
    rows, contenders = [], bench.taking_part(config, CONTENDERS)
    for number, one in enumerate(contenders):

        def tell(share: float, text: str, number: int = number) -> None:
            tick((number + share) / len(contenders), text)

        try:
            rows.append(_trained(one, config, corpus, tell))
        except SeqlmError as error:
            if one.is_ours:
                raise
            warn(str(error))
    return rows


def _trained(
    one: Contender[Trainer | Plain], config: Config, corpus: Corpus, tick: OnProgress
) -> TrainedContender:
    """Train one contender in its process."""
    limit, curve, seconds, text = config.train.time_limit, list[Point](), 0.0, one.name
    with bench.process(one, _run, one.name, config) as connection:
        about = bench.receive(connection, one.name, About)
        while seconds < limit:
            point = bench.receive(connection, one.name, Point)
            seconds = point.seconds
            if point.nats is not None:
                curve.append(point)
                text = f"{one.name}: {point.nats:.4f} nats per character"
            tick(min(1.0, seconds / limit), text)
    last, symbols = curve[-1], config.train.batch * config.train.length
    return TrainedContender(
        contender=one.name,
        recipe=about.recipe,
        dtype=about.dtype,
        parameters=about.parameters,
        steps=last.steps,
        seconds=last.seconds,
        chars=round(last.steps * symbols * corpus.chars_per_symbol("train")),
        val_nats_per_char=_finite(last.nats),
        protocol=about.protocol,
        reached={str(at_most): _reached(curve, at_most) for at_most in THRESHOLDS},
        curve=[{"seconds": p.seconds, "val_nats_per_char": _finite(p.nats)} for p in curve],
    )


def _reached(curve: Sequence[Point], threshold: float) -> float | None:
    """The seconds to the first validation at or below the threshold; None if there is none."""
    return next((p.seconds for p in curve if p.nats is not None and p.nats <= threshold), None)


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def _run(connection: Connection, name: str, config: Config) -> None:
    """The contender's process: sends About, and a Point after each step."""
    with bench.reporting(connection):
        one = next(one for one in CONTENDERS if one.name == name)
        runtime = Runtime.pick(config.runtime)
        with runtime.active():
            trainer = one.build(config)
            connection.send(_about(trainer))
            for point in _learn(config, trainer, runtime.device.value):
                connection.send(point)


def _about(trainer: Trainer | Plain) -> About:
    model, size = trainer.model, parameter_count(trainer.model)
    protocol = f"windows of {model.context:,}" if isinstance(model, Windowed) else "stream"
    if isinstance(trainer, Trainer):
        return About("that of seqlm train", trainer.runtime.dtype.value, size, protocol)
    optim = trainer.config.optim
    recipe = f"{type(trainer.optimizer).__name__}, {optim.schedule}, {optim.lr:g}"
    return About(recipe, trainer.dtype, size, protocol)


def _learn(config: Config, trainer: Trainer | Plain, device: str) -> Iterator[Point]:
    """Train until the time limit, and yield a Point after each step."""
    progress, validations = trainer.progress, 0
    trainer.warm_up()
    while share_done(config, progress) < 1:
        share = schedule(trainer.config.optim, progress.step, expected_steps(config, progress))
        progress.elapsed += bench.timed(partial(trainer.step, share), device)
        nats, due = None, int(VALIDATIONS * min(1.0, share_done(config, progress)))
        if due > validations:
            validations = due
            nats = _nats_per_char(trainer, last=due == VALIDATIONS)
        yield Point(progress.elapsed, progress.step, nats)


def _nats_per_char(trainer: Trainer | Plain, last: bool) -> float:
    """The loss on the whole val split: nats per character, or per byte where it is not text.

    A model with a state carries it, the last time by the protocol stream, before by stripes.
    """
    model, val = trainer.model.eval(), trainer.val
    if isinstance(model, Windowed):
        nats = model.nats(val.symbols)
    elif last:
        nats = evaluate.stream(cast(LanguageModel, model), val.symbols).nats
    else:
        nats = evaluate.validate(cast(LanguageModel, model), val).nats
    return nats / (val.chars or val.bytes)
