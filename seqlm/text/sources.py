"""The user's own text: files, folders, globs, archives and standard input, as open files of bytes.

A source is read once, in order and in chunks, so memory does not grow with its size.
"""

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import stat
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, cast

from seqlm.errors import InputError, UsageError, did_you_mean, nearest

BYTES_AT_ONCE = 1 << 20
DEEPEST = 10  # levels of archives inside archives
# the ending of a compressed file, and what opens it
PACKED: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
}
# short endings of compressed tars; _unpacked also knows .tar, .tar.gz and so on
TAR = {".tgz": ".gz", ".txz": ".xz", ".tbz": ".bz2", ".tbz2": ".bz2"}
# what reading raises for a file that the system cannot read, or for a damaged archive
READ_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError),
    UnicodeDecodeError,  # a name inside a zip
)
# the type stubs of tarfile lack both
HEADER_ERRORS: tuple[type[Exception], ...] = (
    tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
    tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
)
SEQLM_FILES = (  # file names by which a corpus, a run and a saved step are recognised
    *({"manifest.json", "tokenizer.json"}, {"metrics.jsonl", "config.toml"}),
    {"MANIFEST.json", "tokenizer.json"},
)
STARTS = {  # first bytes of files that are not UTF-8, and what to do about them
    b"\xff\xfe": "UTF-16: try --encoding utf-16",
    b"\xfe\xff": "UTF-16: try --encoding utf-16",
    b"\x1f\x8b": "gzip: unpack it, or give the file a name that ends in .gz",
    b"\xfd7zXZ": "xz: unpack it, or give the file a name that ends in .xz",
    b"BZh": "bzip2: unpack it, or give the file a name that ends in .bz2",
    b"PK\x03\x04": "zip: unpack it, or give the file a name that ends in .zip",
}


class NotText(InputError):
    """A file that is not text in the expected encoding."""


class Item(NamedTuple):
    """A file of a source; it is closed when the next one is requested."""

    name: str
    file: BinaryIO
    chosen: bool  # True: the user named it; False: it was found in a folder or an archive
    plain: bool = False  # True: an ordinary file, which can be read twice; False: from a pipe
    depth: int = 0  # number of archives around it

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the file; InputError if it cannot be read or is a damaged archive."""
        with _faults(self.name):
            while chunk := self.file.read(BYTES_AT_ONCE):
                yield chunk

    def utf8(self, encoding: str = "utf-8") -> Iterator[bytes]:
        """The text as UTF-8; NotText names the first byte that is not valid in `encoding`."""
        decoder = _decoder(encoding)
        read, head = 0, b""
        # the empty chunk at the end tells the decoder that nothing follows
        for chunk in chain(self.chunks(), [b""]):
            head = head or chunk[:8]
            try:
                yield decoder.decode(chunk, final=not chunk).encode("utf-8")
            except UnicodeDecodeError as error:
                # error.object may begin with bytes that the decoder kept from earlier chunks
                place = read + len(chunk) - len(error.object) + error.start
                byte = error.object[error.start] if error.start < len(error.object) else None
                raise self._not_text(encoding, place, byte, head) from None
            except UnicodeError:  # no byte order mark, or half a surrogate pair
                raise self._not_text(encoding, read, None, head) from None
            read += len(chunk)

    @contextmanager
    def repeatable(self) -> Iterator["Item"]:
        """The same item with a file that can be read several times."""
        if self.plain:
            yield self
            return
        with tempfile.TemporaryFile() as copy:
            for chunk in self.chunks():
                copy.write(chunk)
            copy.seek(0)
            yield self._replace(file=copy, plain=True)

    def _not_text(self, encoding: str, place: int, byte: int | None, head: bytes) -> NotText:
        kind = "UTF-8" if encoding == "utf-8" else encoding
        what = "byte " if byte is None else f"byte 0x{byte:02x} "
        like = [hint for start, hint in STARTS.items() if head.startswith(start)]
        guess = f" It starts like {like[0]}." if like else ""
        return NotText(
            f"{self.name} is not {kind}: {what}at offset {place:,}.{guess} "
            "Give --encoding NAME, or --unit byte to take the bytes as they are."
        )


@contextmanager
def _faults(name: str) -> Iterator[None]:
    """Turn the errors of a damaged or unreadable file into an InputError with its name."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(
            f"{name} needs a password or a packing method that Python lacks. Unpack it first."
        ) from error
    except READ_ERRORS as error:
        # an OSError without errno comes from a decoder, not from the operating system
        if not isinstance(error, OSError) or error.errno is None:
            raise InputError(
                f"{name} is damaged, or not what its name says: {error}. Get it again."
            ) from error
        raise InputError(
            f"Cannot read {name}: {error.strerror}. Check the file and its permissions."
        ) from error


