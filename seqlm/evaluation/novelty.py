"""How new a text is: which parts of it also occur in the training text, character by character."""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from seqlm.progress import OnProgress, silent
from seqlm.text.corpus import Corpus

SIZES = (8, 16, 32)  # characters of an n-gram
MOST = 100_000  # characters of a text that are searched for: they bound the memory
AT_ONCE = 1 << 16  # symbols of the corpus that are decoded together


class Novelty(NamedTuple):
    """How much of a text also occurs in the training text."""

    chars: int  # characters that were searched for
    longest: str  # the longest part that also occurs in the training text; the first of several
    new: dict[int, float | None]  # {n: share of n-grams that do not}; None: shorter text

    def to_dict(self) -> dict[str, Any]:
        return {
            "chars": self.chars,
            "longest_chars": len(self.longest),
            "longest": self.longest,
            "new": {str(size): share for size, share in self.new.items()},
        }


def of_texts(texts: Sequence[str], corpus: Corpus, tick: OnProgress = silent) -> dict[str, Novelty]:
    """The novelty of texts, taken together, and that of the start of the val split.

    A longer text has a longer part in common with the training text, so the start of the val split
    has as many characters as the texts.  Lines that are documents are joined to one text, as in the
    corpus.
    """
    if corpus.tokenizer.documents == "lines":
        texts = ["".join(text.removesuffix("\n") + "\n" for text in texts)]
    room, first = MOST, []
    for text in texts:
        first.append(text[:room])
        room -= len(first[-1])
    chars, held_out = MOST - room, ""
    for piece in _read(corpus, "val"):
        held_out += piece[: chars - len(held_out)]
        if len(held_out) == chars:
            break
    *found, last = matches([*first, held_out], _read(corpus, "train", tick))
    return {"text": _novelty(first, found), "held_out": _novelty([held_out], [last])}


def matches(texts: Sequence[str], source: Iterable[str]) -> list[list[int]]:
    """For each character of each text: the length of the longest part that ends there and is also
    in the source.

    It takes time proportional to the source and the texts, and memory proportional to the texts.
    """
    symbols: list[str | None] = []
    for text in texts:
        symbols += [*text, None]  # None is in no source, so that no match reaches over it
    automaton = _Automaton(symbols)
    for piece in source:
        automaton.read(piece)
    found = automaton.matches()
    ends = np.cumsum([len(text) + 1 for text in texts]).tolist()
    return [found[end - len(text) - 1 : end - 1] for text, end in zip(texts, ends, strict=True)]


class _Automaton:
    """The suffix automaton of a sequence (Blumer et al. 1985), which another text is run through.

    A state stands for the parts of the sequence that end at the same places.  `sizes` has the
    length of the longest one, and `links` the state of the longest shorter one that ends at more
    places.
    """

    def __init__(self, symbols: Iterable[str | None]):
        self.steps: list[dict[str | None, int]] = [{}]
        self.links, self.sizes = [-1], [0]
        self.prefixes: list[int] = []  # the state of each prefix
        for symbol in symbols:
            self._append(symbol)
        self.matched = [0] * len(self.sizes)  # length of the longest match that ended in each state
        self.at = self.length = 0

    def _append(self, symbol: str | None) -> None:
        steps, links, sizes = self.steps, self.links, self.sizes
        last = self.prefixes[-1] if self.prefixes else 0
        new = self._state({}, 0, sizes[last] + 1)
        while last >= 0 and symbol not in steps[last]:
            steps[last][symbol] = new
            last = links[last]
        if last >= 0:
            after = steps[last][symbol]
            if sizes[after] > sizes[last] + 1:  # it stands for longer parts too: split it
                half = self._state(dict(steps[after]), links[after], sizes[last] + 1)
                links[after] = half
                while last >= 0 and steps[last].get(symbol) == after:
                    steps[last][symbol] = half
                    last = links[last]
                after = half
            links[new] = after
        self.prefixes.append(new)

    def _state(self, steps: dict[str | None, int], link: int, size: int) -> int:
        self.steps.append(steps)
        self.links.append(link)
        self.sizes.append(size)
        return len(self.sizes) - 1

    def read(self, text: str) -> None:
        """Read more of the other text, and note how long the match is after each character."""
        steps, links, sizes, matched = self.steps, self.links, self.sizes, self.matched
        at, length = self.at, self.length
        for character in text:
            while at and character not in steps[at]:
                at = links[at]
                length = sizes[at]
            if character in steps[at]:
                at = steps[at][character]
                length += 1
                if length > matched[at]:
                    matched[at] = length
        self.at, self.length = at, length

    def matches(self) -> list[int]:
        """For each place of the sequence: the length of the longest match that ends there."""
        best, order = self.matched.copy(), np.argsort(self.sizes, kind="stable").tolist()
        for state in reversed(order[1:]):
            if best[state]:  # the shorter parts that end there were matched as a whole
                best[self.links[state]] = self.sizes[self.links[state]]
        for state in order[1:]:
            best[state] = best[state] or best[self.links[state]]
        return [best[state] for state in self.prefixes]


def _novelty(texts: Sequence[str], found: Sequence[list[int]]) -> Novelty:
    """found: as `matches` returns them."""
    longest = ""
    for text, lengths in zip(texts, found, strict=True):
        most = max(lengths, default=0)
        if most > len(longest):
            end = lengths.index(most) + 1
            longest = text[end - most : end]
    new: dict[int, float | None] = {}
    for size in SIZES:
        known = [length >= size for lengths in found for length in lengths[size - 1 :]]
        new[size] = 1 - sum(known) / len(known) if known else None
    return Novelty(sum(map(len, texts)), longest, new)


def _read(corpus: Corpus, split: str, tick: OnProgress = silent) -> Iterator[str]:
    """The text of a split, piece by piece."""
    symbols = corpus.symbols(split)
    corpus.verify(split)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for start in range(0, len(symbols), AT_ONCE):
        corpus.refuse_cut(split)
        part = np.asarray(symbols[start : start + AT_ONCE])
        yield decoder.decode(corpus.tokenizer.decode_bytes(part))
        tick(min(1.0, (start + AT_ONCE) / len(symbols)), "of the training text")
    yield decoder.decode(b"", final=True)
