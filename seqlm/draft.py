"""A text on its way to tokens: one file on disk, its splits and documents as places in it.

It is written once and read by chunks, so its size does not matter.
"""

import re
import shutil
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from fractions import Fraction
from itertools import compress, takewhile
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import numpy as np

from seqlm.errors import InputError, UsageError
from seqlm.sources import Item, NotText

CHUNK = 1 << 20
SPLITS = ("train", "val", "test")
DOCUMENTS = ("none", "lines", "files")
EMPTY_LINES = re.compile(rb"\n(?:\r?\n)+")
LINES = re.compile(rb"[^\n]*\n|[^\n]+")
FIRST_EMPTY_LINES = re.compile(rb"\A(?:\r?\n)+")
HASHES = 1 << 20  # by which documents go to splits
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
        self.warnings: list[str] = []
        self._file_ends: list[int] = []
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
            self._file_ends.append(self.size)

    def append(self, data: bytes) -> None:
        """Append text of a corpus that has no documents."""
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

    def divide(self, shares: Mapping[str, Fraction], chars: int | None) -> None:
        """Splits by share of the `chars` characters (of the bytes, if not text), by position;
        documents, which may be sorted, by the hash of their text."""
        if self.documents != "none":
            self._deal(shares)
            return
        done, start = Fraction(0), 0
        for name, share in shares.items():
            done += share
            place = self.size * done if chars is None else chars * done
            end = self._offset(int(place), chars)
            self.splits[name] = (start, end)
            start = end

    def _offset(self, place: int, chars: int | None) -> int:
        """The byte at which the character number `place` begins."""
        if chars is None or chars == self.size:
            return place
        offset = 0
        for chunk in self.chunks((0, self.size)):
            begins = _begins_character(chunk)
            count = int(np.count_nonzero(begins))
            if place < count:
                return offset + int(np.flatnonzero(begins)[place])
            place, offset = place - count, offset + len(chunk)
        return offset

    def _deal(self, shares: Mapping[str, Fraction]) -> None:
        """Give every document to a split by the hash of its text, so that equal ones stay together.

        Within a split they keep their order.
        """
        weights = np.zeros(HASHES)
        for hashes, pieces, _ in self._hashed():
            np.add.at(weights, hashes, [len(piece) for piece in pieces])
        owner = _owners(weights, list(shares.values()))
        paths = [self.path.with_name(f"{self.path.name}-{name}") for name in shares]
        ends: list[list[int]] = [[] for _ in paths]
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in paths]
            for hashes, pieces, whole in self._hashed():
                owners = owner[hashes]
                for number, file in enumerate(files):
                    file.writelines(compress(pieces, owners == number))
                    if whole and owners[0] == number:
                        ends[number].append(file.tell())
        self._take_over(dict(zip(shares, paths, strict=True)), ends)

    def _hashed(self) -> Iterator[tuple[np.ndarray, list[bytes], bool]]:
        """Pieces of documents with the hashes of these; whether a file ends with the last piece."""
        if self.documents == "files":
            start = 0
            for end in self._file_ends:
                value = 0
                for chunk in self.chunks((start, end)):
                    value = crc32(chunk, value)
                for chunk in self.chunks((start, end)):
                    start += len(chunk)
                    yield np.array([value % HASHES]), [chunk], start == end
            return
        begun = None  # the hash of a line that is longer than a chunk
        for chunk in self.chunks((0, self.size)):
            lines = LINES.findall(chunk)
            hashes = np.fromiter(map(crc32, lines), np.int64, len(lines)) % HASHES
            if begun is not None:
                hashes[0] = begun
            begun = None if chunk.endswith(b"\n") else hashes[-1]
            yield hashes, lines, False

    def _take_over(self, parts: Mapping[str, Path], ends: list[list[int]]) -> None:
        """Become the parts, one after the other."""
        self._file.seek(0)
        self._file.truncate()
        self._file_ends = []
        for (name, path), inside in zip(parts.items(), ends, strict=True):
            self._file_ends += [self.size + end for end in inside]
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
        first = bisect_left(self._file_ends, start + 1)
        inside = takewhile(lambda place: place <= end, self._file_ends[first:])
        for place in inside if self.documents == "files" else [end]:
            for chunk in self.chunks((start, place)):
                start += len(chunk)
                yield chunk, start == place


def _owners(weights: np.ndarray, shares: list[Fraction]) -> np.ndarray:
    """The number of the split of every hash; all but the first have at least one document."""
    owner = np.zeros(len(weights), dtype=np.int64)
    upto, place, done = np.cumsum(weights), 0, 0.0
    for number, share in enumerate(shares[1:], 1):
        done += float(share) * upto[-1]
        after = place + int(np.argmax(weights[place:] > 0)) + 1  # behind the next document
        end = max(after, int(np.searchsorted(upto, done, side="right")))
        owner[place:end] = number
        place = end
    return owner


def _whole(chunk: bytes) -> int:
    """Where the last line of the chunk ends, or the last character that is whole."""
    if line := chunk.rfind(b"\n") + 1:
        return line
    if chunk[-1] < 0x80:
        return len(chunk)
    tail = np.flatnonzero(_begins_character(chunk[-4:]))
    # of the last character it is not known whether it is whole
    last = len(chunk) - len(chunk[-4:]) + int(tail[-1]) if len(tail) else 0
    return last or len(chunk)


def code_points(text: bytes) -> int:
    """Unicode code points of UTF-8 text."""
    return int(np.count_nonzero(_begins_character(text)))


def is_text(data: bytes) -> bool:
    """Whether the bytes are UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _begins_character(text: bytes) -> np.ndarray:
    return (np.frombuffer(text, np.uint8) & 0xC0) != 0x80


def shares(text: str) -> dict[str, Fraction]:
    """'90,5,5' -> the share of each split; UsageError unless two or three parts make 100."""
    number = r"\s*\d+(\.\d+)?\s*"
    whole = re.fullmatch(f"{number}(,{number})+", text)
    parts = [Fraction(part.strip()) for part in text.split(",")] if whole else []
    if len(parts) not in (2, 3) or sum(parts) != 100 or min(parts) <= 0:
        raise UsageError(
            f"--split {text}: give the percent of train and val, and of test if there is to be "
            "one, 100 in all: 90,5,5."
        )
    return {name: part / 100 for name, part in zip(SPLITS, parts, strict=False)}
