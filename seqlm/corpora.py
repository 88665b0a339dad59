"""Where text comes from: the corpora known by name, and the user's own files.

Everything here ends in bytes by split; prepare.py makes tokens of them.
"""

import hashlib
import io
import os
import re
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path

from seqlm.errors import InputError, UsageError

BUILT_IN = "stdlib"


@dataclass(frozen=True)
class Text:
    """A corpus before it is tokens: UTF-8 by split, or any bytes where `--unit byte` is meant."""

    name: str  # of its folder
    label: str  # in every figure
    splits: dict[str, bytes]
    left_out: list[str] = field(default_factory=list)  # files of a folder that are not text


@dataclass(frozen=True)
class Known:
    about: str
    read: Callable[[Path | None], Text]


def read(
    sources: list[str], given: Path | None = None, encoding: str | None = None, any_bytes=False
) -> Text:
    """The text that SOURCE... names: one known corpus (its file at `given`), or the user's files.

    Raises InputError for what cannot be read or is not text; `any_bytes` takes it as it is.
    """
    sources = sources or [BUILT_IN]
    known = [source for source in sources if source in KNOWN]
    if known and len(sources) > 1:
        raise UsageError(
            f"{known[0]} is a corpus known by name, which is prepared alone. "
            f"Name only it, or write ./{known[0]} for a file of yours."
        )
    if known and encoding is not None:
        raise UsageError(f"{known[0]} has its own encoding. Leave out --encoding.")
    if known:
        return KNOWN[known[0]].read(given)
    if given is not None:
        raise UsageError(
            f"--from gives the file of a known corpus ({', '.join(KNOWN)}); for your own text "
            f"name the file itself: seqlm prepare {given}"
        )
    return _own(sources, encoding, any_bytes)


# The user's own files


def _own(sources: list[str], encoding: str | None, any_bytes: bool) -> Text:
    data, left_out = bytearray(), []
    for source in sources:
        for path, chosen in _files(source):
            raw = _read(path)
            try:
                data += raw if any_bytes else _utf8(raw, path, encoding)
            except InputError:
                if chosen:
                    raise
                left_out.append(path)
    if left_out and not data:
        raise InputError(
            f"{', '.join(sources)} holds no text: none of its {len(left_out)} files is UTF-8. "
            "Name other files, or give --encoding or --unit byte."
        )
    name = "stdin" if sources[0] == "-" else folder_name(sources[0])
    return Text(name, name, split_by_position(bytes(data)), left_out)


def folder_name(source: str) -> str:
    """'Some Poems.txt' -> 'Some-Poems': a name for the folder that is safe everywhere."""
    stem = Path(source).resolve().name if not has_magic(source) else Path(source).parent.name
    stem = re.sub(r"\.(txt|md|text)$", "", stem)
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "text"


def _files(source: str) -> Iterator[tuple[str, bool]]:
    """(path, chosen by name) of the files that a file, folder, glob or '-' stands for."""
    path = Path(source)
    if not source:
        raise UsageError("A SOURCE is empty. Name a file, a folder or a known corpus.")
    if os.path.isdir(source):
        inside = sorted(p for p in path.rglob("*") if os.path.isfile(p) and not _hidden(p, path))
        if not inside:
            raise InputError(f"The folder {source} has no files. Name a folder with text in it.")
        yield from ((str(p), False) for p in inside)
    elif source == "-" or os.path.exists(source):  # a pipe is as good as a file
        yield source, True
    elif has_magic(source) and glob(source, recursive=True):
        for match in sorted(glob(source, recursive=True)):
            yield from _files(match)
    else:
        raise InputError(
            f"{source} is neither a file, a folder nor a known corpus. "
            f"Check the path, or name one of: {', '.join(KNOWN)}."
        )


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _read(path: str) -> bytes:
    if path == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"Cannot read {path}: {error.strerror}. Check it and its rights."
        ) from error


def _utf8(raw: bytes, path: str, encoding: str | None) -> bytes:
    """`raw` as UTF-8, from `encoding`; InputError names the first byte that is wrong."""
    name = "standard input" if path == "-" else path
    try:
        return raw.decode(encoding or "utf-8").encode("utf-8")
    except LookupError:
        raise UsageError(
            f"--encoding {encoding} is not an encoding Python knows. Try utf-16, latin-1, cp1251."
        ) from None
    except UnicodeError as error:
        offset = getattr(error, "start", 0)
        byte = f"0x{raw[offset]:02x} " if offset < len(raw) else ""
        guess = " It starts like UTF-16: try --encoding utf-16." if _utf16(raw) else ""
        raise InputError(
            f"{name} is not {encoding or 'UTF-8'}: byte {byte}at offset {offset:,}.{guess} "
            "Give --encoding NAME, or --unit byte to take the bytes as they are."
        ) from None


def _utf16(raw: bytes) -> bool:
    return raw[:2] in (b"\xff\xfe", b"\xfe\xff")


