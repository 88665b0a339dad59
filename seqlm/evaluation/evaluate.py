"""Bits per character of a model on a text, by one of several protocols.  Sums are in float64."""

# N symbols, D documents, B rows side by side, T symbols of each

import sys
from collections.abc import Callable, Iterable, Iterator
from math import exp, isfinite, log
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seqlm.cells import State
from seqlm.errors import InputError, SeqlmError, UsageError, unknown
from seqlm.evaluation.passage import Passage
from seqlm.model import LanguageModel, symbols_at_once
from seqlm.progress import OnProgress, silent
from seqlm.text.tokenizer import Tokenizer

CHUNK = 2048  # symbols of a row in one pass; the results do not depend on it
AT_ONCE = 8 * CHUNK  # symbols in one pass, over all rows
SIDE_BY_SIDE = 1024  # documents in one pass
WARMUP = 256  # symbols that a stripe reads before its symbols count
STRIPES = 64
NATS_PER_BIT = log(2)
LARGEST_EXPONENT = log(sys.float_info.max)  # above this, exp overflows
PROTOCOLS = ("stream", "window")
GROUP = 1 << 16  # symbols of documents that are put back into the text's order together
Judge = Callable[[Tensor, Tensor], Tensor]
"""Computes K values for each prediction: logits (B, T, V), targets (B, T) -> (K, B, T)."""


class Sums(NamedTuple):
    """Sums over predicted symbols."""

    nats: float  # of -ln p
    correct: float  # number of symbols that were the model's most likely one


class Score(NamedTuple):
    """The sums over a passage, and the counts that turn them into metrics."""

    nats: float  # sum of -ln p over the predicted symbols
    correct: float  # number of predicted symbols that were the model's most likely one
    tokens: int  # number of predicted symbols
    chars: int | None  # code points of the predicted text; None if the bytes are not text
    bytes: int  # UTF-8 bytes of the predicted text

    @property
    def bits(self) -> float:
        return self.nats / NATS_PER_BIT

    @property
    def bits_per_char(self) -> float | None:
        return self.bits / self.chars if self.chars else None

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes

    @property
    def nats_per_char(self) -> float | None:
        return self.nats / self.chars if self.chars else None

    @property
    def accuracy(self) -> float:
        """The share of the symbols that were the model's most likely one."""
        return self.correct / self.tokens

    @property
    def perplexity(self) -> float | None:
        """exp of the mean nats per symbol; None where that overflows."""
        mean = self.nats / self.tokens
        return exp(mean) if mean < LARGEST_EXPONENT else None

    def metrics(self) -> dict[str, float | None]:
        """The figures that `seqlm eval` states, by each protocol."""
        names = ("bits_per_char", "bits_per_byte", "nats_per_char", "perplexity", "accuracy")
        return {name: getattr(self, name) for name in names}


def loss_and_hit(logits: Tensor, targets: Tensor) -> Tensor:
    """For every target its -ln p, and whether it was the model's most likely symbol."""
    cost = F.cross_entropy(logits.float().mT, targets, reduction="none")
    return torch.stack([cost, logits.argmax(-1) == targets])


def score(
    model: LanguageModel,
    tokenizer: Tokenizer,
    passage: Passage,
    protocol: str = "stream",
    context: int = 256,
    tick: OnProgress = silent,
) -> Score:
    """Score a passage by a protocol, 'stream' or 'window'.

    stream: reads the passage, or each of its documents, as one stream from the beginning of text.
    window: cuts the passage into windows of `context` symbols, and reads each from a fresh state.
    Raises UsageError for an unknown protocol or an impossible context, InputError for a passage
    that is too short, and SeqlmError if the result is not finite.
    """
    symbols, chars, size = passage.symbols, passage.chars, passage.bytes
    tick = watching(passage, tick)
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    if protocol == "stream" and passage.ends is None:
        return finite(Score(*stream(model, symbols, tick), passage.tokens, chars, size))
    if protocol == "stream":
        return finite(_by_document(model, passage, tick))
    if passage.ends is not None:
        raise UsageError(
            "The protocol window would read across the borders of documents. Use --protocol "
            "stream, which reads each document from a fresh state."
        )
    if context < 1:
        raise UsageError(f"--context {context}: it must be at least 1.")
    if len(symbols) < 2:
        raise InputError("The protocol window needs at least 2 symbols. Give a longer text.")
    sums = window(model, symbols, context, tick)
    first = tokenizer.decode_bytes(symbols[:1])
    # as many characters as bytes: characters are bytes, or all are ASCII
    counted = first if chars == size else first.decode("utf-8", errors="ignore")
    rest = None if chars is None else chars - len(counted)
    return finite(Score(*sums, len(symbols) - 1, rest, size - len(first)))


