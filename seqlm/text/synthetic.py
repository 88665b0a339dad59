"""Synthetic texts that test what a cell can remember: a question, a mark, and its answer.

Every line is a document.  Only the answers are learned and counted.
"""

# D documents

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from seqlm.errors import UsageError, unknown
from seqlm.seeds import derived_seed

MARK = "="  # between a question and its answer
LETTERS = np.frombuffer(b"abcdefghijklmn", np.uint8)
NOISE, OPENING, CLOSING = (
    ord("."),
    np.frombuffer(b"([{<", np.uint8),
    np.frombuffer(b")]}>", np.uint8),
)
HELD_OUT = 1000  # documents in val, and as many in test
CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 1000, 1 << 22  # upper limits of what is made at once
LONGEST_LINE = 1 << 20  # characters


@dataclass(frozen=True)
class Diagnostic:
    """A recipe for a text: `make` returns D questions (D, Q) and their answers (D, A), as bytes."""

    name: str
    about: str
    defaults: Mapping[str, int]
    make: Callable[..., tuple[np.ndarray, np.ndarray]]

    def options(self, text: str) -> dict[str, int]:
        """The defaults, changed by text such as 'length=512,symbols=8'.

        Raises UsageError for an unknown option or a value that is not a whole number above 0.
        """
        options = dict(self.defaults)
        for part in filter(None, text.split(",")):
            key, _, value = part.partition("=")
            if key not in options:
                raise unknown(f"option of {self.name}", key, options)
            if not re.fullmatch("[0-9]{1,9}", value) or not int(value):
                raise UsageError(f"{self.name}:{part}: give a whole number from 1 on, {key}=N.")
            options[key] = int(value)
        if sum(options.values()) - options["documents"] > LONGEST_LINE:
            raise UsageError(f"{self.name}:{text}: a line has at most {LONGEST_LINE:,} characters.")
        return options

    def texts(self, options: Mapping[str, int], split: str) -> Iterator[bytes]:
        """The lines of a split, a function of the options alone.

        A smaller number of documents gives the first lines of a larger one.
        """
        sizes = {key: value for key, value in options.items() if key != "documents"}
        random = np.random.default_rng(derived_seed(self.name, *sorted(sizes.items()), split))
        left = options["documents"] if split == "train" else HELD_OUT
        count = min(CHUNK_DOCUMENTS, max(1, CHUNK_CHARACTERS // sum(sizes.values())))
        mark, end = (np.full((count, 1), ord(c), np.uint8) for c in (MARK, "\n"))
        while left:
            question, answer = self.make(random, count, **sizes)
            lines = np.concatenate([question, mark, answer, end], axis=1)[:left]
            yield lines.tobytes()
            left -= len(lines)


def _selective_copying(
    random: np.random.Generator, count: int, length: int, symbols: int
) -> tuple[np.ndarray, np.ndarray]:
    """Letters at random places in noise, to be copied in their order.

    Source: Gu and Dao, Mamba, arXiv 2312.00752, section 4.1.1.
    """
    if symbols > length:
        raise UsageError(f"selective-copying: {symbols} symbols do not fit into length {length}.")
    places = np.sort(random.permuted(np.tile(np.arange(length), (count, 1)), axis=1)[:, :symbols])
    answer = random.choice(LETTERS, (count, symbols))
    question = np.full((count, length), NOISE, np.uint8)
    np.put_along_axis(question, places, answer, axis=1)
    return question, answer


def _copy_first(
    random: np.random.Generator, count: int, distance: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first letter is to be copied after `distance` other letters."""
    question = random.choice(LETTERS, (count, 1 + distance))
    return question, question[:, :1]


def _brackets(
    random: np.random.Generator, count: int, depth: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Brackets of four kinds, at most `depth` open at a time and exactly `depth` open at the end.

    The answer closes the open brackets, the last one first.
    """
    if length < depth or (length - depth) % 2:
        raise UsageError(
            f"brackets: of {length} brackets {depth} cannot stay open. Give a length that is the "
            "depth and an even number more."
        )
    question, rows = np.empty((count, length), np.uint8), np.arange(count)
    stack, height = np.zeros((count, depth + 1), np.int64), np.zeros(count, np.int64)
    for place in range(length):
        opens = random.random(count) < 0.5
        opens = ((height == 0) | opens | (depth - height == length - place)) & (height < depth)
        top = np.where(opens, height, height - 1)
        stack[rows, top] = np.where(
            opens, random.integers(0, len(OPENING), count), stack[rows, top]
        )
        question[:, place] = np.where(opens, OPENING[stack[rows, top]], CLOSING[stack[rows, top]])
        height += np.where(opens, 1, -1)
    return question, CLOSING[stack[:, depth - 1 :: -1]]


_DIAGNOSTICS = (
    Diagnostic(
        "selective-copying",
        "letters at random places in noise, to be copied in order",
        {"length": 128, "symbols": 16, "documents": 50_000},
        _selective_copying,
    ),
    Diagnostic(
        "copy-first",
        "the first of many letters, to be copied at the end",
        {"distance": 128, "documents": 50_000},
        _copy_first,
    ),
    Diagnostic(
        "brackets",
        "open brackets, to be closed in the right order",
        {"depth": 8, "length": 64, "documents": 50_000},
        _brackets,
    ),
)
DIAGNOSTICS = {diagnostic.name: diagnostic for diagnostic in _DIAGNOSTICS}
