"""Prepared corpora as memory-mapped symbols, and the batches of a training step.

Knows nothing of models; tokenizer.py makes the symbols.
"""

# N symbols of a split, B batch, T length

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqlm.config import TrainConfig
from seqlm.corpora import DATA
from seqlm.errors import InputError, UsageError
from seqlm.prepare import CHARACTERS, END_TYPE, MANIFEST, SCHEMA, narrowest, prepared
from seqlm.runtime import derived_seed
from seqlm.splits import SPLITS
from seqlm.storage import conforms, read_sealed, refuse_changed, refuse_pickle
from seqlm.tokenizer import FILE as TOKENIZER_FILE
from seqlm.tokenizer import LARGEST, Tokenizer, load_tokenizer

AGAIN = "Prepare the corpus again: seqlm prepare SOURCE --force"
COUNTS = {
    "chars": int | None,
    "bytes": int,
    "tokens": int,
    "documents": int | None,
    "sha256": str,
}
IGNORED = -100  # the target of a place that is not text


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, verified when it is opened."""

    path: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def label(self) -> str:
        """The corpus' name in every figure."""
        return self.manifest["label"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """{split: counts and hashes}, as in the manifest."""
        return self.manifest["splits"]

    def symbols(self, split: str) -> np.ndarray:
        """The split's N symbols, memory-mapped; UsageError for a split the corpus does not have."""
        if split not in self.splits:
            raise UsageError(
                f"{self.path} has no {split} split. Choose one of: {', '.join(self.splits)}."
            )
        return np.memmap(self.path / f"{split}.bin", dtype=self.manifest["dtype"], mode="r")

    def ends(self, split: str) -> np.ndarray | None:
        """The number of symbols up to the end of each document of the split, memory-mapped;
        None where the text is one stream."""
        if self.tokenizer.end is None:
            return None
        ends = np.memmap(self.path / f"{split}.ends", dtype=END_TYPE, mode="r")
        if (np.diff(ends, prepend=0) < 1).any() or ends[-1] != self.splits[split]["tokens"]:
            raise InputError(f"{self.path / split}.ends is damaged: it is out of order. {AGAIN}")
        return ends

    def answers(self, split: str) -> np.ndarray | None:
        """The number of symbols up to where the answer of each document of the split begins; None
        where all of the text counts."""
        return self.tokenizer.answers(self.symbols(split), self.ends(split))

    def verify(self, split: str) -> None:
        """Raises InputError unless every byte of the split is as it was written, and every symbol
        one of the vocabulary."""
        refuse_changed(self.path, self.manifest["files"], _sizes(self, split), "sha256", AGAIN)
        self.refuse_unknown(split, self.symbols(split))

    def refuse_unknown(self, split: str, symbols: np.ndarray) -> None:
        """Raises InputError for a symbol of the split that the vocabulary does not have."""
        if symbols.max() >= self.tokenizer.vocab_size:
            raise InputError(
                f"{self.path / split}.bin holds symbol {symbols.max()}, and the vocabulary has "
                f"{self.tokenizer.vocab_size}: it is damaged. {AGAIN}"
            )


def open_corpus(path: Path) -> Corpus:
    """The corpus in the folder; InputError for a file that is missing, cut or changed.

    As quick for any size: large files are looked at in places, and whole by `Corpus.verify`.
    """
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path} is not a prepared corpus. Make one: seqlm prepare SOURCE")
    manifest = read_sealed(path / MANIFEST, SCHEMA)
    files = manifest.get("files")
    refuse_changed(path, files, {TOKENIZER_FILE: LARGEST}, "spot_sha256", AGAIN)
    corpus = Corpus(path, manifest, load_tokenizer(path))
    fault = _fault(corpus)
    if fault:
        raise InputError(f"{path / MANIFEST} is damaged: {fault}. {AGAIN}")
    for split in corpus.splits:
        sizes = _sizes(corpus, split)
        refuse_changed(path, files, sizes, "spot_sha256", AGAIN)
        for name, size in sizes.items():
            if files[name]["bytes"] != size:
                raise InputError(f"{path / name} is damaged: its size is not {size:,}. {AGAIN}")
    return corpus


def _sizes(corpus: Corpus, split: str) -> dict[str, int]:
    """The files of a split and their bytes: its symbols, and where its documents end."""
    counts = corpus.splits[split]
    sizes = {f"{split}.bin": counts["tokens"] * np.dtype(corpus.manifest["dtype"]).itemsize}
    if corpus.tokenizer.end is not None:
        sizes[f"{split}.ends"] = counts["documents"] * np.dtype(END_TYPE).itemsize
    return sizes