def validate(model: LanguageModel, passage: Passage) -> Score:
    """Score a passage by the protocol 'stripes'; a passage of documents by 'stream'."""
    tick = watching(passage)
    if passage.ends is not None:
        return _by_document(model, passage, tick)
    sums = stripes(model, passage.symbols, tick)
    return Score(*sums, passage.tokens, passage.chars, passage.bytes)


def _by_document(model: LanguageModel, passage: Passage, tick: OnProgress) -> Score:
    assert passage.ends is not None
    sums = each_document(model, passage.symbols, passage.ends, tick, passage.answers)
    return Score(*sums, passage.tokens, passage.chars, passage.bytes)


def watching(passage: Passage, tick: OnProgress = silent) -> OnProgress:
    """Check now that the passage's file was not cut; returns `tick` with the same check before it.

    Each protocol calls `tick` between two chunks.  Without the check, the system would kill the
    process when it reads a part that a mapped file has lost (SIGBUS).
    """
    passage.refuse_cut()

    def watch(share: float, what: str) -> None:
        passage.refuse_cut()
        tick(share, what)

    return watch


def finite(score: Score) -> Score:
    """The score; SeqlmError if it is not a finite number."""
    if not isfinite(score.nats):
        raise SeqlmError(
            "The model's score is not a finite number. Choose another step with --step."
        )
    return score


@torch.inference_mode()
def stream(
    model: LanguageModel, symbols: np.ndarray, tick: OnProgress = silent, chunk: int = CHUNK
) -> Sums:
    """Read all N symbols as one stream from the beginning of text; the state is carried."""
    return sum_up(_stripe_chunks(model, symbols, 1, tick, chunk))


