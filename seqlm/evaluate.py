"""Bits per character, exactly: whole splits, sums in float64, by a protocol that has a name."""

# N symbols, V vocabulary, C context, S stripes

import hashlib
import sys
from collections.abc import Callable
from math import exp, isfinite, log
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seqlm.cells import State
from seqlm.corpora import characters
from seqlm.data import Corpus
from seqlm.errors import InputError, SeqlmError, UsageError, unknown
from seqlm.model import LanguageModel
from seqlm.tokenizer import Tokenizer, without_unknown

CHUNK = 2048  # symbols read at once; the figure does not depend on it
WARMUP = 256  # symbols a stripe reads before it counts
STRIPES = 64
LARGEST_EXPONENT = log(sys.float_info.max)
PROTOCOLS = ("stream", "window")
Tick = Callable[[float], None]  # called now and then with the share that is done, 0 to 1


class Passage(NamedTuple):
    """A text as a model's symbols, with the counts that make a figure of its nats."""

    symbols: np.ndarray
    chars: int | None  # code points; None where the bytes are not text
    bytes: int
    sha256: str  # of the text as prepared, before anything unknown was left out
    unknown: int = 0  # characters left out because the vocabulary lacks them


class Score(NamedTuple):
    nats: float  # sum of -ln p over the predicted symbols
    tokens: int  # predicted symbols
    chars: int | None  # code points they stand for; None where the bytes are not text
    bytes: int  # UTF-8 bytes they stand for

    @property
    def bits_per_char(self) -> float | None:
        return self.nats / log(2) / self.chars if self.chars else None

    @property
    def bits_per_byte(self) -> float:
        return self.nats / log(2) / self.bytes

    @property
    def nats_per_char(self) -> float | None:
        return self.nats / self.chars if self.chars else None

    @property
    def perplexity(self) -> float | None:
        """exp of the mean nats per symbol; None where it is too large for a number."""
        mean = self.nats / self.tokens
        return exp(mean) if mean < LARGEST_EXPONENT else None


def passage_of_split(
    corpus: Corpus, split: str, tokenizer: Tokenizer, on_unknown: str = "error"
) -> Passage:
    """A split of a corpus in the symbols of `tokenizer`, which need not be the corpus' own."""
    symbols, counts = corpus.symbols(split), corpus.splits[split]
    if on_unknown != "error" or corpus.tokenizer.to_dict() != tokenizer.to_dict():
        return passage_of_text(corpus.tokenizer.decode_bytes(symbols), tokenizer, on_unknown)
    return Passage(symbols, counts["chars"], counts["bytes"], counts["sha256"])


def passage_of_text(text: bytes, tokenizer: Tokenizer, on_unknown: str = "error") -> Passage:
    """A text (UTF-8, or any bytes for a byte tokenizer) in the symbols of `tokenizer`.

    on_unknown: "error" raises InputError for a character the vocabulary lacks, "skip" leaves it
    out and counts it.
    """
    digest = hashlib.sha256(text).hexdigest()
    text, dropped = without_unknown(tokenizer, text, on_unknown)
    if not text:
        raise InputError("There is nothing to evaluate: the text is empty. Give some characters.")
    return Passage(tokenizer.encode(text), characters(text), len(text), digest, dropped)


def score(
    model: LanguageModel,
    tokenizer: Tokenizer,
    passage: Passage,
    protocol: str = "stream",
    context: int = 256,
    tick: Tick | None = None,
) -> Score:
    """The nats of a passage by protocol, with the counts of what was predicted."""
    tick = tick or _ignore
    symbols, chars, size, *_ = passage
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    if protocol == "stream":
        return _finite(Score(stream(model, symbols, tick), len(symbols), chars, size))
    if context < 1:
        raise UsageError(f"--context {context}: it must be at least 1.")
    if len(symbols) < 2:
        raise InputError("Protocol window does not predict the first symbol: give two or more.")
    nats = window(model, symbols, context, tick)
    first = tokenizer.decode_bytes(symbols[:1])
    rest = None if chars is None else chars - len(first.decode("utf-8", errors="ignore"))
    return _finite(Score(nats, len(symbols) - 1, rest, size - len(first)))