def _fault(corpus: Corpus) -> str | None:
    """What a manifest says that cannot be; None where nothing is wrong."""
    manifest, tokenizer = corpus.manifest, corpus.tokenizer
    shape = {"label": str, "characters": str, "splits": {}, "card": {"xz_bits_per_char": float}}
    if not conforms(manifest, shape) or not manifest["label"].isprintable():
        return "it is not that of a corpus"
    if manifest["characters"] not in CHARACTERS:
        return f"its characters are not {' or '.join(CHARACTERS)}"
    if not {"train", "val"} <= corpus.splits.keys() <= set(SPLITS):
        return "its splits are not train, val and test"
    if manifest.get("dtype") != narrowest(tokenizer.vocab_size):
        return "its symbols are not those of the tokenizer"
    needed = ["bytes", "tokens"] + ([] if tokenizer.end is None else ["documents"])
    for split, counts in corpus.splits.items():
        if not conforms(counts, COUNTS) or not all(counts[name] for name in needed):
            return f"its counts of {split} cannot be"
    return None


def recorded_corpus(path: str) -> Corpus:
    """The corpus whose folder a run recorded; InputError where it is gone."""
    if not os.path.isdir(path):
        raise InputError(
            f"The run's corpus {path} is not here. Prepare it again, or name where it is with "
            "--data DIR."
        )
    return open_corpus(Path(path))


def find_corpus(name: str | None) -> Path | None:
    """The folder that --data names: a path or a name under data/; None takes the newest prepared,
    or gives None where nothing is."""
    if name is None:
        return max(prepared(), key=lambda path: (path / MANIFEST).stat().st_mtime_ns, default=None)
    for path in (Path(name), DATA / name):
        if os.path.isfile(path / MANIFEST):
            return path
    refuse_pickle(name)
    raise InputError(
        f"--data {name}: neither {name} nor {DATA / name} is a prepared corpus. "
        "Make one: seqlm prepare SOURCE"
    )


class Rows(NamedTuple):
    """Sequences that a model reads side by side: a micro-batch of a training step.

    Every row goes on with one of the streams that are read here, the S of all B that one of several
    processes reads, from that stream's state or from a fresh one.
    Rows may be shorter than T: behind their end, targets are IGNORED, as they are before an answer
    where only answers are learned.
    """

    inputs: np.ndarray  # (R, T) int64
    targets: np.ndarray  # (R, T) int64
    sizes: np.ndarray  # (R,) symbols that are text
    streams: np.ndarray  # (R,) the stream of each row, 0 .. S - 1
    fresh: np.ndarray  # (R,) bool: begins from a fresh state, not from its stream's
    kept: np.ndarray  # (R,) bool: its last state is its stream's from now on


