"""The batch of every training step, a function of the seed and the step alone.

Knows nothing of models.
"""

# N symbols of a split, B batch, T length, S streams read here, R rows

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from seqlm.config import TrainConfig
from seqlm.errors import InputError
from seqlm.seeds import derived_seed
from seqlm.text.corpus import Corpus

IGNORED = -100  # the target of a place that is not learned; cross_entropy ignores it

# The share of steps before which a stream restarts from the initial state.  Without it a stream
# would meet this state once an epoch, and texts that begin with a prompt would begin badly.
RESTARTS = 0.01


class Rows(NamedTuple):
    """A micro-batch of a training step: sequences that the model reads side by side.

    The batch has B streams of text, of which this process reads S.  Each row is a piece of one of
    these streams.  A row may be shorter than T: targets after its end are IGNORED, and so are
    targets before an answer where only answers are learned.
    """

    inputs: np.ndarray  # (R, T) int64
    targets: np.ndarray  # (R, T) int64
    sizes: np.ndarray  # (R,) number of symbols of text
    streams: np.ndarray  # (R,) the stream of each row, 0 .. S - 1
    fresh: np.ndarray  # (R,) bool: starts from the initial state instead of its stream's state
    kept: np.ndarray  # (R,) bool: the state after the row becomes its stream's state


def batches_of(
    corpus: Corpus, config: TrainConfig, beginning: int, streams: np.ndarray, *, ahead: bool
) -> "Batches | DocumentBatches | Ahead":
    """The batches of a corpus' train split, for the streams that this process reads.

    ahead: make each batch one step early, in a thread, so that a GPU does not wait for it.
    """
    symbols, ends = corpus.symbols("train"), corpus.ends("train")
    batches: Batches | DocumentBatches
    if ends is None:
        batches = Batches(symbols, config, beginning, streams)
    else:
        answers = corpus.answers("train")
        batches = DocumentBatches(symbols, ends, config, beginning, answers, streams)
    return Ahead(batches) if ahead else batches


class Batches:
    """Batches of a text that is one stream.  Each is a function of (seed, step) alone.

    config.state "carry": B streams run through the text side by side.  A step takes the next T
    symbols of each stream, and continues from the state after the last step.  Every epoch starts
    from the initial state at a new random place, and so does a random RESTARTS of the streams in
    every step; the text is read as a circle.
    config.state "reset": B windows of T symbols from random places, each from the initial state.
    The first input after an initial state is the symbol `beginning`.
    streams: the streams that this process reads, in this order; None: all B.
    Raises InputError for a text that is too short, naming the largest batch and length that fit.
    """

    def __init__(
        self,
        symbols: np.ndarray,
        config: TrainConfig,
        beginning: int,
        streams: np.ndarray | None = None,
    ):
        batch, length = config.batch, config.length
        _refuse_too_short(len(symbols), batch, length)
        self.symbols, self.beginning = symbols, beginning
        self.streams = np.arange(batch) if streams is None else streams
        self.batch, self.length, self.seed = batch, length, config.seed
        self.carry, self.accumulate = config.state == "carry", config.accumulate
        self.steps_per_epoch = len(symbols) // (batch * length)

    def at(self, step: int) -> list[Rows]:
        """The micro-batches of a step."""
        if not self.carry:
            random = np.random.default_rng(derived_seed(self.seed, "windows", step))
            starts = random.integers(0, len(self.symbols) - self.length + 1, self.batch)
            return self._cut(starts[self.streams], np.ones(len(self.streams), dtype=bool))
        epoch, place = divmod(step, self.steps_per_epoch)
        stream = self.steps_per_epoch * self.length
        random = np.random.default_rng(derived_seed(self.seed, "epoch", epoch))
        first = random.integers(0, len(self.symbols))
        starts = first + self.streams * stream + place * self.length
        random = np.random.default_rng(derived_seed(self.seed, "restarts", step))
        restarts = random.random(self.batch)[self.streams] < RESTARTS
        return self._cut(starts, restarts | (place == 0))

    def _cut(self, starts: np.ndarray, fresh: np.ndarray) -> list[Rows]:
        places = (starts[:, None] + np.arange(self.length)) % len(self.symbols)
        targets = self.symbols[places].astype(np.int64)
        inputs = np.empty_like(targets)
        inputs[:, 0] = np.where(fresh, self.beginning, self.symbols[places[:, 0] - 1])
        inputs[:, 1:] = targets[:, :-1]
        streams, sizes = np.arange(len(starts)), np.full(len(starts), self.length)
        rows = Rows(inputs, targets, sizes, streams, fresh, np.ones_like(fresh))
        parts = [np.split(array, self.accumulate) for array in rows]
        return [Rows(*part) for part in zip(*parts, strict=True)]