def _decoder(encoding: str) -> codecs.IncrementalDecoder:
    try:
        # rejects codecs that do not produce text, such as base64
        io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        return codecs.getincrementaldecoder(encoding)("strict")
    except (LookupError, ValueError):
        raise UsageError(
            f"--encoding {encoding}: Python knows no such text encoding. Try utf-16, latin-1 or "
            "cp1251."
        ) from None


def encodings(option: str | None) -> list[str]:
    """The encodings in --encoding, in the order to try them; UsageError for an unknown one."""
    names = [name.strip() for name in ("utf-8" if option is None else option).split(",")]
    for name in names:
        _decoder(name)
    return names


class Place(NamedTuple):
    """Where a file of a source is: a path, or '-' for standard input."""

    path: str
    chosen: bool  # True: the user named it; False: it was found in a folder


def find(
    source: str, known: Sequence[str] = (), prepared: Callable[[], Sequence[Path]] = tuple
) -> list[Place]:
    """The files that a path, a folder, a glob or '-' stands for, in a stable order.

    Raises InputError for a source that does not exist or is a device, UsageError for an empty name.
    The error suggests names of `known` corpora, and those of the folders that `prepared` returns.
    """
    if not source:
        raise UsageError("A SOURCE is empty. Name a file, a folder or a known corpus.")
    if os.path.isdir(source):
        if not (inside := _inside(source, named=True)):
            raise InputError(f"The folder {source} has no files. Name a folder with text in it.")
        return inside
    if source == "-" or os.path.exists(source):  # a path may also be a pipe
        if source != "-" and stat.S_ISCHR(os.stat(source).st_mode):
            raise InputError(
                f"{source} is a device, and its text may never end. Name a file, or - for standard "
                "input."
            )
        return [Place(source, chosen=True)]
    places: list[Place] = []
    for path in sorted(glob(source, recursive=True)):
        if os.path.isdir(path):
            # glob itself lists the files below each folder where the pattern has **
            places += [] if "**" in source else _inside(path, named=False)
        elif os.path.isfile(path) and not ("**" in source and _is_ours(os.path.dirname(path))):
            places.append(Place(path, chosen=True))
    if places:
        return places
    raise _not_found(source, known, prepared())


def _not_found(source: str, known: Sequence[str], prepared: Sequence[Path]) -> InputError:
    near = _nearest(source, [*(path.name for path in prepared), *known])
    also = f", or name one of: {', '.join(known)}" if known else ""
    have = f" Prepared corpora: {', '.join(map(str, prepared))}." if prepared else ""
    return InputError(
        f"{source} is neither a file, a folder nor a known corpus. {did_you_mean(near)}Check the "
        f"path{also}.{have}"
    )


def _nearest(source: str, corpora: Sequence[str]) -> list[str]:
    """The corpus, or the file or folder beside the source, whose name is nearest, if one is."""
    folder, name = os.path.split(source)
    try:
        beside = [other for other in os.listdir(folder or ".") if not other.startswith(".")]
    except (OSError, ValueError):  # ValueError: a NUL in the path
        beside = []
    others = [other for other in (*beside, *(() if folder else corpora)) if other != name]
    return [os.path.join(folder, near) for near in nearest(name, others)]


def _is_ours(folder: str) -> bool:
    """Whether the folder is a corpus, a run or a saved step of seqlm."""
    with _faults(folder or "."):
        names = set(os.listdir(folder or "."))
    return any(mark <= names for mark in SEQLM_FILES)


def _inside(folder: str, named: bool) -> list[Place]:
    """The files in a folder and its subfolders, without hidden ones.

    Corpora and runs of seqlm are left out, except `folder` itself where the user named it.
    """
    places, waiting = [], [folder]
    while waiting:  # no recursion: folders may be nested thousands deep
        parent = waiting.pop()
        if _is_ours(parent) and not (named and parent == folder):
            continue
        with _faults(parent):
            entries = [entry for entry in os.scandir(parent) if not entry.name.startswith(".")]
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif os.path.isfile(entry.path):
                places.append(Place(entry.path, chosen=False))
    return sorted(places, key=lambda place: Path(place.path))


