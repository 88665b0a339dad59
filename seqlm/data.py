"""Prepared corpora as memory-mapped symbols, and the batches of a training step.

Knows nothing of models; tokenizer.py makes the symbols.
"""

# N symbols of a split, B batch, T length

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqlm.errors import InputError, UsageError
from seqlm.prepare import DATA, MANIFEST, SCHEMA
from seqlm.runtime import derived_seed
from seqlm.storage import read_sealed, sha256
from seqlm.tokenizer import FILE as TOKENIZER_FILE
from seqlm.tokenizer import Tokenizer, load_tokenizer


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


def open_corpus(path: Path) -> Corpus:
    """The corpus in the folder; InputError for a file that is missing, cut or changed."""
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path} is not a prepared corpus. Make one: seqlm prepare SOURCE")
    manifest = read_sealed(path / MANIFEST, SCHEMA)
    again = "Prepare the corpus again: seqlm prepare SOURCE --force"
    hashes = {f"{split}.bin": counts["file_sha256"] for split, counts in manifest["splits"].items()}
    for name, expected in {TOKENIZER_FILE: manifest["tokenizer_sha256"], **hashes}.items():
        if not (path / name).is_file():
            raise InputError(f"{path / name} is missing. {again}")
        if sha256(path / name) != expected:
            raise InputError(f"{path / name} was cut or changed after it was written. {again}")
    return Corpus(path, manifest, load_tokenizer(path))


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
        prepared = DATA.glob(f"[!.]*/{MANIFEST}")
        newest = max(prepared, key=lambda path: path.stat().st_mtime_ns, default=None)
        return newest and newest.parent
    for path in (Path(name), DATA / name):
        if os.path.isfile(path / MANIFEST):
            return path
    raise InputError(
        f"--data {name}: neither {name} nor {DATA / name} is a prepared corpus. "
        "Make one: seqlm prepare SOURCE"
    )


class Batch(NamedTuple):
    inputs: np.ndarray  # (B, T) int64
    targets: np.ndarray  # (B, T) int64, the input's next symbols
    fresh: bool  # begins from a fresh state; else where the step before ended


class Batches:
    """The batch of every step, a function of (seed, step) alone.

    carry: B streams run through the text side by side; a step takes the next T symbols of each,
    and the state goes on.  An epoch begins afresh, from another place of the text, whose end its
    start follows.
    reset: B windows of T symbols from random places, each from a fresh state.
    The first input of a fresh state is the symbol `beginning`.
    Raises InputError for a text too short, naming the largest batch and length that fit.
    """

    def __init__(
        self, symbols: np.ndarray, batch: int, length: int, state: str, seed: int, beginning: int
    ):
        if batch * length > len(symbols):
            raise InputError(_too_short(len(symbols), batch, length))
        self.symbols, self.batch, self.length = symbols, batch, length
        self.carry, self.seed, self.beginning = state == "carry", seed, beginning

    @cached_property
    def steps_per_epoch(self) -> int:
        return len(self.symbols) // (self.batch * self.length)

    def at(self, step: int) -> Batch:
        if not self.carry:
            random = np.random.default_rng(derived_seed(self.seed, "windows", step))
            starts = random.integers(0, len(self.symbols) - self.length + 1, self.batch)
            return self._cut(starts, fresh=True)
        epoch, place = divmod(step, self.steps_per_epoch)
        stream = self.steps_per_epoch * self.length
        random = np.random.default_rng(derived_seed(self.seed, "epoch", epoch))
        first = random.integers(0, len(self.symbols))
        starts = first + np.arange(self.batch) * stream + place * self.length
        return self._cut(starts, fresh=place == 0)

    def _cut(self, starts: np.ndarray, fresh: bool) -> Batch:
        places = (starts[:, None] + np.arange(self.length)) % len(self.symbols)
        targets = self.symbols[places].astype(np.int64)
        before = self.beginning if fresh else self.symbols[places[:, 0] - 1]
        inputs = np.empty_like(targets)
        inputs[:, 0], inputs[:, 1:] = before, targets[:, :-1]
        return Batch(inputs, targets, fresh)


def _too_short(symbols: int, batch: int, length: int) -> str:
    fits = []
    if symbols >= batch:
        fits.append(f"--batch {batch} --length {symbols // batch}")
    if symbols >= length:
        fits.append(f"--batch {symbols // length} --length {length}")
    fits = fits or [f"--batch 1 --length {symbols}"]
    return (
        f"The train split has {symbols:,} symbols, too few for batch {batch} x length {length} = "
        f"{batch * length:,}. The largest that fit: {', or '.join(fits)}."
    )