class Packing(NamedTuple):
    """How the documents of an epoch lie in its slots."""

    order: np.ndarray  # (D,) the documents in the order in which they are read
    begins: np.ndarray  # (D,) offset of each one's first symbol when they are laid end to end
    slots: int  # number of slots, none of them empty
    first: int  # the slot at which the first stream begins


class DocumentBatches:
    """Batches of a text that consists of documents.  Each is a function of (seed, step) alone.

    An epoch lays the documents end to end in a random order, and cuts this into slots of T symbols.
    A document belongs to the slot in which it begins.  That slot has its first T symbols; for a
    long document, each of the next slots has T more.  B streams run through the slots side by side,
    one slot a step, from a random slot on; the slots form a circle.  At most B slots of an epoch
    stay unread, and they differ from epoch to epoch.
    Each document in a slot is a row of its own.  A document's first input is the symbol
    `beginning`, from the initial state.
    config.state "carry": the rest of a long document continues from the state before it, unless an
    epoch begins in the middle of this document.  "reset": it starts from the initial state.  The
    beginning symbol is always followed by a document's first symbol.
    answers: (D,) the offset of each document's answer, if only answers are learned.
    streams: the streams that this process reads, in this order; None: all B.
    Raises InputError for a text that is too short, naming the largest batch and length that fit.
    """

    def __init__(
        self,
        symbols: np.ndarray,
        ends: np.ndarray,
        config: TrainConfig,
        beginning: int,
        answers: np.ndarray | None = None,
        streams: np.ndarray | None = None,
    ):
        batch, length = config.batch, config.length
        _refuse_too_short(len(symbols), batch, length)
        self.symbols, self.beginning = symbols, beginning
        self.ends, self.answers = ends, answers
        self.streams = np.arange(batch) if streams is None else streams
        self.length, self.seed, self.carry = length, config.seed, config.state == "carry"
        self.area = len(self.streams) * length // config.accumulate
        self.steps_per_epoch = len(symbols) // (batch * length)
        self._widths = _widths(length)
        self._read: tuple[int, Packing] | None = None

    def at(self, step: int) -> list[Rows]:
        """The micro-batches of a step: about S x T symbols, in rows of similar length."""
        epoch, place = divmod(step, self.steps_per_epoch)
        packing = self._epoch(epoch)
        slots = packing.first + self.streams * self.steps_per_epoch + place
        contents = [self._slot(packing, int(slot)) for slot in slots % packing.slots]
        streams = np.repeat(np.arange(len(slots)), [len(documents) for documents, _ in contents])
        documents, offsets = (np.concatenate(arrays) for arrays in zip(*contents, strict=True))
        ends, starts = self.ends[documents], self._starts(documents) + offsets
        sizes = np.minimum(ends - starts, self.length)
        # a micro-batch is as wide as its longest row, so sorted rows need the least padding
        longest_first = np.argsort(-sizes, kind="stable")
        parts, done = [], 0
        while done < len(sizes):
            width = self._widths[np.searchsorted(self._widths, sizes[longest_first[done]])]
            # the number of rows is a multiple of `unit`, so that few different shapes occur
            unit = max(1, self.area // (8 * width))
            part = longest_first[done : done + max(1, self.area // width // unit * unit)]
            done += len(part)
            begins = offsets[part] == 0
            inputs, targets = self._cut(starts[part], sizes[part], begins, width)
            if self.answers is not None:
                before = self.answers[documents[part]] - starts[part]
                targets[np.arange(width) < before[:, None]] = IGNORED
            # the state of a document that has ended is not carried to the next document
            kept = starts[part] + sizes[part] < ends[part]
            fresh = begins | (place == 0) | (not self.carry)
            rows = Rows(inputs, targets, sizes[part], streams[part], fresh, kept)
            parts.append(_padded(rows, -len(part) % unit))
        return parts

    def _slot(self, packing: "Packing", slot: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of a slot, and the offset in each document at which its row begins."""
        order, begins = packing.order, packing.begins
        first, last = np.searchsorted(begins, [slot * self.length, (slot + 1) * self.length])
        documents, offsets = order[first:last], np.zeros(last - first, dtype=np.int64)
        if first:  # a long document from an earlier slot may continue here
            offset = (slot - begins[first - 1] // self.length) * self.length
            before = order[first - 1 : first]
            if offset < self.ends[before] - self._starts(before):
                documents = np.concatenate([before, documents])
                offsets = np.concatenate([[offset], offsets])
        return documents, offsets

    def _epoch(self, epoch: int) -> "Packing":
        if self._read is None or self._read[0] != epoch:
            random = np.random.default_rng(derived_seed(self.seed, "epoch", epoch))
            order = random.permutation(len(self.ends))
            sizes = np.diff(self.ends, prepend=0)[order]
            begins = np.cumsum(sizes) - sizes
            last = begins // self.length + (sizes - 1) // self.length  # slot of every document
            slots = int(last.max()) + 1
            self._read = epoch, Packing(order, begins, slots, int(random.integers(slots)))
        return self._read[1]

    def _starts(self, documents: np.ndarray) -> np.ndarray:
        return np.where(documents > 0, self.ends[documents - 1], 0)

    def _cut(
        self, starts: np.ndarray, sizes: np.ndarray, begins: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, (R, width): `sizes` symbols from each of the places `starts`."""
        places = starts[:, None] + np.arange(width)
        inside = np.arange(width) < sizes[:, None]
        text = self.symbols[np.minimum(places, len(self.symbols) - 1)].astype(np.int64)
        inputs = np.empty_like(text)
        inputs[:, 0] = np.where(begins, self.beginning, self.symbols[starts - 1])
        inputs[:, 1:] = text[:, :-1]
        return inputs, np.where(inside, text, IGNORED)


class Ahead:
    """Makes the next batch in a thread while a GPU computes the present step."""

    def __init__(self, batches: Batches | DocumentBatches):
        self.batches, self.thread = batches, ThreadPoolExecutor(1)
        self.made: dict[int, Future[list[Rows]]] = {}

    def at(self, step: int) -> list[Rows]:
        """The micro-batches of a step."""
        self.made = {
            wanted: self.made.get(wanted) or self.thread.submit(self.batches.at, wanted)
            for wanted in (step, step + 1)
        }
        return self.made[step].result()


def _widths(length: int) -> np.ndarray:
    """The widths 4, 6, 8, 12, 16, 24, ... and `length`, to which rows are padded.

    Every new shape of a micro-batch costs time and memory, so there are only a few.
    """
    widths = {2**power * factor for power in range(2, 32) for factor in (2, 3)}
    return np.array([*sorted(width // 2 for width in widths if width < 2 * length), length])


def _padded(rows: Rows, count: int) -> Rows:
    """The rows, followed by `count` rows without text."""
    padding = Rows(
        np.zeros_like(rows.inputs, shape=(count, rows.inputs.shape[1])),
        np.full_like(rows.targets, IGNORED, shape=(count, rows.targets.shape[1])),
        np.zeros(count, dtype=np.int64),
        np.zeros(count, dtype=np.int64),
        np.ones(count, dtype=bool),
        np.zeros(count, dtype=bool),
    )
    return Rows(*map(np.concatenate, zip(rows, padding, strict=True)))


def _refuse_too_short(symbols: int, batch: int, length: int) -> None:
    if batch * length <= symbols:
        return
    fits = []
    if symbols >= batch:
        fits.append(f"--batch {batch} --length {symbols // batch}")
    if symbols >= length:
        fits.append(f"--batch {symbols // length} --length {length}")
    fits = fits or [f"--batch 1 --length {symbols}"]
    raise InputError(
        f"The train split has {symbols:,} symbols, too few for batch {batch} x length {length} = "
        f"{batch * length:,}. The largest that fit: {', or '.join(fits)}."
    )