def _finite(score: Score) -> Score:
    if not isfinite(score.nats):
        raise SeqlmError("The model's figure is not a finite number. Choose another with --step.")
    return score


def _ignore(share: float) -> None:
    pass


@torch.inference_mode()
def stream(
    model: LanguageModel, symbols: np.ndarray, tick: Tick = _ignore, chunk: int = CHUNK
) -> float:
    """Nats of all N symbols read as one stream from the beginning of text, the state carried."""
    nats, state, previous = 0.0, None, model.beginning
    for start in range(0, len(symbols), chunk):
        part = symbols[start : start + chunk].astype(np.int64)
        inputs = np.concatenate([[previous], part[:-1]])
        cost, state = _nats(model, inputs[None], part[None], state)
        nats, previous = nats + cost.sum().item(), part[-1]
        tick((start + len(part)) / len(symbols))
    return nats


@torch.inference_mode()
def window(model: LanguageModel, symbols: np.ndarray, context: int, tick: Tick = _ignore) -> float:
    """Nats of the symbols 1 .. N - 1, each predicted from its window's earlier symbols alone.

    The windows of `context` symbols start fresh and lie end to end, the last one shorter; symbol
    i + 1 is predicted from the symbols of the window up to i.
    """
    predicted = len(symbols) - 1
    context = min(context, predicted)
    whole = predicted // context * context
    inputs, targets = symbols[:whole].reshape(-1, context), symbols[1 : whole + 1]
    targets = targets.reshape(-1, context)
    at_once = max(1, 8 * CHUNK // context)
    parts = [
        (inputs[i : i + at_once], targets[i : i + at_once]) for i in range(0, len(inputs), at_once)
    ]
    if whole < predicted:
        parts.append((symbols[None, whole:-1], symbols[None, whole + 1 :]))
    nats = 0.0
    for done, (x, y) in enumerate(parts, start=1):
        nats += _nats(model, x.astype(np.int64), y.astype(np.int64))[0].sum().item()
        tick(done / len(parts))
    return nats


@torch.inference_mode()
def stripes(model: LanguageModel, symbols: np.ndarray) -> float:
    """Nats of all N symbols read as up to 64 stripes side by side: nearly `stream`, but parallel.

    Each stripe but the first reads the 256 symbols before it without counting them; the first
    starts at the beginning of text.  Every symbol counts once.
    """
    count = max(1, min(STRIPES, len(symbols) // WARMUP))
    length = -(-len(symbols) // count)
    starts = np.arange(count) * length
    padded = np.concatenate([symbols, np.zeros(count * length - len(symbols), symbols.dtype)])
    targets = padded.reshape(count, length).astype(np.int64)
    counts = (starts[:, None] + np.arange(length)) < len(symbols)
    inputs = np.empty_like(targets)
    inputs[:, 1:] = targets[:, :-1]
    inputs[0, 0], inputs[1:, 0] = model.beginning, padded[starts[1:] - 1]

    state = model.initial_state(count)
    if count > 1:
        # the last of the symbols before a stripe is its own first input
        warmup = min(WARMUP, length) - 1
        before = np.stack([padded[s - 1 - warmup : s - 1] for s in starts[1:]])
        _, warm = model(_tensor(model, before.astype(np.int64)))
        state = tuple(torch.cat([s[:1], w]) for s, w in zip(state, warm, strict=True))
    nats, chunk = 0.0, max(1, 8 * CHUNK // count)
    for start in range(0, length, chunk):
        here = slice(start, start + chunk)
        cost, state = _nats(model, inputs[:, here], targets[:, here], state)
        nats += cost[torch.from_numpy(counts[:, here])].sum().item()
    return nats


def _nats(
    model: LanguageModel, inputs: np.ndarray, targets: np.ndarray, state: State | None = None
) -> tuple[Tensor, State]:
    """-ln p of every target, (B, T) float64 on the CPU, and the state after them."""
    logits, state = model(_tensor(model, inputs), state)
    cost = F.cross_entropy(logits.float().mT, _tensor(model, targets), reduction="none")
    return cost.cpu().double(), state


def _tensor(model: LanguageModel, symbols: np.ndarray) -> Tensor:
    return torch.from_numpy(symbols).to(model.embedding.weight.device)
