"""Bits per character, exactly: whole splits, sums in float64, by a protocol that has a name."""

# N symbols, V vocabulary, C context, S stripes

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from math import exp, isfinite, log
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seqlm.cells import State
from seqlm.data import Corpus
from seqlm.draft import Lines, code_points, is_text
from seqlm.errors import InputError, SeqlmError, UsageError, unknown
from seqlm.model import LanguageModel
from seqlm.tokenizer import Tokenizer, without_unknown

CHUNK = 2048  # symbols of a stream read at once; the figure does not depend on it
AT_ONCE = 8 * CHUNK  # the same of rows side by side
LOGITS = 1 << 24  # the most that are held at once, for which a large vocabulary reads less
SIDE_BY_SIDE = 1024  # documents
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
    ends: np.ndarray | None = None  # of its documents, in symbols; None where it is one stream


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
    """A split of a corpus in the symbols of `tokenizer`, which need not be the corpus' own.

    Raises InputError where the split is not as it was written.
    """
    symbols, ends, counts = corpus.symbols(split), corpus.ends(split), corpus.splits[split]
    corpus.verify(split)
    if on_unknown == "error" and corpus.tokenizer.to_dict() == tokenizer.to_dict():
        return Passage(symbols, counts["chars"], counts["bytes"], counts["sha256"], ends=ends)
    documents = [symbols]
    if ends is not None and "files" in (tokenizer.documents, corpus.tokenizer.documents):
        documents = np.split(symbols, ends[:-1])
    return passage_of_text(map(corpus.tokenizer.decode_bytes, documents), tokenizer, on_unknown)


def passage_of_text(
    documents: Iterable[bytes], tokenizer: Tokenizer, on_unknown: str = "error"
) -> Passage:
    """Texts (UTF-8, or any bytes for a byte tokenizer) in the symbols of `tokenizer`.

    They are documents of their own only where the tokenizer has files for documents; lines are
    read as `prepare` does, without empty ones and with a newline at the end.
    on_unknown: "error" raises InputError for a character the vocabulary lacks, "skip" leaves it
    out and counts it.
    """
    if tokenizer.documents == "lines":
        documents = chain.from_iterable(Lines().whole([document]) for document in documents)
    if tokenizer.documents != "files":
        documents = [b"".join(documents)]
    digest, dropped, size, chars, parts = hashlib.sha256(), 0, 0, 0, []
    for document in documents:
        digest.update(document)
        known, unknown = without_unknown(tokenizer, document, on_unknown)
        parts.append(tokenizer.encode_document(known))
        size, dropped = size + len(known), dropped + unknown
        chars = None if chars is None or not is_text(known) else chars + code_points(known)
    if not size:
        raise InputError("There is nothing to evaluate: the text is empty. Give some characters.")
    symbols, ends = np.concatenate(parts), None
    if tokenizer.end is not None:
        ends = np.flatnonzero(symbols == tokenizer.end) + 1
    return Passage(symbols, chars, size, digest.hexdigest(), dropped, ends)


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
    symbols, chars, size = passage.symbols, passage.chars, passage.bytes
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    if protocol == "stream":
        if passage.ends is None:
            nats = stream(model, symbols, tick)
        else:
            nats = each_document(model, symbols, passage.ends, tick)
        return _finite(Score(nats, len(symbols), chars, size))
    if passage.ends is not None:
        raise UsageError(
            "Protocol window would read over the borders of documents. Use --protocol stream, "
            "which reads each of them from a fresh state."
        )
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
    return sum(cost.sum().item() for cost in _streamed(model, symbols, tick, chunk))


def _streamed(
    model: LanguageModel, symbols: np.ndarray, tick: Tick, chunk: int
) -> Iterator[Tensor]:
    """Nats of every symbol, chunk by chunk."""
    state, previous = None, model.beginning
    chunk = min(chunk, _at_once(model))
    for start in range(0, len(symbols), chunk):
        part = symbols[start : start + chunk].astype(np.int64)
        inputs = np.concatenate([[previous], part[:-1]])
        cost, state = _nats(model, inputs[None], part[None], state)
        previous = part[-1]
        tick((start + len(part)) / len(symbols))
        yield cost[0]


