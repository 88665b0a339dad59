"""Text <-> symbols: one code point or one byte each.  decode(encode(text)) == text, always."""

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from seqlm.errors import InputError, unknown
from seqlm.storage import read_json

FILE = "tokenizer.json"
ON_UNKNOWN = ("error", "skip")


class CharTokenizer:
    """One symbol a Unicode code point, numbered in the order of the code points."""

    unit = "char"

    def __init__(self, symbols: str):
        points = [ord(symbol) for symbol in symbols]
        if not points or points != sorted(set(points)):
            raise InputError("The tokenizer's symbols are empty or out of order: it is damaged.")
        self.symbols = symbols
        self._points = np.array(points, dtype="<u4")

    @classmethod
    def trained_on(cls, texts: list[bytes]) -> "CharTokenizer":
        """The tokenizer whose alphabet is that of the UTF-8 texts."""
        found = [np.unique(_code_points(text)) for text in texts]
        return cls("".join(map(chr, np.unique(np.concatenate(found)))))

    @property
    def vocab_size(self) -> int:
        return len(self.symbols)

    def encode(self, text: str | bytes) -> np.ndarray:
        """int64 symbols; InputError names the first character the vocabulary lacks."""
        points = _code_points(text)
        ids = self._lookup(points)
        missing = self._points[ids] != points
        if missing.any():
            where = int(missing.argmax())
            character = chr(points[where])
            raise InputError(
                f"Character {character!r} (U+{ord(character):04X}) at position {where:,} is not "
                f"in the vocabulary of {self.vocab_size} symbols. Change the text, or count and "
                "leave out such characters with --on-unknown skip."
            )
        return ids

    def known_part(self, text: bytes) -> tuple[bytes, int]:
        """The text without the characters the vocabulary lacks, and how many those were."""
        points = _code_points(text)
        kept = points[self._points[self._lookup(points)] == points]
        return _utf8(kept), len(points) - len(kept)

    def _lookup(self, points: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._points, points).clip(max=self.vocab_size - 1)

    def decode_bytes(self, ids: np.ndarray) -> bytes:
        """The UTF-8 text of the symbols."""
        return _utf8(self._points[ids])

    def decode(self, ids: np.ndarray) -> str:
        return self.decode_bytes(ids).decode("utf-8")

    def streamer(self) -> Callable[[int], str]:
        """A function from the next symbol to the text that it completes."""
        return lambda symbol: self.symbols[symbol]

    def to_dict(self) -> dict[str, Any]:
        return {"unit": self.unit, "symbols": self.symbols}


class ByteTokenizer:
    """One symbol a byte: any input, 256 symbols."""

    unit = "byte"
    vocab_size = 256

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.frombuffer(_as_bytes(text), dtype=np.uint8).astype(np.int64)

    def known_part(self, text: bytes) -> tuple[bytes, int]:
        return text, 0

    def decode_bytes(self, ids: np.ndarray) -> bytes:
        return np.asarray(ids).astype(np.uint8).tobytes()

    def decode(self, ids: np.ndarray) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def streamer(self) -> Callable[[int], str]:
        """A function from the next byte to the characters that it completes."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda symbol: decoder.decode(bytes((symbol,)))

    def to_dict(self) -> dict[str, Any]:
        return {"unit": self.unit}


Tokenizer = CharTokenizer | ByteTokenizer
UNITS = {kind.unit: kind for kind in (CharTokenizer, ByteTokenizer)}


def train_tokenizer(unit: str, texts: list[bytes]) -> Tokenizer:
    """A tokenizer of the unit for the texts; UsageError for a unit that does not exist."""
    if unit not in UNITS:
        raise unknown("unit", unit, UNITS)
    return ByteTokenizer() if unit == "byte" else CharTokenizer.trained_on(texts)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer saved in a corpus or a step; InputError where it is missing or damaged."""
    saved = read_json(folder / FILE)
    unit, symbols = saved.get("unit"), saved.get("symbols")
    if unit == "byte":
        return ByteTokenizer()
    if unit == "char" and isinstance(symbols, str):
        return CharTokenizer(symbols)
    raise InputError(f"{folder / FILE} is damaged: it describes no known unit. Make it again.")


def without_unknown(tokenizer: Tokenizer, text: bytes, on_unknown: str) -> tuple[bytes, int]:
    """The text as --on-unknown wants it, and how many characters were left out.

    "skip" leaves out what the vocabulary lacks; "error" leaves the text to `encode`, which raises.
    """
    if on_unknown not in ON_UNKNOWN:
        raise unknown("value of --on-unknown", on_unknown, ON_UNKNOWN)
    return tokenizer.known_part(text) if on_unknown == "skip" else (text, 0)


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


def _code_points(text: str | bytes) -> np.ndarray:
    """The code points of a text (UTF-8 where it is bytes), as uint32."""
    data = _as_bytes(text)
    try:
        return np.frombuffer(data.decode("utf-8").encode("utf-32-le"), dtype="<u4")
    except UnicodeDecodeError as error:
        raise InputError(
            f"The text is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start:,}. "
            "Convert it to UTF-8."
        ) from None


def _utf8(points: np.ndarray) -> bytes:
    return points.tobytes().decode("utf-32-le").encode("utf-8")
