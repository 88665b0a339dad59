"""The text of a corpus before it becomes symbols: one file, with its splits as byte ranges.

The file is written once and read in chunks, so texts larger than memory work.
"""

import hashlib
import re
import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from seqlm.errors import InputError
from seqlm.text.sources import Item, NotText

BYTES_AT_ONCE = 1 << 20
DOCUMENTS = ("none", "lines", "files")
EMPTY_LINES = re.compile(rb"\n(?:\r?\n)+")
FIRST_EMPTY_LINES = re.compile(rb"\A(?:\r?\n)+")
Span = tuple[int, int]  # of bytes: first, one past the last


class Lines:
    """Cleans a text whose lines are documents: drops empty lines, ends the last with a newline."""

    def __init__(self) -> None:
        self.empty = 0  # lines that were left out

    def whole(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """The cleaned text; a chunk may begin and end anywhere in a line."""
        started, line_ends = False, b""
        for chunk in chunks:
            data = line_ends + chunk
            newlines = data.count(b"\n")
            data = data if started else FIRST_EMPTY_LINES.sub(b"", data)
            data = EMPTY_LINES.sub(b"\n", data)
            self.empty += newlines - data.count(b"\n")
            # keep the line ends at the end of the chunk: the next chunk may begin with more of them
            kept = data.rstrip(b"\r\n")
            line_ends = data[len(kept) :]
            started = started or bool(kept)
            yield kept
        if started:
            yield line_ends[: line_ends.rfind(b"\n") + 1] or b"\n"


class Draft:
    """The text of a corpus while it is prepared: UTF-8, or any bytes where `encodings` is empty.

    documents: with "lines" every line that is not empty is a document, ended by its newline; with
    "files" every file is one; with "none" the text is one stream.
    """

    def __init__(self, path: Path, documents: str = "none", encodings: Iterable[str] = ("utf-8",)):
        self.path, self.documents, self.encodings = path, documents, tuple(encodings)
        self.splits: dict[str, Span] = {}
        self.left_out: list[str] = []  # names of files in folders and archives that are not text
        self.unreadable: list[str] = []  # one message for each file that cannot be read
        self.empty_lines = 0  # dropped, since an empty line is not a document
        self.verified: str | None = None  # which published hash the text matched
        self.watch: Callable[[int], None] = lambda size: None  # gets the bytes so far
        self.file_ends: list[int] = []  # byte offsets; only used where files are documents
        self.size = 0  # bytes
        self._file: BinaryIO = path.open("w+b")
        self._digest = hashlib.sha256()

    def close(self) -> None:
        self._file.close()

    def flush(self) -> None:
        """Write buffered text to the file, so that readers of the file see it."""
        # a file that was left out may have written beyond the end of the text
        self._file.truncate()
        self._file.flush()

    @property
    def sha256(self) -> str:
        """The hash of the text, before it was divided into splits."""
        return self._digest.hexdigest()

    def add(self, item: Item) -> None:
        """Append a file.  An unreadable file is skipped unless the user named it."""
        start = self.size
        try:
            self._take(item)
        except InputError as error:
            if item.chosen:
                raise
            if isinstance(error, NotText):
                self.left_out.append(item.name)
            else:
                self.unreadable.append(str(error))
        if self.documents == "files" and self.size > start:
            self.file_ends.append(self.size)

    def append(self, data: bytes) -> None:
        """Append text without cleaning its lines."""
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def _take(self, item: Item) -> None:
        """Append the item, decoded by the first of the encodings that fits it."""
        if not self.encodings:
            return self._write(item.chunks())
        if len(self.encodings) == 1:
            return self._write(item.utf8(self.encodings[0]))
        with item.repeatable() as again:
            for encoding in self.encodings[:-1]:
                try:
                    return self._write(again.utf8(encoding))
                except NotText:
                    again.file.seek(0)
            return self._write(again.utf8(self.encodings[-1]))

    def _write(self, chunks: Iterable[bytes]) -> None:
        """Append all chunks, or none of them if one cannot be read."""
        size, digest = self.size, self._digest.copy()
        lines = Lines() if self.documents == "lines" else None
        try:
            for chunk in lines.whole(chunks) if lines else chunks:
                self.append(chunk)
                self.watch(self.size)
        except InputError:
            self._file.seek(size)
            self.size, self._digest = size, digest
            raise
        self.empty_lines += lines.empty if lines else 0

    # Splits

    def size_of(self, split: str) -> int:
        """The size of a split in bytes."""
        start, end = self.splits[split]
        return end - start

    def end_split(self, name: str) -> None:
        """The split `name` is everything that was added since the last split ended."""
        start = max((end for _, end in self.splits.values()), default=0)
        self.splits[name] = (start, self.size)

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Cut the text into splits of these sizes in bytes, in this order."""
        start = 0
        for name, size in sizes.items():
            self.splits[name] = (start, start + size)
            start += size

    def become(self, splits: Mapping[str, Path], file_ends: Iterable[list[int]]) -> None:
        """Replace the text by that of the files in `splits`, one split each; delete those files.

        file_ends: for every split the byte offsets at which documents end.
        """
        self._file.seek(0)
        self.file_ends, self.size = [], 0
        for (name, path), ends in zip(splits.items(), file_ends, strict=True):
            self.file_ends += [self.size + end for end in ends]
            with path.open("rb") as part:
                shutil.copyfileobj(part, self._file, BYTES_AT_ONCE)
            self.size = self._file.tell()
            path.unlink()
            self.end_split(name)

    # Reading

    def chunks(self, span: Span) -> Iterator[bytes]:
        """The text of the span in pieces that end with a line, or else with a character."""
        self.flush()
        with self.path.open("rb") as file:
            file.seek(span[0])
            left = span[1] - span[0]
            while chunk := file.read(min(BYTES_AT_ONCE, left)):
                if len(chunk) < left:
                    whole = chunk[: _whole(chunk)]
                    file.seek(len(whole) - len(chunk), 1)
                    chunk = whole
                left -= len(chunk)
                yield chunk

    def documents_of(self, split: str) -> Iterator[tuple[bytes, bool]]:
        """The split's text in pieces, as from `chunks`; True after a piece that ends a document.

        Unless files are documents, only the last piece ends one.
        """
        start, end = self.splits[split]
        first = bisect_left(self.file_ends, start + 1)
        inside = takewhile(lambda place: place <= end, self.file_ends[first:])
        for place in inside if self.documents == "files" else [end]:
            for chunk in self.chunks((start, place)):
                start += len(chunk)
                yield chunk, start == place


def pieces(text: bytes) -> Iterator[bytes]:
    """The text in pieces of up to 1 MB, each of which ends with a line, or else a character."""
    start = 0
    while start < len(text):
        piece = text[start : start + BYTES_AT_ONCE]
        if start + len(piece) < len(text):
            piece = piece[: _whole(piece)]
        start += len(piece)
        yield piece


def _whole(chunk: bytes) -> int:
    """The length of the chunk up to its last line end, or else up to its last whole character."""
    if line := chunk.rfind(b"\n") + 1:
        return line
    if chunk[-1] < 0x80:
        return len(chunk)
    tail = np.flatnonzero(begins_character(chunk[-4:]))
    # the last character may be cut, so the piece ends before it
    last = len(chunk) - len(chunk[-4:]) + int(tail[-1]) if len(tail) else 0
    return last or len(chunk)


def code_points(text: bytes) -> int:
    """The number of Unicode code points of UTF-8 text."""
    return int(np.count_nonzero(begins_character(text)))


def is_text(data: bytes) -> bool:
    """Whether the bytes are UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def begins_character(text: bytes) -> np.ndarray:
    """For each byte of UTF-8 text, whether a character begins with it: (N,) bool."""
    return (np.frombuffer(text, np.uint8) & 0xC0) != 0x80
