"""New items for a list: texts of a model of documents that are whole, and not seen before."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np

from seqlm.errors import SeqlmError
from seqlm.evaluation.evaluate import NATS_PER_BIT, each_symbol, loss_and_hit
from seqlm.evaluation.passage import Passage
from seqlm.model import LanguageModel
from seqlm.text.corpus import Corpus
from seqlm.text.tokenizer import Tokenizer

PATIENCE = 1000  # texts in a row that are not wanted, before the search ends
ENDLESS = 1 << 48  # seeds to try


def documents_of(corpus: Corpus) -> set[bytes]:
    """The `identity` of every document of all splits of a corpus."""
    found: set[bytes] = set()
    for split in corpus.splits:
        ends = corpus.ends(split)
        assert ends is not None, "a corpus of documents has ends"
        symbols, start = corpus.symbols(split), 0
        for end in ends.tolist():
            found.add(identity(corpus.tokenizer.decode_bytes(np.asarray(symbols[start:end]))))
            start = end
    return found


def identity(document: bytes) -> bytes:
    """A hash of a document without its line's end: 16 bytes, so that long lists fit in memory."""
    return blake2b(document.removesuffix(b"\n"), digest_size=16).digest()


def items(
    texts: Iterator[tuple[str, bool]], count: int, seen: set[bytes], unique: bool
) -> Iterator[str]:
    """The first `count` texts that are whole, not empty and not in `seen`.

    texts: each text, and whether it reached a document's end.  unique: each only once.
    Raises SeqlmError where none of PATIENCE texts in a row is wanted.
    """
    found = refused = 0
    for text, whole in texts:
        key = identity(text.encode("utf-8"))
        if whole and text and key not in seen:
            if unique:
                seen.add(key)
            yield text
            found, refused = found + 1, 0
            if found == count:
                return
        else:
            refused += 1
        if refused == PATIENCE:
            raise SeqlmError(
                f"The model has no more to give: {found:,} of {count:,} texts were found, and the "
                f"next {PATIENCE:,} were known already, empty or had no end. Raise --temperature, "
                "or choose an earlier step with --step."
            )


def whole_texts(
    pieces: Iterator[tuple[int, str, bool]], tokenizer: Tokenizer, prompt: str, chars: int
) -> Iterator[tuple[str, bool]]:
    """Each text behind the prompt, and whether it reached a document's end.

    pieces: as from generate_many.  A text without an end has `chars` characters.
    """
    held: dict[int, str] = {}
    for number, piece, ended in pieces:
        held[number] = held.get(number, "") + piece
        if ended:
            text = held.pop(number)
            ends_line = tokenizer.documents == "lines" and text.endswith("\n")
            yield prompt + text.removesuffix("\n"), ends_line or len(text) < chars


def bits(model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str]) -> list[float]:
    """The surprisal of each text as a document with its end, all read in one pass."""
    newline = "\n" if tokenizer.documents == "lines" else ""
    documents = [tokenizer.encode_document(text + newline) for text in texts]
    ends = np.cumsum([len(document) for document in documents])
    whole = Passage(np.concatenate(documents), chars=None, bytes=0, sha256="", ends=ends)
    totals = np.zeros(len(texts))
    for places, (nats, _) in each_symbol(model, whole, loss_and_hit):
        np.add.at(totals, np.searchsorted(ends, places, side="right"), nats.numpy())
    return (totals / NATS_PER_BIT).tolist()
