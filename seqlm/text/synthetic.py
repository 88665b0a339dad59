"""Texts that ask what a cell can remember: a question, a mark, and an answer that follows from it.

Every line is a document of its own, and only its answer is learned and counted.
"""

# D documents

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from seqlm.errors import UsageError, unknown

MARK = "="  # between a question and its answer
LETTERS = np.frombuffer(b"abcdefghijklmn", np.uint8)
NOISE, OPENING, CLOSING = (
    ord("."),
    np.frombuffer(b"([{<", np.uint8),
    np.frombuffer(b")]}>", np.uint8),
)
HELD_OUT = 1000  # documents of val, and of test
MOST, AT_ONCE = 1000, 1 << 22  # documents, and characters, that are made at a time
LONGEST = 1 << 20


@dataclass(frozen=True)
class Diagnostic:
    """A text by recipe: `make` gives D questions and their answers, (D, Q) and (D, A) bytes."""

    name: str
    about: str
    defaults: Mapping[str, int]
    make: Callable[..., tuple[np.ndarray, np.ndarray]]

    def options(self, text: str) -> dict[str, int]:
        """'length=512,symbols=8' over the defaults; UsageError for what is none of them."""
        found = dict(self.defaults)
        for part in filter(None, text.split(",")):
            key, _, value = part.partition("=")
            if key not in found:
                raise unknown(f"option of {self.name}", key, found)
            if not re.fullmatch("[0-9]{1,9}", value) or not int(value):
                raise UsageError(f"{self.name}:{part}: give a whole number from 1 on, {key}=N.")
            found[key] = int(value)
        if sum(found.values()) - found["documents"] > LONGEST:
            raise UsageError(f"{self.name}:{text}: a line has at most {LONGEST:,} characters.")
        return found

    def texts(self, options: Mapping[str, int], split: str) -> Iterator[bytes]:
        """The lines of a split, a function of the options alone; of fewer documents the first."""
        # here, as it brings torch, which preparing a text does without
        from seqlm.seeds import derived_seed

        own = {key: value for key, value in options.items() if key != "documents"}
        random = np.random.default_rng(derived_seed(self.name, *sorted(own.items()), split))
        left = options["documents"] if split == "train" else HELD_OUT
        count = min(MOST, max(1, AT_ONCE // sum(own.values())))
        mark, end = (np.full((count, 1), ord(c), np.uint8) for c in (MARK, "\n"))
        while left:
            question, answer = self.make(random, count, **own)
            lines = np.concatenate([question, mark, answer, end], axis=1)[:left]
            yield lines.tobytes()
            left -= len(lines)


def _selective_copying(
    random: np.random.Generator, count: int, length: int, symbols: int
) -> tuple[np.ndarray, np.ndarray]:
    """Letters at random places of the noise, to be copied in their order.

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
    """A letter, to be copied from behind `distance` others."""
    question = random.choice(LETTERS, (count, 1 + distance))
    return question, question[:, :1]


def _brackets(
    random: np.random.Generator, count: int, depth: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Brackets of four kinds, never more than `depth` of them open, and so many at the end, which
    are to be closed from the last to the first."""
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
        "letters strewn into noise, to be copied in order",
        {"length": 128, "symbols": 16, "documents": 50_000},
        _selective_copying,
    ),
    Diagnostic(
        "copy-first",
        "the first of many letters, to be copied",
        {"distance": 128, "documents": 50_000},
        _copy_first,
    ),
    Diagnostic(
        "brackets",
        "open brackets, to be closed in order",
        {"depth": 8, "length": 64, "documents": 50_000},
        _brackets,
    ),
)
DIAGNOSTICS = {diagnostic.name: diagnostic for diagnostic in _DIAGNOSTICS}