class Batches:
    """The batch of every step, a function of (seed, step) alone.

    carry: B streams run through the text side by side; a step takes the next T symbols of each,
    and the state goes on.  An epoch begins afresh, from another place of the text, whose end its
    start follows.
    reset: B windows of T symbols from random places, each from a fresh state.
    The first input of a fresh state is the symbol `beginning`.
    streams: those of the B that are read here, in this order; None: all.
    Raises InputError for a text too short, naming the largest batch and length that fit.
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
            return self._cut(starts[self.streams], fresh=True)
        epoch, place = divmod(step, self.steps_per_epoch)
        stream = self.steps_per_epoch * self.length
        random = np.random.default_rng(derived_seed(self.seed, "epoch", epoch))
        first = random.integers(0, len(self.symbols))
        starts = first + self.streams * stream + place * self.length
        return self._cut(starts, fresh=place == 0)

    def _cut(self, starts: np.ndarray, fresh: bool) -> list[Rows]:
        places = (starts[:, None] + np.arange(self.length)) % len(self.symbols)
        targets = self.symbols[places].astype(np.int64)
        inputs = np.empty_like(targets)
        inputs[:, 0] = self.beginning if fresh else self.symbols[places[:, 0] - 1]
        inputs[:, 1:] = targets[:, :-1]
        streams = np.arange(len(starts))
        sizes, begun = np.full(len(starts), self.length), np.full(len(starts), fresh)
        rows = Rows(inputs, targets, sizes, streams, begun, streams >= 0)
        parts = [np.split(array, self.accumulate) for array in rows]
        return [Rows(*part) for part in zip(*parts, strict=True)]


class DocumentBatches:
    """The batch of every step, a function of (seed, step), over a text of documents.

    An epoch reads the documents in a random order, packed into slots of T symbols: a document
    stands in the slot that it begins in, and goes on in the next ones with T symbols in each.  B
    streams run through the slots side by side, one slot a step.  Every document, or its T symbols,
    is a row of its own, so that it begins behind the symbol `beginning` and from a fresh state.
    carry: the rest of a long document goes on from its state, but where an epoch begins in its
    middle; reset: it goes on from a fresh one.  Behind `beginning` stands nothing but a beginning.
    answers: (D,) the number of symbols up to what is to be learned of each document; None: all.
    streams: those of the B that are read here, in this order; None: all.
    Raises InputError for a text too short, naming the largest batch and length that fit.
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
        self._read: tuple[int, np.ndarray, np.ndarray] | None = None

    def at(self, step: int) -> list[Rows]:
        """The micro-batches of a step: rows of similar length together, S x T symbols in all."""
        epoch, place = divmod(step, self.steps_per_epoch)
        slots = self.streams * self.steps_per_epoch + place
        found = [self._slot(epoch, int(slot)) for slot in slots]
        streams = np.repeat(np.arange(len(slots)), [len(documents) for documents, _ in found])
        documents, offsets = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        ends, starts = self.ends[documents], self._starts(documents) + offsets
        sizes = np.minimum(ends - starts, self.length)
        longest_first = np.argsort(-sizes, kind="stable")
        parts, done = [], 0
        while done < len(sizes):
            width = self._widths[np.searchsorted(self._widths, sizes[longest_first[done]])]
            unit = max(1, self.area // (8 * width))  # rows come by so many
            part = longest_first[done : done + max(1, self.area // width // unit * unit)]
            done += len(part)
            begins = offsets[part] == 0
            inputs, targets = self._cut(starts[part], sizes[part], begins, width)
            if self.answers is not None:
                before = self.answers[documents[part]] - starts[part]
                targets[np.arange(width) < before[:, None]] = IGNORED
            kept = starts[part] + sizes[part] < ends[part]
            fresh = begins | (place == 0) | (not self.carry)
            rows = Rows(inputs, targets, sizes[part], streams[part], fresh, kept)
            parts.append(_padded(rows, -len(part) % unit))
        return parts

    def _slot(self, epoch: int, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents that a slot reads of, and from which of their symbols on."""
        order, begins = self._epoch(epoch)
        first, last = np.searchsorted(begins, [slot * self.length, (slot + 1) * self.length])
        documents, offsets = order[first:last], np.zeros(last - first, dtype=np.int64)
        if first:  # the document before may not be at its end
            offset = (slot - begins[first - 1] // self.length) * self.length
            before = order[first - 1 : first]
            if offset < self.ends[before] - self._starts(before):
                documents = np.concatenate([before, documents])
                offsets = np.concatenate([[offset], offsets])
        return documents, offsets

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the documents, and where each begins if they are read in it."""
        if self._read is None or self._read[0] != epoch:
            random = np.random.default_rng(derived_seed(self.seed, "epoch", epoch))
            order = random.permutation(len(self.ends))
            sizes = np.diff(self.ends, prepend=0)[order]
            self._read = epoch, order, np.cumsum(sizes) - sizes
        return self._read[1:]

    def _starts(self, documents: np.ndarray) -> np.ndarray:
        return np.where(documents > 0, self.ends[documents - 1], 0)

    def _cut(
        self, starts: np.ndarray, sizes: np.ndarray, begins: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets from the places `starts`, so many symbols of each."""
        places = starts[:, None] + np.arange(width)
        inside = np.arange(width) < sizes[:, None]
        text = self.symbols[np.minimum(places, len(self.symbols) - 1)].astype(np.int64)
        inputs = np.empty_like(text)
        inputs[:, 0] = np.where(begins, self.beginning, self.symbols[starts - 1])
        inputs[:, 1:] = text[:, :-1]
        return inputs, np.where(inside, text, IGNORED)


class Ahead:
    """Batches that a thread makes one step before they are wanted, for a GPU that would wait for
    them.  A batch is a function of its step, so they are the same."""

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
    """4, 6, 8, 12, 16, 24, ... and `length`: what rows are padded to, since every new shape costs
    time and memory."""
    widths = {2**power * factor for power in range(2, 32) for factor in (2, 3)}
    return np.array([*sorted(width // 2 for width in widths if width < 2 * length), length])


def _padded(rows: Rows, count: int) -> Rows:
    """The rows and so many more that hold nothing."""
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
