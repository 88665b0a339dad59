"""The data card: statistics of a text, and baselines that a model of it must beat."""

import lzma
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seqlm.progress import OnProgress
from seqlm.text.staging import Draft, code_points

RAREST = 10  # characters that the card lists
XZ_BYTES = 6_000_000  # with more, xz would take longer than everything else
XZ_FILTER = {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 23}
LINES_KEPT = 1 << 18
IMPLAUSIBLE = 0.3  # times the figure of xz; the best published models reach about half of it
CONTROLS = slice(0x80, 0xA0)  # C1 controls: rare in text, common where cp1252 was read as Latin-1
REPLACEMENT = 0xFFFD
# UTF-8 that was read as Latin-1 or cp1252: its first byte became U+00C2 .. U+00F4, and the second
# one a character that those code pages have at 0x80 .. 0xBF
TWICE_ENCODED = re.compile(
    rb"\xc3[\x82-\xb4](?:\xc2[\x80-\xbf]|\xe2\x80[\x93-\xba]|\xe2\x82\xac|\xe2\x84\xa2"
    rb"|\xc5[\x92\x93\xa0\xa1\xb8\xbd\xbe]|\xc6\x92|\xcb[\x86\x9c])"
)


@dataclass(frozen=True)
class Card:
    """Statistics of a text.  Its symbols are code points, or bytes if the bytes are not text."""

    chars: int | None  # code points; None if the bytes are not text
    bytes: int
    lines: int
    counts: np.ndarray  # occurrences of every code point, or of every byte
    mojibake: int  # places that look like text that was read in a wrong encoding
    duplicates: float  # share of the bytes that are in repeated lines

    @property
    def alphabet(self) -> np.ndarray:
        """The symbols that occur, in order."""
        return np.flatnonzero(self.counts)

    @property
    def by_frequency(self) -> np.ndarray:
        """The symbols that occur, the most frequent first."""
        return self.alphabet[np.argsort(-self.counts[self.alphabet], kind="stable")]

    @property
    def entropy(self) -> float:
        """Bits per symbol of a model that knows only the frequency of each symbol."""
        p = self.counts[self.alphabet] / self.counts.sum()
        return float((p * -np.log2(p)).sum())

    def to_dict(self, xz: "Xz") -> dict[str, Any]:
        """The card as the manifest holds it."""
        rarest = self.by_frequency[::-1][:RAREST]
        symbols = xz.bytes if self.chars is None else xz.chars
        name = (lambda s: f"0x{s:02x}") if self.chars is None else chr
        return {
            "chars": self.chars,
            "bytes": self.bytes,
            "lines": self.lines,
            "alphabet": len(self.alphabet),
            "rarest": [[name(int(symbol)), int(self.counts[symbol])] for symbol in rarest],
            "suspected_mojibake": self.mojibake,
            "duplicate_share": round(self.duplicates, 6),
            "unigram_bits_per_char": round(self.entropy, 6),
            "xz_bytes": xz.packed,
            "xz_of_bytes": xz.bytes,
            "xz_bits_per_char": round(8 * xz.packed / symbols, 6),
        }


def implausible(bits_per_char: float, card: Mapping[str, Any]) -> bool:
    """Whether a figure is too far below that of `xz -9` on the same text to be believed.

    bits_per_char: per byte where the corpus has no characters.
    """
    return bits_per_char < IMPLAUSIBLE * card["xz_bits_per_char"]


@dataclass(frozen=True)
class Xz:
    """The size of the start of a text before and after xz."""

    packed: int  # bytes after xz
    bytes: int  # bytes before xz
    chars: int  # code points before xz, if it is text


def xz(path: Path) -> Xz:
    """`xz -9` on the first 6 MB of a file, which fit into its window of 8 MiB."""
    with path.open("rb") as file:
        data = file.read(XZ_BYTES)
    packed = lzma.compress(data, filters=[XZ_FILTER])
    return Xz(len(packed), len(data), code_points(data))


def measure(draft: Draft, tick: OnProgress, as_text: bool = True) -> Card:
    """Read the text once and count its code points, or its bytes if `as_text` is false or it is not
    UTF-8."""
    points, raw = np.zeros(0x110000, dtype=np.int64), np.zeros(256, dtype=np.int64)
    is_text, mojibake, lines, done, repeats = as_text, 0, 0, 0, Repeats()
    for chunk in draft.chunks((0, draft.size)):
        done += len(chunk)
        lines += chunk.count(b"\n")
        mojibake += sum(1 for _ in TWICE_ENCODED.finditer(chunk))
        repeats.read(chunk)
        try:
            if is_text:
                numbers = np.frombuffer(chunk.decode("utf-8").encode("utf-32-le"), dtype="<u4")
                counts = np.bincount(numbers)
                points[: len(counts)] += counts
        except UnicodeDecodeError:
            is_text = False
        raw += np.bincount(np.frombuffer(chunk, np.uint8), minlength=256)
        last = chunk
        tick(0.5 * done / draft.size, "counting")
    lines += bool(done and not last.endswith(b"\n"))
    mojibake += int(points[CONTROLS].sum() + points[REPLACEMENT])
    return Card(
        chars=int(points.sum()) if is_text else None,
        bytes=draft.size,
        lines=lines,
        counts=points if is_text else raw,
        mojibake=mojibake if is_text else 0,
        duplicates=repeats.share,
    )


class Repeats:
    """Estimates the share of a text that is in repeated lines, in constant memory.

    A line is identified by its crc32.  When there are too many different lines, only those whose
    crc32 is a multiple of 2 are counted, then of 4, and so on.  So each line is counted everywhere
    or nowhere, and the share stays an unbiased estimate.
    """

    def __init__(self) -> None:
        self._every = 1
        self._sizes: dict[int, int] = {}  # bytes of each counted line, by crc32
        self._times: dict[int, int] = {}  # occurrences of each counted line
        self._hash, self._size = 0, 0  # of the line that the last chunk cut

    def read(self, chunk: bytes) -> None:
        """Count the lines that end in the next chunk of the text."""
        first, *lines = chunk.split(b"\n")
        self._hash, self._size = zlib.crc32(first, self._hash), self._size + len(first)
        if not lines:
            return
        hashes = np.array([self._hash, *map(zlib.crc32, lines)])
        sizes = np.array([self._size, *map(len, lines)])
        self._hash, self._size = int(hashes[-1]), int(sizes[-1])
        hashes, sizes = hashes[:-1], sizes[:-1]
        followed = hashes % self._every == 0
        unique, places, times = np.unique(hashes[followed], return_index=True, return_counts=True)
        for line, size, count in zip(
            unique.tolist(), sizes[followed][places].tolist(), times.tolist(), strict=True
        ):
            self._sizes[line] = size
            self._times[line] = self._times.get(line, 0) + count
        while len(self._sizes) > LINES_KEPT:
            self._every *= 2
            self._sizes = {h: n for h, n in self._sizes.items() if h % self._every == 0}
            self._times = {h: self._times[h] for h in self._sizes}

    @property
    def share(self) -> float:
        whole = sum(self._times[line] * size for line, size in self._sizes.items())
        again = sum((self._times[line] - 1) * size for line, size in self._sizes.items())
        return again / whole if whole else 0.0