def items(place: Place) -> Generator[Item]:
    """The file at a place, or the files in it if its name says that it is an archive."""
    if place.path == "-":
        yield Item("standard input", standard_input(), True)
        return
    with _faults(place.path):
        file = open(place.path, "rb")
    with file:
        plain = os.path.isfile(place.path)
        yield from _unpacked(Item(place.path, file, place.chosen, plain))


def standard_input() -> BinaryIO:
    """Standard input as bytes; InputError if it is closed."""
    if sys.stdin is None:
        raise InputError("Standard input is closed. Pipe a text into the command, or name a file.")
    return sys.stdin.buffer


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") and part != ".." for part in path.parts)


def _unpacked(item: Item) -> Iterator[Item]:
    """The item itself, or the files in it if its name says that it is an archive."""
    stem, ending = os.path.splitext(item.name.lower())
    if item.depth > DEEPEST:
        raise InputError(
            f"{item.name.partition(': ')[0]} holds archives inside archives, more than {DEEPEST} "
            "levels deep. Unpack it first."
        )
    if ending in TAR or ending == ".tar" or (ending in PACKED and stem.endswith(".tar")):
        packing = PACKED.get(TAR.get(ending, ending))
        inner = item._replace(file=packing(item.file) if packing else item.file)
        with _faults(item.name):
            tar = tarfile.open(fileobj=inner.file, mode="r|", tarinfo=_Member)
        files = ((m.name, partial(tar.extractfile, m)) for m in _tar_files(item, tar))
        yield from _members(item, files)
        for _ in inner.chunks():  # read to the end, so that the checksum there is verified
            pass
    elif ending == ".zip":
        with item.repeatable() as whole:  # zip lists its files at its end
            with _faults(item.name):
                archive = zipfile.ZipFile(whole.file)
            inside = (m for m in archive.infolist() if m.filename[-1:] != "/")
            yield from _members(item, ((m.filename, partial(archive.open, m)) for m in inside))
    elif ending in PACKED:
        yield item._replace(file=PACKED[ending](item.file), plain=False)
    else:
        yield item


class _Member(tarfile.TarInfo):
    """A file in a tar.  A damaged header is an error here, but the archive's end for tarfile."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except HEADER_ERRORS as error:
            raise tarfile.ReadError(str(error)) from None


def _tar_files(item: Item, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    with _faults(item.name):
        yield from (member for member in archive if member.isfile())


def _members(item: Item, inside: Iterator[tuple[str, Callable[[], Any]]]) -> Iterator[Item]:
    """The files of an archive in its own order, without hidden ones.

    inside: the path of each file in the archive, and a function that opens it.
    """
    empty = True
    for path, open_file in inside:
        if not _hidden(Path(path)):
            name = f"{item.name}: {path}"
            with _faults(name):
                file = open_file()
            try:
                yield from _unpacked(Item(name, file, chosen=False, depth=item.depth + 1))
            except InputError as error:  # one bad file does not stop the others, as in a folder
                yield Item(name, cast(BinaryIO, _Unreadable(error)), chosen=False)
            empty = False
    if empty and item.chosen:
        raise InputError(f"The archive {item.name} has no files. Name one with text in it.")


class _Unreadable(io.RawIOBase):
    """Takes the place of a file that cannot be unpacked: reading it raises the reason."""

    def __init__(self, error: InputError):
        self.error = error

    def read(self, size: int = -1) -> bytes:
        raise self.error


def folder_name(source: str) -> str:
    """'Some Poems.txt.gz' -> 'Some-Poems': a folder name that is valid on every system."""
    if source == "-":
        return "stdin"
    if has_magic(source) and not os.path.lexists(source):
        stem = ([part for part in Path(source).parts if not has_magic(part)] or [""])[-1]
    else:
        stem = Path(os.path.abspath(source)).name
    stem = re.sub(r"(?i)\.(gz|xz|bz2|zip|tgz|txz|tbz2?)$", "", stem)
    stem = re.sub(r"(?i)\.(tar|txt|md|text)$", "", stem)
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "text"
