"""A regex over the symbols of a model: which of them lead to a match, in how many characters."""

# A states of the automaton over bytes, S states of the pattern, V vocabulary

import heapq
import io
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from seqlm.errors import InputError, UsageError
from seqlm.extras import extra

SECONDS = 20.0  # most time for the construction of an automaton
LARGEST_TABLE = 1 << 24  # most entries of a table: 64 MiB
FAR = 2_000_000_000  # characters to a match where there is none
SAME, DEAD = 256, 257  # columns for bytes that are none: stay in the state; leave the automaton
REMEDY = "Use smaller counts of repetition, or [a-z] in place of \\w."


class Pattern:
    """A regex that a text has to match as a whole, as an automaton over symbols.

    States from which this vocabulary cannot reach a match are never entered, so a text that
    follows `Match.allowed` always ends in a match.
    """

    def __init__(self, regex: str, texts: Sequence[bytes], end: int | None, banned: np.ndarray):
        """texts: of each symbol that stands for text.  end: the symbol of a document's end.

        banned: which symbols may not occur, (V,) bool.
        Raises UsageError for what is no regex, or is too large; InputError if no text of this
        vocabulary matches; SeqlmError if the library outlines-core is not installed.
        """
        extra("outlines_core", "regex")
        table = _automaton(_inner(regex))
        usable = [bool(text) and symbol != end for symbol, text in enumerate(texts)]
        usable = np.array(usable + [False] * (len(banned) - len(texts))) & ~banned
        self.next, accepting = _lifted(table, _padded(texts, usable), regex)
        # a character begins with each byte that does not continue one
        begun = [sum(byte & 0xC0 != 0x80 for byte in text) for text in texts]
        self.chars = np.array(begun + [0] * (len(banned) - len(texts)), dtype=np.int32)
        needed = _needed(self.next, self.chars, accepting)
        if needed[0] == FAR:
            raise InputError(
                f"--regex {regex}: no text of the symbols that are allowed matches. Change the "
                "regex, or train on a text with its characters."
            )
        self.shortest = int(needed[0])  # characters of the shortest match
        after = needed[self.next]
        self.cost = np.where((self.next < 0) | (after == FAR), FAR, self.chars + after)
        if end is not None:
            self.cost[accepting, end] = 0


class Match:
    """How far a text has come in a pattern, and how many characters are left."""

    def __init__(self, pattern: Pattern, chars: int):
        self.pattern, self.state, self.left = pattern, 0, min(chars, FAR - 1)

    def allowed(self) -> np.ndarray:
        """The symbols with which a match fits into the characters that are left: (V,) bool."""
        return self.pattern.cost[self.state] <= self.left

    def take(self, symbol: int) -> None:
        self.left -= int(self.pattern.chars[symbol])
        self.state = int(self.pattern.next[self.state, symbol])


def _inner(regex: str) -> str:
    """The regex without ^ and $ at its ends: they change nothing where the whole text matches."""
    inner = regex.removeprefix("^")
    escapes = len(inner) - len(inner.rstrip("$").rstrip("\\")) - inner.endswith("$")
    return inner[:-1] if inner.endswith("$") and escapes % 2 == 0 else inner


@lru_cache(maxsize=8)
def _automaton(regex: str) -> np.ndarray:
    """The table of automaton.py: (A, 257)."""
    program = [sys.executable, "-P", str(Path(__file__).with_name("automaton.py"))]
    try:
        ran = subprocess.run(
            program, input=regex.encode("utf-8"), capture_output=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"--regex {regex}: its automaton was not complete after {SECONDS:.0f} s. {REMEDY}"
        ) from None
    except UnicodeEncodeError:
        raise UsageError(f"--regex {regex}: it is not UTF-8. Correct it.") from None
    if ran.returncode:
        reason = _mistake(regex) or " ".join(ran.stderr.decode("utf-8", "replace").split())
        raise UsageError(
            f"--regex {regex}: {reason}. It takes the syntax of Rust's regex, without look-around "
            "and references."
        )
    return np.asarray(np.load(io.BytesIO(ran.stdout)))


def _mistake(regex: str) -> str:
    """What is wrong with the regex, and where; "" where Python's `re` does not see it."""
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(regex)
    except (re.error, OverflowError, RecursionError) as error:
        # these two may be right in Rust's syntax
        return "" if str(error).startswith(("bad escape", "unknown extension")) else str(error)
    return ""


def _padded(texts: Sequence[bytes], usable: np.ndarray) -> np.ndarray:
    """The bytes of each symbol as columns of a table: (longest text, V)."""
    columns = np.full((max(map(len, texts)), len(usable)), SAME)
    for symbol, text in enumerate(texts):
        columns[: len(text), symbol] = list(text)
    columns[0, ~usable] = DEAD
    return columns


def _lifted(table: np.ndarray, columns: np.ndarray, regex: str) -> tuple[np.ndarray, np.ndarray]:
    """The automaton over symbols, of the states that symbols reach.

    Returns (S, V) the state after each symbol, -1: none; and which states accept: (S,) bool.
    """
    dead = len(table)
    states = np.arange(dead + 1)
    following = np.vstack([table[:, :SAME], np.full((1, SAME), -1)])
    following[following < 0] = dead
    following = np.column_stack([following, states, np.full(dead + 1, dead)])
    numbers = np.full(dead + 1, -1)
    reached = new = np.array([0])
    numbers[0] = 0
    found: list[np.ndarray] = []
    symbols = columns.shape[1]
    while len(new):
        if len(reached) * symbols > LARGEST_TABLE:
            raise UsageError(
                f"--regex {regex}: its automaton has more than {LARGEST_TABLE // symbols:,} "
                f"states, the most for {symbols:,} symbols. {REMEDY}"
            )
        ends = np.repeat(new[:, None], symbols, axis=1)
        for column in columns:
            ends = following[ends, column]
        found.append(ends)
        new = np.unique(ends[(numbers[ends] < 0) & (ends != dead)])
        numbers[new] = len(reached) + np.arange(len(new))
        reached = np.concatenate([reached, new])
    return numbers[np.concatenate(found)].astype(np.int32), table[reached, SAME] == 1


def _needed(following: np.ndarray, chars: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """The characters of the shortest way from each state to a match: (S,); FAR: there is none.

    Dijkstra's algorithm, backwards from the accepting states.
    """
    size, costs = len(following), int(chars.max()) + 1
    source, symbol = np.nonzero(following >= 0)
    edges = (following[source, symbol].astype(np.int64) * size + source) * costs + chars[symbol]
    edges = np.unique(edges)  # sorted by the state that an edge leads to
    begins = np.searchsorted(edges, np.arange(size + 1) * size * costs)
    needed = np.full(size, FAR, dtype=np.int64)
    needed[accepting] = 0
    heap = [(0, int(state)) for state in np.flatnonzero(accepting)]
    while heap:
        far, state = heapq.heappop(heap)
        if far > needed[state]:
            continue
        for edge in edges[begins[state] : begins[state + 1]].tolist():
            before, cost = edge // costs % size, edge % costs
            if far + cost < needed[before]:
                needed[before] = far + cost
                heapq.heappush(heap, (far + cost, before))
    return needed