@torch.inference_mode()
def stripes(model: LanguageModel, symbols: np.ndarray, tick: OnProgress = silent) -> Sums:
    """Read all N symbols as up to 64 stripes side by side: close to `stream`, but parallel.

    The first stripe starts at the beginning of text.  Every other stripe first reads the 256
    symbols before it as context; they count in the stripe before.  So every symbol counts once.
    """
    count = max(1, min(STRIPES, len(symbols) // WARMUP))
    return sum_up(_stripe_chunks(model, symbols, count, tick))


def _stripe_chunks(
    model: LanguageModel,
    symbols: np.ndarray,
    count: int,
    tick: OnProgress,
    chunk: int = CHUNK,
    judge: Judge = loss_and_hit,
) -> Iterator[Tensor]:
    """The values of `judge` for every symbol, read as `count` stripes: (K, some), by chunks."""
    length = -(-len(symbols) // count)
    starts = np.arange(count)[:, None] * length
    state = model.initial_state(count)
    chunk = min(chunk, max(1, _at_once(model) // count))
    if count > 1:
        # the symbol just before a stripe is that stripe's first input, so it is left out here
        warmup = min(WARMUP, length) - 1
        before = symbols[starts[1:] - 1 - warmup + np.arange(warmup)]
        warm = tuple(s[1:] for s in state)
        for done in range(0, warmup, chunk):
            inputs = before[:, done : done + chunk].astype(np.int64)
            _, warm = model(_tensor(model, inputs), warm)
        state = tuple(torch.cat([s[:1], w]) for s, w in zip(state, warm, strict=True))
    for done in range(0, length, chunk):
        places = starts + np.arange(done, min(done + chunk, length))
        judged, state = _judged_places(model, symbols, places, places[:, 0] == 0, state, judge)
        report(tick, min((done + chunk) * count, len(symbols)), len(symbols))
        yield judged[:, torch.from_numpy(places < len(symbols))]


@torch.inference_mode()
def each_symbol(
    model: LanguageModel, passage: Passage, judge: Judge, tick: OnProgress = silent
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """The values of `judge` for every symbol that counts, by protocol stream, in the text's order.

    Yields the offsets of some symbols in the passage, (n,), and their values, (K, n) float64.
    Memory does not grow with the passage.
    """
    symbols, ends = passage.symbols, passage.ends
    tick = watching(passage, tick)
    if ends is None:
        ends = np.array([len(symbols)])
    begin, first = 0, 0
    while first < len(ends):
        # as many whole documents as have GROUP symbols together, or one that is longer
        last = max(first + 1, int(np.searchsorted(ends, begin + GROUP, side="right")))
        part = symbols[begin : ends[last - 1]]
        if passage.answers is None and last == first + 1:
            done = begin
            for values in _stripe_chunks(model, part, 1, silent, judge=judge):
                yield np.arange(done, done + values.shape[1]), values
                done += values.shape[1]
                report(tick, done, len(symbols))
        else:
            answers = None if passage.answers is None else passage.answers[first:last] - begin
            inside = ends[first:last] - begin
            chunks = [*_document_chunks(model, part, inside, silent, answers, judge)]
            offsets = np.concatenate([offsets for offsets, _ in chunks])
            order = np.argsort(offsets)
            yield begin + offsets[order], torch.cat([values for _, values in chunks], 1)[:, order]
        begin, first = int(ends[last - 1]), last
        report(tick, begin, len(symbols))


@torch.inference_mode()
def blocks(model: LanguageModel, passage: Passage, size: int) -> list[Sums]:
    """The sums of consecutive blocks of a passage, by protocol stream.

    A block is `size` symbols, or as many whole documents as have `size` symbols together.  The
    blocks add up to `score`, and their borders depend on the passage alone, not on the model.
    """
    symbols, ends, answers = passage.symbols, passage.ends, passage.answers
    tick = watching(passage)
    if ends is None:
        judged = torch.cat([*_stripe_chunks(model, symbols, 1, tick)], dim=1)
        return [sum_up([part]) for part in judged.split(size, dim=1)]
    sums, begin, first = [], 0, 0
    for last, end in enumerate(ends, start=1):
        if end - begin >= size or last == len(ends):
            inside = None if answers is None else answers[first:last] - begin
            part = symbols[begin:end], ends[first:last] - begin
            sums.append(each_document(model, *part, tick, answers=inside))
            begin, first = end, last
    return sums


@torch.inference_mode()
def each_document(
    model: LanguageModel,
    symbols: np.ndarray,
    ends: np.ndarray,
    tick: OnProgress = silent,
    answers: np.ndarray | None = None,
    begins: np.ndarray | None = None,
) -> Sums:
    """Read all N symbols, each document as a stream of its own.

    ends: (D,) the offset at which each document ends.  answers: (D,) the offset at which its answer
    begins, if only answers count; the symbol that ends the answer does not count.  Documents are
    read side by side; a finished one leaves the batch.
    begins: (D,) whether the first input is the beginning symbol; else it is the symbol before.
    """
    chunks = _document_chunks(model, symbols, ends, tick, answers, begins=begins)
    return sum_up(values for _, values in chunks)


def _document_chunks(
    model: LanguageModel,
    symbols: np.ndarray,
    ends: np.ndarray,
    tick: OnProgress,
    answers: np.ndarray | None,
    judge: Judge = loss_and_hit,
    begins: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """The values of `judge` for the symbols that count, not in the text's order.

    Yields the offsets of some symbols, (n,), and their values, (K, n).
    """
    for block in range(0, len(ends), SIDE_BY_SIDE):
        last = np.asarray(ends[block : block + SIDE_BY_SIDE])
        sizes = np.diff(last, prepend=ends[block - 1] if block else 0)
        longest_first = np.argsort(-sizes, kind="stable")
        sizes, starts = sizes[longest_first], (last - sizes)[longest_first]
        first, over = np.zeros_like(sizes), sizes
        if answers is not None:
            first, over = answers[block : block + SIDE_BY_SIDE][longest_first] - starts, sizes - 1
        begin: np.ndarray | bool = True
        if begins is not None:
            begin = begins[block : block + SIDE_BY_SIDE][longest_first]
        state, done = model.initial_state(len(sizes)), 0
        while done < sizes[0]:
            rows = int(np.count_nonzero(sizes > done))
            places = done + np.arange(min(sizes[0] - done, max(1, _at_once(model) // rows)))
            counted = (places >= first[:rows, None]) & (places < over[:rows, None])
            state = tuple(s[:rows] for s in state)
            here = starts[:rows, None] + places
            judged, state = _judged_places(model, symbols, here, begin, state, judge)
            begin = False
            yield here[counted], judged[:, torch.from_numpy(counted)]
            done += len(places)
            unread = int(np.maximum(sizes - done, 0).sum())
            report(tick, int(last[-1]) - unread, len(symbols))


@torch.inference_mode()
def window(
    model: LanguageModel, symbols: np.ndarray, context: int, tick: OnProgress = silent
) -> Sums:
    """Predict the symbols 1 .. N - 1, each from the earlier symbols of its window only.

    Windows of `context` symbols lie end to end; the last one may be shorter.  Each is read from a
    fresh state, after the symbol for the beginning of text, as in training.  Symbol i + 1 is
    predicted from the symbols of the window up to i.
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
    judged = []
    for done, (x, y) in enumerate(parts, start=1):
        _, begun = model(_tensor(model, np.full((len(x), 1), model.beginning)))
        judged.append(_judged(model, x.astype(np.int64), y.astype(np.int64), begun)[0].flatten(1))
        report(tick, min(done * at_once * context, predicted), predicted)
    return sum_up(judged)


def report(tick: OnProgress, done: int, symbols: int) -> None:
    tick(done / symbols, f"{done:,} of {symbols:,} symbols")


def _at_once(model: LanguageModel) -> int:
    """The number of symbols in one pass, over all rows."""
    return min(AT_ONCE, symbols_at_once(model))


def _judged_places(
    model: LanguageModel,
    symbols: np.ndarray,
    places: np.ndarray,
    begins: np.ndarray | bool,
    state: State,
    judge: Judge,
) -> tuple[Tensor, State]:
    """`_judged` for the symbols at `places`, (B, T); a place after the text's end does not count.

    begins: (B,) or one value: whether the row's first input is the beginning symbol.  Else it is
    the symbol before the row's first place.
    """
    places = np.minimum(places, len(symbols) - 1)
    targets = symbols[places].astype(np.int64)
    first = np.where(begins, model.beginning, symbols[places[:, 0] - 1].astype(np.int64))
    inputs = np.column_stack([first, targets[:, :-1]])
    return _judged(model, inputs, targets, state, judge)


def _judged(
    model: LanguageModel,
    inputs: np.ndarray,
    targets: np.ndarray,
    state: State | None = None,
    judge: Judge = loss_and_hit,
) -> tuple[Tensor, State]:
    """The values of `judge` for every target, and the state after the inputs.

    inputs, targets: (B, T).  Returns (K, B, T) float64 on the CPU.
    """
    logits, state = model(_tensor(model, inputs), state)
    return judge(logits, _tensor(model, targets)).cpu().double(), state


def sum_up(judged: Iterable[Tensor]) -> Sums:
    """The sums over chunks of (2, some) values of `loss_and_hit`."""
    total = torch.zeros(2, dtype=torch.float64)
    for part in judged:
        total += part.sum(1)
    return Sums(*total.tolist())


def scored(judged: Iterable[tuple[np.ndarray, Tensor]], passage: Passage) -> Score:
    """The score of a passage, from what `each_symbol` yields with `loss_and_hit`."""
    sums = sum_up(values for _, values in judged)
    return Score(*sums, passage.tokens, passage.chars, passage.bytes)


def _tensor(model: LanguageModel, symbols: np.ndarray) -> Tensor:
    return torch.from_numpy(symbols).to(model.embedding.weight.device)
