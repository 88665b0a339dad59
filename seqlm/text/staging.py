"""A text on its way to tokens: one file on disk, its splits and documents as places in it.

It is written once and read by chunks, so its size does not matter.
"""

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

CHUNK = 1 << 20
DOCUMENTS = ("none", "lines", "files")
EMPTY_LINES = re.compile(rb"\n(?:\r?\n)+")
FIRST_EMPTY_LINES = re.compile(rb"\A(?:\r?\n)+")
Span = tuple[int, int]  # of bytes: first, one past the last


class Lines:
    """A text of lines that are documents: none is empty, and each ends with a newline."""

    def __init__(self):
        self.empty = 0  # lines that were left out

    def whole(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        begun, held = False, b""
        for chunk in chunks:
            data = held + chunk
            newlines = data.count(b"\n")
            data = data if begun else FIRST_EMPTY_LINES.sub(b"", data)
            data = EMPTY_LINES.sub(b"\n", data)
            self.empty += newlines - data.count(b"\n")
            kept = data.rstrip(b"\r\n")  # the line ends after it may go on in the next chunk
            held = data[len(kept) :]
            begun = begun or bool(kept)
            yield kept
        if begun:
            yield held[: held.rfind(b"\n") + 1] or b"\n"


class Draft:
    """The text as UTF-8, or as any bytes where `encodings` is empty.

    documents: "lines" makes every line that is not empty a document, with the newline as its end;
    "files" every file.
    """

    def __init__(self, path: Path, documents: str = "none", encodings: Iterable[str] = ("utf-8",)):
        self.path, self.documents, self.encodings = path, documents, tuple(encodings)
        self.splits: dict[str, Span] = {}
        self.left_out: list[str] = []  # files of a folder or an archive that are not text
        self.unreadable: list[str] = []  # what is wrong with others of them
        self.empty_lines = 0  # left out, since they are no documents
        self.verified: str | None = None  # which published hash the text matched
        self.watch: Callable[[int], None] = lambda size: None  # called with the bytes so far
        self.file_ends: list[int] = []  # in bytes, where files are documents
        self._file: BinaryIO = path.open("w+b")

    def close(self) -> None:
        self._file.close()

    def flush(self) -> None:
        """Make what was added visible to who reads the file."""
        self._file.flush()

    @property
    def size(self) -> int:
        return self._file.tell()

    def add(self, item: Item) -> None:
        """Append a file; one that was not chosen by name is left out where it cannot be read."""
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
        """Append text of a known corpus, whose lines are as they should be."""
        self._file.write(data)

    def _take(self, item: Item) -> None:
        """Append the item, in the first encoding that it is of."""
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
        """Append all of it, or nothing."""
        size = self.size
        lines = Lines() if self.documents == "lines" else None
        try:
            for chunk in lines.whole(chunks) if lines else chunks:
                self._file.write(chunk)
                self.watch(self.size)
        except InputError:
            self._file.seek(size)
            self._file.truncate()
            raise
        self.empty_lines += lines.empty if lines else 0

    # Splits

    def size_of(self, split: str) -> int:
        """The bytes of a split."""
        start, end = self.splits[split]
        return end - start

    def end_split(self, name: str) -> None:
        """What was added since the last split ended is the split `name`."""
        begun = max((end for _, end in self.splits.values()), default=0)
        self.splits[name] = (begun, self.size)

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Splits of so many bytes."""
        start = 0
        for name, size in sizes.items():
            self.splits[name] = (start, start + size)
            start += size

    def become(self, splits: Mapping[str, Path], file_ends: Iterable[list[int]]) -> None:
        """Take the text of the files of `splits` for its own, and where files end in each."""
        self._file.seek(0)
        self._file.truncate()
        self.file_ends = []
        for (name, path), ends in zip(splits.items(), file_ends, strict=True):
            self.file_ends += [self.size + end for end in ends]
            with path.open("rb") as part:
                shutil.copyfileobj(part, self._file, CHUNK)
            path.unlink()
            self.end_split(name)

    # Reading

    def chunks(self, span: Span) -> Iterator[bytes]:
        """The text of the span, in pieces that end with a line or at least with a character."""
        self.flush()
        with self.path.open("rb") as file:
            file.seek(span[0])
            left = span[1] - span[0]
            while chunk := file.read(min(CHUNK, left)):
                if len(chunk) < left:
                    whole = chunk[: _whole(chunk)]
                    file.seek(len(whole) - len(chunk), 1)
                    chunk = whole
                left -= len(chunk)
                yield chunk

    def documents_of(self, split: str) -> Iterator[tuple[bytes, bool]]:
        """The split's text in pieces that end as those of `chunks`; whether a file ends there."""
        start, end = self.splits[split]
        first = bisect_left(self.file_ends, start + 1)
        inside = takewhile(lambda place: place <= end, self.file_ends[first:])
        for place in inside if self.documents == "files" else [end]:
            for chunk in self.chunks((start, place)):
                start += len(chunk)
                yield chunk, start == place


def _whole(chunk: bytes) -> int:
    """Where the last line of the chunk ends, or the last character that is whole."""
    if line := chunk.rfind(b"\n") + 1:
        return line
    if chunk[-1] < 0x80:
        return len(chunk)
    tail = np.flatnonzero(begins_character(chunk[-4:]))
    # of the last character it is not known whether it is whole
    last = len(chunk) - len(chunk[-4:]) + int(tail[-1]) if len(tail) else 0
    return last or len(chunk)


def code_points(text: bytes) -> int:
    """Unicode code points of UTF-8 text."""
    return int(np.count_nonzero(begins_character(text)))


def is_text(data: bytes) -> bool:
    """Whether the bytes are UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def begins_character(text: bytes) -> np.ndarray:
    """Whether a character of UTF-8 text begins with each byte."""
    return (np.frombuffer(text, np.uint8) & 0xC0) != 0x80