@torch.inference_mode()
def blocks(model: LanguageModel, passage: Passage, size: int) -> list[float]:
    """Nats by protocol stream, of every `size` symbols or of as many whole documents as make them.

    Their sum is that of `score`; what falls into a block depends on the passage alone.
    """
    symbols, ends = passage.symbols, passage.ends
    if ends is None:
        nats = torch.cat([*_streamed(model, symbols, _ignore, CHUNK)]).numpy()
        return np.add.reduceat(nats, np.arange(0, len(nats), size)).tolist()
    sums, begin, first = [], 0, 0
    for last, end in enumerate(ends, start=1):
        if end - begin >= size or last == len(ends):
            sums.append(each_document(model, symbols[begin:end], ends[first:last] - begin))
            begin, first = end, last
    return sums


@torch.inference_mode()
def each_document(
    model: LanguageModel, symbols: np.ndarray, ends: np.ndarray, tick: Tick = _ignore
) -> float:
    """Nats of all N symbols, each document read as a stream of its own.

    ends: (D,) the number of symbols up to the end of each document.  Documents are read side by
    side, and those that are at their end leave.
    """
    nats = 0.0
    for block in range(0, len(ends), SIDE_BY_SIDE):
        last = np.asarray(ends[block : block + SIDE_BY_SIDE])
        sizes = np.diff(last, prepend=ends[block - 1] if block else 0)
        longest_first = np.argsort(-sizes, kind="stable")
        sizes, starts = sizes[longest_first], (last - sizes)[longest_first]
        state, done = model.initial_state(len(sizes)), 0
        while done < sizes[0]:
            rows = int(np.count_nonzero(sizes > done))
            places = done + np.arange(min(sizes[0] - done, max(1, _at_once(model) // rows)))
            inside = places < sizes[:rows, None]
            here = np.minimum(starts[:rows, None] + places, len(symbols) - 1)
            targets = symbols[here].astype(np.int64)
            inputs = np.empty_like(targets)
            inputs[:, 0] = symbols[here[:, 0] - 1] if done else model.beginning
            inputs[:, 1:] = targets[:, :-1]
            cost, state = _nats(model, inputs, targets, tuple(s[:rows] for s in state))
            nats += cost[torch.from_numpy(inside)].sum().item()
            done += len(places)
        tick(float(last[-1] / len(symbols)))
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
    at_once = max(1, _at_once(model) // context)
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
    state = model.initial_state(count)
    if count > 1:
        # the last of the symbols before a stripe is its own first input
        warmup = min(WARMUP, length) - 1
        before = symbols[starts[1:, None] - 1 - warmup + np.arange(warmup)]
        _, warm = model(_tensor(model, before.astype(np.int64)))
        state = tuple(torch.cat([s[:1], w]) for s, w in zip(state, warm, strict=True))
    nats, chunk = 0.0, max(1, _at_once(model) // count)
    for done in range(0, length, chunk):
        places = starts[:, None] + np.arange(done, min(done + chunk, length))
        here = np.minimum(places, len(symbols) - 1)
        targets = symbols[here].astype(np.int64)
        inputs = np.empty_like(targets)
        inputs[:, 0], inputs[:, 1:] = symbols[here[:, 0] - 1], targets[:, :-1]
        if not done:
            inputs[0, 0] = model.beginning
        cost, state = _nats(model, inputs, targets, state)
        nats += cost[torch.from_numpy(places < len(symbols))].sum().item()
    return nats


def _at_once(model: LanguageModel) -> int:
    """Symbols of a model's input at a time."""
    return max(1, min(AT_ONCE, LOGITS // model.beginning))


def _nats(
    model: LanguageModel, inputs: np.ndarray, targets: np.ndarray, state: State | None = None
) -> tuple[Tensor, State]:
    """-ln p of every target, (B, T) float64 on the CPU, and the state after them."""
    logits, state = model(_tensor(model, inputs), state)
    cost = F.cross_entropy(logits.float().mT, _tensor(model, targets), reduction="none")
    return cost.cpu().double(), state


def _tensor(model: LanguageModel, symbols: np.ndarray) -> Tensor:
    return torch.from_numpy(symbols).to(model.embedding.weight.device)
