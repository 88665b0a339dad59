"""A text to evaluate: its symbols, and the counts from which bits per character are computed."""

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np

from seqlm.errors import InputError
from seqlm.text.corpus import CHARACTERS, Corpus
from seqlm.text.staging import Lines, code_points, is_text, pieces
from seqlm.text.tokenizer import Tokenizer, encode_known


class Passage(NamedTuple):
    """A text in a model's symbols.  N symbols, D documents."""

    symbols: np.ndarray  # (N,)
    chars: int | None  # code points, or bytes; None if the bytes are not text
    bytes: int
    sha256: str  # of the text before unknown characters were left out
    unknown: int = 0  # characters skipped, since the vocabulary lacks them
    ends: np.ndarray | None = None  # (D,) offset of each document's end; None: one stream
    answers: np.ndarray | None = None  # (D,) offset of each answer; None: the whole text counts
    refuse_cut: Callable[[], None] = lambda: None  # raises InputError

    @property
    def tokens(self) -> int:
        """The number of symbols that count."""
        if self.answers is None:
            return len(self.symbols)
        assert self.chars is not None, "answers are text"
        return self.chars

    def counts(self, places: np.ndarray) -> np.ndarray:
        """Whether the symbols at these offsets count, (n,) bool."""
        if self.answers is None or self.ends is None:
            return np.ones(len(places), dtype=bool)
        document = np.searchsorted(self.ends, places, side="right")
        # the symbol that ends an answer does not count
        return (places >= self.answers[document]) & (places < self.ends[document] - 1)


def passage_of_split(
    corpus: Corpus, split: str, tokenizer: Tokenizer, on_unknown: str = "error"
) -> Passage:
    """A split of a corpus in the symbols of `tokenizer`, which may differ from the corpus' own.

    Raises InputError if the split was changed after it was written.
    """
    symbols, ends, counts = corpus.symbols(split), corpus.ends(split), corpus.splits[split]
    corpus.verify(split)
    if on_unknown == "error" and corpus.tokenizer.to_dict() == tokenizer.to_dict():
        whole = Passage(symbols, counts["chars"], counts["bytes"], counts["sha256"], ends=ends)
        whole = whole._replace(refuse_cut=partial(corpus.refuse_cut, split))
        return _counted(whole, tokenizer)
    documents = [symbols]
    if ends is not None and "files" in (tokenizer.documents, corpus.tokenizer.documents):
        documents = np.split(symbols, ends[:-1])
    in_bytes = corpus.manifest["characters"] == CHARACTERS[True]
    text = map(corpus.tokenizer.decode_bytes, documents)
    return passage_of_text(text, tokenizer, on_unknown, in_bytes)


def passage_of_text(
    documents: Iterable[bytes],
    tokenizer: Tokenizer,
    on_unknown: str = "error",
    in_bytes: bool = False,
) -> Passage:
    """Texts (UTF-8, or any bytes for a byte tokenizer) in the symbols of `tokenizer`.

    Each text is a document if the tokenizer's documents are files.  If they are lines, the texts
    are cleaned as `prepare` does: no empty lines, a newline at the end.  Else all are one stream.
    on_unknown: "error" raises InputError for a character that the vocabulary lacks; "skip" leaves
    it out and counts it.
    in_bytes: whether a byte counts as a character, as in a corpus of bytes.
    Memory stays under four times the size of the text.
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    digest, done, unknown, size = hashlib.sha256(), 0, 0, 0
    chars: int | None = 0
    parts: list[np.ndarray] = []
    for document in documents:
        read = pieces(document)
        for piece in Lines().whole(read) if tokenizer.documents == "lines" else read:
            try:
                symbols, known, skipped = encode_known(tokenizer, piece, on_unknown)
            except InputError as error:
                where = f"In the part of the text behind byte {done:,}: " if done else ""
                raise InputError(f"{where}{error}") from error
            parts.append(symbols.astype(dtype))
            digest.update(piece)
            done += len(piece)
            size, unknown = size + len(known), unknown + skipped
            chars = None if chars is None or not is_text(known) else chars + code_points(known)
        if tokenizer.documents == "files":
            parts.append(np.array([tokenizer.end], dtype))
    if not size:
        raise InputError("There is nothing to evaluate: the text is empty. Give some characters.")
    if in_bytes:
        chars = size
    symbols, ends = np.concatenate(parts), None
    if tokenizer.end is not None:
        ends = np.flatnonzero(symbols == tokenizer.end) + 1
    whole = Passage(symbols, chars, size, digest.hexdigest(), unknown, ends)
    return _counted(whole, tokenizer)


def _counted(whole: Passage, tokenizer: Tokenizer) -> Passage:
    """The passage; where only answers count, with their offsets and counts."""
    answers = tokenizer.answers(whole.symbols, whole.ends)
    if answers is None or whole.ends is None:
        return whole
    spans = zip(answers, whole.ends - 1, strict=True)
    text = np.concatenate([whole.symbols[begin:end] for begin, end in spans])
    size = len(tokenizer.decode_bytes(text))
    return whole._replace(chars=len(text), bytes=size, answers=answers)
