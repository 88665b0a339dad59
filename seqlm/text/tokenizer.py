"""Text <-> symbols: code points, bytes or learned pieces.  decode(encode(text)) == text, always."""

import base64
import codecs
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from seqlm.errors import InputError, not_utf8, unknown
from seqlm.manifest import read_json
from seqlm.text.staging import DOCUMENTS

TOKENIZER_FILE = "tokenizer.json"
LARGEST_TOKENIZER = 1 << 24  # bytes: an upper limit of that file, above what 2^18 pieces take
ON_UNKNOWN = ("error", "skip")
NEWLINE = 10


def validation_protocol(documents: str, mark: str) -> str:
    """How a training validates a corpus with such documents: what its figures can be compared with.

    The quick estimate reads 64 stripes of the split side by side.
    """
    if mark:
        return "answers"
    return "quick estimate" if documents == "none" else "by document"


class UnknownCharacter(InputError):
    """A character that the vocabulary lacks."""


class Tokenizer(ABC):
    """The base of all tokenizers.

    documents: "none" for one stream; "lines" where a newline ends a document; "files" where an
    extra symbol ends it, which stands for no text and follows the symbols of the text.
    mark: the character between question and answer, where only answers count; else "".
    """

    unit: ClassVar[str]
    text_symbols: int  # number of symbols that stand for text
    newline: int | None  # the symbol of "\n" alone; None if the vocabulary lacks it
    mark = ""

    def __init__(self, documents: str = "none"):
        self.documents = documents

    @property
    def vocab_size(self) -> int:
        return self.text_symbols + (self.documents == "files")

    @property
    def end(self) -> int | None:
        """The symbol that ends a document; None if the text is one stream."""
        return {"none": None, "lines": self.newline, "files": self.text_symbols}[self.documents]

    @property
    @abstractmethod
    def texts(self) -> list[bytes]:
        """The UTF-8 text, or the bytes, of each symbol that stands for text."""

    @property
    def shown(self) -> list[str]:
        """The text of each symbol, as people read it; "" for a symbol that ends a document.

        A byte that is no character by itself is shown as an escape such as \\xc3.
        """
        texts = [text.decode("utf-8", "backslashreplace") for text in self.texts]
        return texts + [""] * (self.vocab_size - self.text_symbols)

    def answers(self, symbols: np.ndarray, ends: np.ndarray | None) -> np.ndarray | None:
        """The offset at which the answer of each document begins, after its first mark: (D,).

        symbols: (N,).  ends: (D,) the offset at which each document ends.
        Returns None if the whole text counts.  Raises InputError for a document without an
        answer.
        """
        if not self.mark:
            return None
        assert ends is not None, "answers belong to documents"
        marks = np.flatnonzero(symbols == self.encode(self.mark)[0])
        starts = np.concatenate([[0], ends[:-1]])
        first = np.searchsorted(marks, starts)
        begins = np.append(marks, len(symbols))[first] + 1
        without = np.flatnonzero(begins >= ends - 1)
        if len(without):
            start, end = int(starts[without[0]]), int(ends[without[0]])
            raise InputError(
                f"The line {self.decode(symbols[start:end][:40])!r} has no answer behind a "
                f"{self.mark!r}. Correct it, or prepare the text without --answers."
            )
        return begins

    def rows_of(self, other: "Tokenizer") -> dict[int, int]:
        """{symbol: symbol of `other`} for symbols that mean the same text, or a document's end."""
        if self.to_dict() == other.to_dict():
            return {symbol: symbol for symbol in range(self.vocab_size)}
        # when pieces share a text, the encoder uses the last one
        old = {text: symbol for symbol, text in enumerate(other.texts)}
        new = {text: symbol for symbol, text in enumerate(self.texts)}
        rows = {symbol: old[text] for text, symbol in new.items() if text in old}
        if self.documents == other.documents == "files":  # the extra symbol follows the others
            rows[self.text_symbols] = other.text_symbols
        return rows

    @abstractmethod
    def encode(self, text: str | bytes) -> np.ndarray:
        """The symbols of a text, int64; UnknownCharacter names the first that has no symbol."""

    def encode_document(self, text: str | bytes) -> np.ndarray:
        """The symbols of a document, or of several lines that are documents, with the end."""
        ids = self.encode(text)
        return np.append(ids, self.text_symbols) if self.documents == "files" else ids

    @abstractmethod
    def _bytes(self, ids: np.ndarray) -> bytes:
        """The UTF-8 text of symbols that stand for text."""

    def decode_bytes(self, ids: np.ndarray) -> bytes:
        """The UTF-8 text of the symbols."""
        ids = np.asarray(ids)
        return self._bytes(ids[ids != self.end] if self.documents == "files" else ids)

    def decode(self, ids: np.ndarray) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def streamer(self, errors: str = "replace") -> Callable[[int], str]:
        """A function that takes the next symbol and returns the characters that it completes.

        errors: what becomes of bytes that are no characters, as in bytes.decode.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors=errors)
        return lambda symbol: decoder.decode(self.decode_bytes(np.array([symbol])))

    def known_part(self, text: bytes) -> tuple[bytes, int]:
        """The text without the characters that the vocabulary lacks, and the number of those."""
        return text, 0

    def to_dict(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        return {"unit": self.unit, "documents": self.documents}


class CharTokenizer(Tokenizer):
    """One symbol for each Unicode code point, numbered in the order of the code points."""

    unit = "char"

    def __init__(self, symbols: str, documents: str = "none", mark: str = ""):
        super().__init__(documents)
        self.mark = mark
        points = [ord(symbol) for symbol in symbols]
        halves = any(0xD800 <= point < 0xE000 for point in points)  # surrogates are not characters
        if not points or halves or points != sorted(set(points)):
            raise InputError("The tokenizer's symbols are empty or out of order: it is damaged.")
        if mark and (len(mark) != 1 or mark not in symbols or documents != "lines"):
            raise InputError("The tokenizer's mark is not one character of a line: it is damaged.")
        self.symbols, self.text_symbols = symbols, len(points)
        self.newline = points.index(NEWLINE) if NEWLINE in points else None
        self._points = np.array(points, dtype="<u4")
        # table from code point to symbol; -1, also in the last entry, means unknown
        self._symbol = np.full(points[-1] + 2, -1, dtype=np.int64)
        self._symbol[points] = np.arange(len(points))

    def encode(self, text: str | bytes) -> np.ndarray:
        points = _code_points(text)
        ids = self._lookup(points)
        if len(ids) and ids.min() < 0:
            where = int((ids < 0).argmax())
            character = chr(points[where])
            raise UnknownCharacter(
                f"Character {character!r} (U+{ord(character):04X}) at position {where:,} is not "
                f"in the vocabulary of {self.text_symbols} symbols. Change the text."
            )
        return ids

    def known_part(self, text: bytes) -> tuple[bytes, int]:
        points = _code_points(text)
        kept = points[self._lookup(points) >= 0]
        return _utf8(kept), len(points) - len(kept)

    @property
    def texts(self) -> list[bytes]:
        return [symbol.encode("utf-8") for symbol in self.symbols]

    def _lookup(self, points: np.ndarray) -> np.ndarray:
        return self._symbol[np.minimum(points, len(self._symbol) - 1)]

    def _bytes(self, ids: np.ndarray) -> bytes:
        return _utf8(self._points[ids])

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "mark": self.mark, "symbols": self.symbols}


class ByteTokenizer(Tokenizer):
    """One symbol for each byte: 256 symbols, any input."""

    unit = "byte"
    text_symbols = 256
    newline = NEWLINE
    texts: ClassVar = [bytes([byte]) for byte in range(256)]

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.frombuffer(_as_bytes(text), dtype=np.uint8).astype(np.int64)

    def _bytes(self, ids: np.ndarray) -> bytes:
        return ids.astype(np.uint8).tobytes()


class SentencePieceTokenizer(Tokenizer):
    """Pieces learned by sentencepiece, plus all 256 bytes, so that any text can be encoded.

    Sentencepiece itself would lose a newline, which ends its sentence, and U+2581, which it uses
    for a space.  Both are encoded as bytes here and never given to it.
    Source: Kudo and Richardson 2018, arXiv 1808.06226.
    """

    unit = "sentencepiece"
    newline = NEWLINE  # the symbols 0 .. 255 are the bytes

    def __init__(self, model: bytes, documents: str = "none"):
        from sentencepiece import SentencePieceProcessor

        super().__init__(documents)
        self.model = model
        try:
            # sentencepiece treats b"" as "no model given"
            self._processor = SentencePieceProcessor(model_proto=model or b"damaged")
            # piece 0 of sentencepiece is "unknown", which never occurs since the bytes cover all
            size = self._processor.get_piece_size()
            pieces = [self._processor.id_to_piece(i) for i in range(1, size)]
        except (RuntimeError, ValueError) as error:
            raise InputError("The tokenizer's pieces are damaged. Make it again.") from error
        if pieces[:256] != [f"<0x{byte:02X}>" for byte in range(256)]:
            raise InputError("The tokenizer's pieces lack the bytes: they are damaged.")
        texts = [piece.replace(SPACE, " ").encode("utf-8") for piece in pieces]
        texts[:256] = ByteTokenizer.texts
        self.text_symbols = len(texts)
        self._texts = np.array(texts, dtype=object)
        # if the training text had no space, there is no piece for it: spaces become bytes, too
        self._bytewise = f"\n{SPACE}" if SPACE in pieces else f"\n{SPACE} "
        others = f"[^{self._bytewise}]{{1,{LONGEST_SENTENCE}}}"
        self._parts = re.compile(f"[{self._bytewise}]|{others}")

    def encode(self, text: str | bytes) -> np.ndarray:
        parts = self._parts.findall(_as_text(text))
        as_bytes = {part: list(part.encode("utf-8")) for part in self._bytewise}
        encoded = iter(self._processor.encode([part for part in parts if part not in as_bytes]))
        symbols = (as_bytes[p] if p in as_bytes else [i - 1 for i in next(encoded)] for p in parts)
        ids = np.fromiter(chain.from_iterable(symbols), dtype=np.int64)
        if len(ids) and ids.min() < 0:
            raise InputError("The tokenizer's pieces have no symbol for this text: it is damaged.")
        return ids

    @property
    def texts(self) -> list[bytes]:
        return self._texts.tolist()

    def _bytes(self, ids: np.ndarray) -> bytes:
        return b"".join(self._texts[ids])

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "model": base64.b64encode(self.model).decode("ascii")}


SPACE = "\u2581"
LONGEST_SENTENCE = 4000  # characters; in training sentencepiece drops longer ones
MODEL_TYPES = ("unigram", "bpe")
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 300, 1 << 18  # symbols, 256 of them bytes


def train_sentencepiece(
    text: Iterable[bytes], alphabet: np.ndarray, vocab_size: int, model_type: str
) -> bytes:
    """Train sentencepiece on the text; its serialized model.

    alphabet: the code points that pieces may contain, most frequent first.  They may fill half of
    the vocabulary; the rest are encoded as bytes.
    vocab_size: SMALLEST_VOCABULARY to LARGEST_VOCABULARY.  model_type: one of MODEL_TYPES.
    Raises InputError for text in which no pieces are found.
    """
    from sentencepiece import SentencePieceTrainer

    points = [int(point) for point in alphabet if point not in (NEWLINE, ord(SPACE))]
    taken = re.escape("".join(map(chr, points[: (vocab_size - 256) // 2])))
    known = re.compile(f"[{taken}]{{1,{LONGEST_SENTENCE}}}" if taken else "(?!)")
    raised: list[BaseException] = []

    def sentences() -> Iterator[str]:
        try:
            for chunk in text:
                yield from known.findall(chunk.decode("utf-8", "ignore"))
        except BaseException as error:  # sentencepiece raises another error in its place
            raised.append(error)
            raise

    learned = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=learned,
            model_type=model_type,
            vocab_size=vocab_size + 1,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            character_coverage=1.0,
            max_sentence_length=4 * LONGEST_SENTENCE + 1,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if raised:  # as by a signal
            raise raised[0] from None
        raise InputError(
            f"sentencepiece finds no {vocab_size} pieces in this text. Prepare more text, or "
            "choose --unit char."
        ) from error
    return learned.getvalue()


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer saved in a corpus or a step; InputError if it is missing or damaged."""
    saved = read_json(folder / TOKENIZER_FILE, LARGEST_TOKENIZER)
    unit, documents = saved.get("unit"), saved.get("documents", "none")
    if documents in DOCUMENTS:
        if unit == "byte":
            return ByteTokenizer(documents)
        mark = saved.get("mark", "")
        if unit == "char" and isinstance(saved.get("symbols"), str) and isinstance(mark, str):
            return CharTokenizer(saved["symbols"], documents, mark)
        if unit == "sentencepiece" and isinstance(saved.get("model"), str):
            try:
                model = base64.b64decode(saved["model"], validate=True)
            except ValueError:
                raise InputError(f"{folder / TOKENIZER_FILE} is damaged. Make it again.") from None
            return SentencePieceTokenizer(model, documents)
    raise InputError(
        f"{folder / TOKENIZER_FILE} is damaged: it describes no known unit. Make it again."
    )


