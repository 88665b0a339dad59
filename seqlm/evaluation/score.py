"""How surprising a text is to a model, for each character, word, line or document."""

# N symbols, V vocabulary, B batch, T time

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seqlm.errors import UsageError, unknown
from seqlm.evaluation import dynamic
from seqlm.evaluation.dynamic import Learning
from seqlm.evaluation.evaluate import NATS_PER_BIT, Score, finite
from seqlm.evaluation.passage import Passage
from seqlm.extras import extra
from seqlm.model import LanguageModel
from seqlm.progress import OnProgress, silent
from seqlm.text.tokenizer import Tokenizer

UNITS = ("char", "word", "line", "document")
SPACES = ("after", "before")
WORDS = r"\S+"
Chunk = tuple[np.ndarray, Tensor]
"""Offsets of N symbols in a passage, and what `details` keeps of each: (K, N)."""
LONGEST = 1000  # characters of the text of a line or a document that a row holds


class Row(NamedTuple):
    """A character, word, line or document of a text.

    A model of bytes or pieces may give several symbols for a character, or several characters for a
    symbol; such a row is the smallest part of the text that whole symbols make up.
    """

    document: int  # from 1
    line: int  # from 1, in the whole text
    offset: int  # characters of the text before it
    text: str  # at most LONGEST characters; a word without its space; "" for a document's end
    chars: int  # characters that count, with the space that belongs to a word
    surprisal_bits: float  # the sum of -log2 p over its symbols
    entropy_bits: float  # the sum of the entropies of the predictions of its symbols
    rank: int | None  # 1 for the likeliest symbol; None if it is not one symbol
    alternatives: tuple[tuple[str, float], ...]  # the likeliest symbols with their probabilities

    @property
    def probability(self) -> float:
        return 2.0**-self.surprisal_bits


class Totals(NamedTuple):
    """The sums over a whole text."""

    score: Score
    entropy_bits: float  # the mean entropy of a prediction: what the model expects to need


@dataclass(frozen=True)
class Scores:
    """The rows of a text as columns of equal length; their meaning is that of the fields of Row."""

    document: np.ndarray
    line: np.ndarray
    offset: np.ndarray
    text: np.ndarray
    chars: np.ndarray
    surprisal_bits: np.ndarray
    entropy_bits: np.ndarray
    rank: np.ndarray  # float64; NaN if a row is not one symbol
    probability: np.ndarray
    alternatives: list[tuple[tuple[str, float], ...]]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Scores":
        whole = ("document", "line", "offset", "chars")
        exact = ("surprisal_bits", "entropy_bits", "rank", "probability")
        return cls(
            text=np.array([row.text for row in rows], dtype=object),
            alternatives=[row.alternatives for row in rows],
            **{name: np.array([getattr(r, name) for r in rows], np.int64) for name in whole},
            **{name: np.array([getattr(r, name) for r in rows], np.float64) for name in exact},
        )

    def __len__(self) -> int:
        return len(self.text)

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with these columns; SeqlmError if pandas is not installed."""
        return extra("pandas", "pandas").DataFrame(vars(self))


def details(top: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A Judge that keeps -ln p, the entropy in nats and the rank of each target.

    It also keeps the `top` likeliest symbols, and then their log probabilities: K = 3 + 2 top.
    """

    def judge(logits: Tensor, targets: Tensor) -> Tensor:
        log_p = F.log_softmax(logits.float(), dim=-1)
        own = log_p.gather(-1, targets.unsqueeze(-1))
        entropy = -(log_p.exp() * log_p).sum(-1)
        # equal ones are ranked by their symbols, so that one symbol is first
        before = torch.arange(log_p.shape[-1], device=log_p.device) < targets.unsqueeze(-1)
        rank = 1 + ((log_p > own) | ((log_p == own) & before)).sum(-1)
        kept = torch.stack([-own.squeeze(-1), entropy, rank.to(log_p.dtype)])
        if not top:
            return kept
        likeliest = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
        # not every device has float64; float32 is exact only up to 2^24
        parts = likeliest.indices.movedim(-1, 0), likeliest.values.movedim(-1, 0)
        return torch.cat([part.cpu().double() for part in (kept, *parts)])

    return judge


def totals(found: Iterable[Chunk], passage: Passage) -> Totals:
    """The sums over the `chunks` of a passage; SeqlmError if they are not finite."""
    nats = entropy = hits = 0.0
    for _, numbers in found:
        nats += float(numbers[0].sum())
        entropy += float(numbers[1].sum())
        hits += int((numbers[2] == 1).sum())
    score = finite(Score(nats, hits, passage.tokens, passage.chars, passage.bytes))
    return Totals(score, entropy / NATS_PER_BIT / passage.tokens)


def chunks(
    model: LanguageModel,
    passage: Passage,
    top: int = 0,
    learning: Learning | None = None,
    tick: OnProgress = silent,
) -> Iterator[Chunk]:
    """What `rows` needs of every symbol that counts, by protocol stream.

    top: the number of likeliest symbols to keep for each.  learning: read by protocol dynamic.
    """
    if top < 0:
        raise UsageError(f"--top {top}: it must be at least 0.")
    return dynamic.read(model, passage, details(top), learning, tick)