def characters(data: bytes) -> int | None:
    """Unicode code points of UTF-8 text; None for bytes that are not text."""
    try:
        return len(data.decode("utf-8"))
    except UnicodeDecodeError:
        return None


def split_by_position(data: bytes, shares: Iterable[int] = (90, 5, 5)) -> dict[str, bytes]:
    """Consecutive parts by percent: of characters where the data is text, of bytes elsewhere."""
    whole = data if characters(data) is None else data.decode("utf-8")
    splits, start, done = {}, 0, 0
    for name, share in zip(("train", "val", "test"), shares, strict=True):
        done += share
        end = len(whole) * done // 100
        part = whole[start:end]
        splits[name] = part.encode("utf-8") if isinstance(part, str) else part
        start = end
    return splits


# The corpora known by name


def _needs_file(name: str, given: Path | None, where: str) -> bytes:
    if given is None:
        raise InputError(
            f"{name} is not on this machine. Get {where} and give it: "
            f"seqlm prepare {name} --from FILE"
        )
    return _read(str(given))


SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def _tiny_shakespeare(given: Path | None) -> Text:
    """1,115,394 characters; the first int(0.9 N) train, the rest val, as nanoGPT splits it."""
    data = _needs_file("tinyshakespeare", given, "input.txt of karpathy/char-rnn")
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE:
        raise InputError(
            f"{given} is not tinyshakespeare: its sha256 is not {SHAKESPEARE[:16]}... "
            f"To prepare it as a text of your own: seqlm prepare {given}"
        )
    cut = int(0.9 * len(data))
    return Text("tinyshakespeare", "tinyshakespeare", {"train": data[:cut], "val": data[cut:]})


PTB_FILES = {"train": "ptb.train.txt", "val": "ptb.valid.txt", "test": "ptb.test.txt"}
PTB_CHARS = {"train": 5_017_482, "val": 393_042, "test": 442_423}


def _ptb_char(given: Path | None) -> Text:
    """The Penn Treebank by characters, derived from Mikolov's word files: each line stripped, a
    space written '_', the newline kept as the end of the line; 50 symbols."""
    splits = {}
    for split, data in _ptb_words(given).items():
        lines = _utf8(data, PTB_FILES[split], None).decode("utf-8").split("\n")[:-1]
        splits[split] = "".join(f"{line.strip().replace(' ', '_')}\n" for line in lines).encode()
        if len(splits[split]) != PTB_CHARS[split]:
            raise InputError(
                f"{PTB_FILES[split]} of {given} gives {len(splits[split]):,} characters, and the "
                f"Penn Treebank {PTB_CHARS[split]:,}. Get Mikolov's simple-examples.tgz."
            )
    return Text("ptb-char", "ptb-char", splits)


def _ptb_words(given: Path | None) -> dict[str, bytes]:
    """The three word files, from the archive or from a folder that holds them."""
    if given is not None and given.is_dir():
        return {split: _read(str(given / name)) for split, name in PTB_FILES.items()}
    archive = _needs_file("ptb-char", given, "simple-examples.tgz of Mikolov's RNNLM toolkit")
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            found = {Path(m.name).name: m for m in tar.getmembers() if m.isfile()}
            return {split: tar.extractfile(found[name]).read() for split, name in PTB_FILES.items()}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(
            f"{given} is not a tar archive, or a damaged one. Get it again."
        ) from error
    except KeyError as missing:
        raise InputError(
            f"{given} holds no {missing.args[0]}. Give Mikolov's simple-examples.tgz."
        ) from None


def _standard_library(given: Path | None) -> Text:
    """The source of the Python standard library on this machine: about 10 MB of real text.

    Tests, vendored packages and the encodings' tables are left out.  A file's split follows a hash
    of its name, so it is the same on every machine; the text differs by Python version.
    """
    if given is not None:
        raise UsageError("stdlib is read from this machine's Python. Leave out --from.")
    root = Path(sysconfig.get_paths()["stdlib"])
    splits: dict[str, list[bytes]] = {"train": [], "val": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not NOT_LIBRARY.isdisjoint(name.parts[:-1]) or not path.is_file():
            continue
        data = path.read_bytes()
        if characters(data) is not None:
            # 1 file in 32 each for val and test: 150 kB or more
            slot = hashlib.sha256(name.as_posix().encode()).digest()[0] % 32
            splits[{0: "val", 1: "test"}.get(slot, "train")].append(data)
    version = ".".join(map(str, sys.version_info[:3]))
    label = f"stdlib-{version}"
    return Text(BUILT_IN, label, {split: b"".join(files) for split, files in splits.items()})


NOT_LIBRARY = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "_vendor", "_bundled")
    + ("encodings", "__pycache__")
)


KNOWN = {
    BUILT_IN: Known("source of this machine's Python standard library", _standard_library),
    "tinyshakespeare": Known("1.1 MB of plays, 65 symbols (--from FILE)", _tiny_shakespeare),
    "ptb-char": Known("Penn Treebank by characters, 50 symbols (--from FILE)", _ptb_char),
}