def encode_known(
    tokenizer: Tokenizer, text: bytes, on_unknown: str
) -> tuple[np.ndarray, bytes, int]:
    """The symbols of a text, the text that they stand for, and the number of skipped characters.

    on_unknown: "skip" leaves out characters that the vocabulary lacks; for "error", such a
    character raises InputError.
    """
    if on_unknown not in ON_UNKNOWN:
        raise unknown("value of --on-unknown", on_unknown, ON_UNKNOWN)
    known, skipped = tokenizer.known_part(text) if on_unknown == "skip" else (text, 0)
    try:
        return tokenizer.encode(known), known, skipped
    except UnknownCharacter as error:
        raise InputError(
            f"{error} Or count and leave out such characters with --on-unknown skip."
        ) from None


UNITS = tuple(kind.unit for kind in (CharTokenizer, ByteTokenizer, SentencePieceTokenizer))


def _as_bytes(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"U+{ord(text[error.start]):04X} at position {error.start:,} is half of a surrogate "
            "pair and not a character. Correct the text."
        ) from None


def _as_text(text: str | bytes) -> str:
    try:
        return _as_bytes(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8("The text", error) from None


def _code_points(text: str | bytes) -> np.ndarray:
    """The code points of a text (UTF-8 where it is bytes), as uint32."""
    return np.frombuffer(_as_text(text).encode("utf-32-le"), dtype="<u4")


def _utf8(points: np.ndarray) -> bytes:
    return points.tobytes().decode("utf-32-le").encode("utf-8")