def rows(
    found: Iterable[Chunk],
    tokenizer: Tokenizer,
    passage: Passage,
    per: str = "char",
    *,
    words: str = WORDS,
    space: str = "after",
) -> Iterator[Row]:
    """The rows of a passage in text order.

    found: the `chunks` of the passage.
    per: one of UNITS.  words: the regular expression of a word, which lies within a line.
    space: "after" counts the text between two words as part of the word before it, so it stands
    after its word; "before" counts it as part of the next word.
    The bits of the rows of any unit have the same sum.
    With "after", the probability of a word includes that the word ends, so that the
    probabilities of all words have the sum 1 (Oh and Schuler, arXiv 2406.10851).
    """
    if per not in UNITS:
        raise unknown("unit", per, UNITS)
    if space not in SPACES:
        raise unknown("value of --space", space, SPACES)
    characters = _characters(found, tokenizer, passage)
    if per == "char":
        return characters
    if per == "word":
        return _words(characters, words, space)
    if per == "line":
        return (_merged(group) for _, group in groupby(characters, lambda row: row[:2]))
    return (_merged(group) for _, group in groupby(characters, lambda row: row[0]))


class _Symbol(NamedTuple):
    """A symbol that counts, and what a Row keeps of it."""

    document: int
    place: int  # in the passage
    symbol: int
    bits: float
    entropy: float
    rank: int
    alternatives: tuple[tuple[str, float], ...]


def _symbols(found: Iterable[Chunk], shown: Sequence[str], passage: Passage) -> Iterator[_Symbol]:
    ends = np.array([len(passage.symbols)]) if passage.ends is None else passage.ends
    for places, numbers in found:
        yield from map(
            _Symbol,
            (1 + np.searchsorted(ends, places, side="right")).tolist(),
            places.tolist(),
            passage.symbols[places].tolist(),
            *(numbers[:2] / NATS_PER_BIT).tolist(),
            numbers[2].long().tolist(),
            _alternatives(numbers[3:], shown) if len(numbers) > 3 else [()] * len(places),
        )


def _characters(found: Iterable[Chunk], tokenizer: Tokenizer, passage: Passage) -> Iterator[Row]:
    texts = [*tokenizer.texts, b""]  # the last one: a symbol that ends a document
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    line, offset = 1, 0
    first: list[_Symbol] = []  # the first bytes of a character

    def row(text: str, parts: list[_Symbol]) -> Row:
        bits, entropy = sum(part.bits for part in parts), sum(part.entropy for part in parts)
        whole = (parts[0].rank, parts[0].alternatives) if len(parts) == 1 else (None, ())
        return Row(parts[0].document, line, offset, text, len(text), bits, entropy, *whole)

    for one in _symbols(found, tokenizer.shown, passage):
        own = texts[one.symbol]
        if first and own in (b"\n", b""):  # the end of a line or a document cuts a character
            text = decoder.decode(b"", final=True)
            yield row(text, first)
            first, offset = [], offset + len(text)
        if passage.answers is not None:  # the text between answers counts here: a symbol is a
            line, offset = one.document, one.place  # character, and a document is a line
        text = decoder.decode(own)
        if not text and own:
            first.append(one)
            continue
        yield row(text, [*first, one])
        first, line, offset = [], line + (text == "\n"), offset + len(text)
    if first:
        yield row(decoder.decode(b"", final=True), first)


def _alternatives(numbers: Tensor, shown: Sequence[str]) -> list[tuple[tuple[str, float], ...]]:
    """(2 K, N) symbols and their log probabilities -> for each of N ((text, probability), ...)."""
    symbols, log_p = numbers.chunk(2)
    return [
        tuple((shown[int(symbol)], p) for symbol, p in zip(ids, probabilities, strict=True))
        for ids, probabilities in zip(symbols.T.tolist(), log_p.exp().T.tolist(), strict=True)
    ]


def _merged(parts: Iterable[Row], text: str | None = None) -> Row:
    """One row for several that follow each other, with their text up to LONGEST characters."""
    document = line = offset = chars = 0
    shown, bits, entropy = "", 0.0, 0.0
    for number, part in enumerate(parts):
        if not number:
            document, line, offset = part[:3]
        if len(shown) < LONGEST:
            shown += part.text
        chars += part.chars
        bits += part.surprisal_bits
        entropy += part.entropy_bits
    shown = shown[:LONGEST] if text is None else text
    return Row(document, line, offset, shown, chars, bits, entropy, None, ())


def _words(characters: Iterable[Row], words: str, space: str) -> Iterator[Row]:
    """The words of each document, with all text between them."""
    try:
        pattern = re.compile(words)
    except re.error as error:
        raise UsageError(f"--words {words!r} is not a regular expression: {error}.") from None
    for _, document in groupby(characters, lambda row: row.document):
        last: tuple[list[Row], str] | None = None  # a word that the rest may still belong to
        parts: list[Row] = []
        found: re.Match[str] | None = None  # the word in `parts`
        for row, match in _matched(document, pattern):
            new = match is not None and match is not found
            if found is not None and (new or (match is None and space == "before")):
                if last:
                    yield _merged(*last)
                last, parts, found = (parts, found[0]), [], None
            found = match or found
            parts.append(row)
        if last and found is None:
            last, parts = (last[0] + parts, last[1]), []
        if last:
            yield _merged(*last)
        if parts:
            yield _merged(parts, found[0] if found else "")


def _matched(
    characters: Iterable[Row], pattern: re.Pattern[str]
) -> Iterator[tuple[Row, "re.Match[str] | None"]]:
    """Each row with the word that its last character is in, if any.  Words lie within a line."""
    for _, group in groupby(characters, lambda row: row.line):
        line = list(group)
        places = np.cumsum([len(row.text) for row in line]) - 1  # of the last characters
        matches = iter(m for m in pattern.finditer("".join(row.text for row in line)) if m[0])
        match = next(matches, None)
        for row, place in zip(line, places.tolist(), strict=True):
            while match and match.end() <= place:
                match = next(matches, None)
            inside = match is not None and match.start() <= place and bool(row.text)
            yield row, match if inside else None
