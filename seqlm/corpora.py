"""Which text a corpus is: one known by name, with its published splits, or the user's own.

Everything here ends in a Draft; prepare.py makes tokens of it.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from seqlm import download
from seqlm.diagnostics import DIAGNOSTICS, MARK, Diagnostic
from seqlm.download import Tick
from seqlm.draft import Draft
from seqlm.errors import InputError, UsageError
from seqlm.sources import Item, Place, find, folder_name, items
from seqlm.splits import SPLITS, shares

DATA = Path("data")
DOWNLOADS = DATA / ".downloads"
BUILT_IN = "stdlib"
SHARES = "90,5,5"
MILLION = 1_000_000


@dataclass(frozen=True)
class Choice:
    """The text that the user asks for, not read yet."""

    name: str  # of the corpus' folder
    label: str  # in every figure
    unit: str  # that it is read in, unless the user says otherwise
    fill: Callable[[Draft, Tick], None]
    shares: Mapping[str, Fraction] | None  # of the splits; None where the text comes split
    answers: str = ""  # the mark behind which a line's answer stands, if there are any


@dataclass(frozen=True)
class Known:
    """A corpus known by name.  `fill` puts the text of its file into a draft, and checks it."""

    name: str
    about: str
    fill: Callable[[Draft, str], None]
    address: str = ""  # of the file; none: the text is on every machine
    unit: str = "char"
    label: str = ""  # the name, if empty

    @property
    def file(self) -> Path:
        """Where its download is kept."""
        return DOWNLOADS / Path(self.address).name


def choose(
    sources: Sequence[str],
    parts: Mapping[str, str] | None = None,
    split: str | None = None,
    documents: str = "none",
    given: Path | None = None,
    encoding: str | None = None,
) -> Choice:
    """The text that SOURCE... names (stdlib if nothing does), or that `parts` names by split.

    given: the file of a corpus known by name.  Raises UsageError for options that do not go
    together.
    """
    if parts and (sources or split is not None or "train" not in parts or "val" not in parts):
        raise UsageError(
            "--train and --val belong together, with --test if there is one, and take the place "
            "of SOURCE and --split. Give both of them, or a SOURCE."
        )
    sources = list(sources) if parts or sources else [BUILT_IN]
    if [*sources, *(parts or {}).values()].count("-") > 1:
        raise UsageError("Standard input, -, is named twice and can be read once. Name it once.")
    known = [source for source in sources if by_name(source) is not None]
    if len(known) and len(sources) > 1:
        raise UsageError(
            f"{known[0]} is a corpus known by name, which is prepared alone. "
            f"Name only it, or write ./{known[0]} for a file of yours."
        )
    if known and known[0] not in KNOWN:
        return _diagnostic(known[0], split, documents, given, encoding)
    if known:
        return _known(KNOWN[known[0]], split, documents, given, encoding)
    if given is not None:
        raise UsageError(
            f"--from gives the file of a known corpus ({', '.join(KNOWN)}); for your own text "
            f"name the file itself: seqlm prepare {given}"
        )
    divided = None if parts else shares(SHARES if split is None else split)
    by_split = {name: [parts[name]] for name in SPLITS if name in parts} if parts else {"": sources}
    places = {
        name: [place for source in named for place in find(source, NAMES)]
        for name, named in by_split.items()
    }
    name = folder_name(next(iter(by_split.values()))[0])
    return Choice(name, name, "char", partial(_fill_own, places), divided)


def _known(
    known: Known, split: str | None, documents: str, given: Path | None, encoding: str | None
) -> Choice:
    fixed = {"--encoding": encoding, "--split": split}
    if known.address:
        fixed["--documents"] = None if documents == "none" else documents
    elif given is not None:
        raise UsageError(f"{known.name} is read from this machine's Python. Leave out --from.")
    _refuse(fixed, known.name)
    fill = partial(_fill_known, known, given)
    return Choice(known.name, known.label or known.name, known.unit, fill, None)


def by_name(source: str) -> "Known | Diagnostic | None":
    """The corpus known by name that a source is, or with options, as in brackets:depth=4."""
    name, colon, _ = source.partition(":")
    return DIAGNOSTICS.get(name) or (None if colon else KNOWN.get(name))


def _diagnostic(
    source: str, split: str | None, documents: str, given: Path | None, encoding: str | None
) -> Choice:
    diagnostic = by_name(source)
    fixed = {"--from": given, "--encoding": encoding, "--split": split}
    _refuse({**fixed, "--documents": None if documents == "none" else documents}, diagnostic.name)
    options = diagnostic.options(source.partition(":")[2])
    other = [f"{key}={n}" for key, n in options.items() if n != diagnostic.defaults[key]]
    label = ":".join([diagnostic.name, ",".join(other)]) if other else diagnostic.name

    def fill(draft: Draft, tick: Tick) -> None:
        for name in SPLITS:
            for text in diagnostic.texts(options, name):
                draft.append(text)
                tick(0.0, f"made {draft.size / 1e6:,.1f} MB")
            draft.end_split(name)

    return Choice("-".join([diagnostic.name, *other]), label, "char", fill, None, MARK)


def _refuse(fixed: Mapping[str, object], name: str) -> None:
    """Raises UsageError for an option that a corpus with a form of its own was given."""
    for option, value in fixed.items():
        if value is not None:
            raise UsageError(f"{name} has a form of its own. Leave out {option}.")


def _fill_own(places: Mapping[str, list[Place]], draft: Draft, tick: Tick) -> None:
    """The user's files, by split ("" where they are not split yet)."""
    draft.watch = lambda size: tick(0.0, f"read {size / 1e6:,.1f} MB")
    for split, files in places.items():
        for place in files:
            try:
                with closing(items(place)) as found:
                    for item in found:
                        draft.add(item)
            except InputError as error:
                if place.chosen:
                    raise
                draft.unreadable.append(str(error))
        if split:
            draft.end_split(split)
    if draft.left_out and not draft.size:
        raise InputError(
            f"There is no text: {len(draft.left_out)} files, and none of them is UTF-8. Name other "
            "files, or give --encoding or --unit byte."
        )
    if draft.unreadable and not draft.size:
        raise InputError(draft.unreadable[0])


def _fill_known(known: Known, given: Path | None, draft: Draft, tick: Tick) -> None:
    """The text of a known corpus, from the file `given` or from its download.

    Raises InputError for a file that is not that corpus, and for a download that fails.
    """
    if given is not None and not given.exists():
        raise InputError(f"--from {given}: there is no such file. Check the path.")
    if not known.address or given is not None:
        return known.fill(draft, str(given))
    way_out = f"or get the file by other means and give it: seqlm prepare {known.name} --from FILE"
    if not known.file.exists():
        try:
            download.fetch(known.address, known.file, tick)
        except download.NoDownload as error:
            raise InputError(f"{error} Try again, {way_out}") from error
    if not download.is_as_recorded(known.file):
        raise InputError(
            f"{known.file} has changed since it was downloaded. Delete it to download it again, "
            f"{way_out}"
        )
    try:
        known.fill(draft, str(known.file))
    except InputError as error:
        download.forget(known.file)
        raise InputError(
            f"What {known.address} gives is not {known.name}, and was deleted: {error} "
            f"Try again later, {way_out}"
        ) from error
    download.record(known.file)


# The corpora known by name


def _content(path: str) -> Iterator[bytes]:
    """What is in the one file of a corpus, which may be packed."""
    for item in items(Place(path, chosen=True)):
        yield from item.chunks()


SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def _tiny_shakespeare(draft: Draft, path: str) -> None:
    """1,115,394 characters; the first int(0.9 N) train, the rest val, as nanoGPT splits it."""
    data = b"".join(_content(path))
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHAKESPEARE:
        raise InputError(
            f"{path} is not tinyshakespeare: its sha256 is {digest[:16]}..., not "
            f"{SHAKESPEARE[:16]}... To prepare it as a text of your own: seqlm prepare {path}"
        )
    draft.append(data)
    cut = int(0.9 * len(data))
    draft.cut({"train": cut, "val": len(data) - cut})


PTB_FILES = {"train": "ptb.train.txt", "val": "ptb.valid.txt", "test": "ptb.test.txt"}
PTB_CHARS = {"train": 5_017_482, "val": 393_042, "test": 442_423}


def _ptb_char(draft: Draft, path: str) -> None:
    """The Penn Treebank by characters, derived from Mikolov's word files: each line stripped, a
    space written '_', the newline kept as the end of the line; 50 symbols."""
    found = {}
    for item in chain.from_iterable(map(items, find(path))):
        name = Path(item.name).name.rpartition(" ")[2]  # of an archive's: "archive: folder/file"
        if name in PTB_FILES.values():
            found[name] = b"".join(item.utf8()).decode("utf-8")
    for split, name in PTB_FILES.items():
        if name not in found:
            raise InputError(f"{path} holds no {name}. Give Mikolov's simple-examples.tgz.")
        lines = found[name].split("\n")[:-1]
        text = "".join(f"{line.strip().replace(' ', '_')}\n" for line in lines)
        if len(text) != PTB_CHARS[split]:
            raise InputError(
                f"{name} of {path} gives {len(text):,} characters, and the Penn Treebank "
                f"{PTB_CHARS[split]:,}. Get Mikolov's simple-examples.tgz."
            )
        draft.append(text.encode("utf-8"))
        draft.end_split(split)


# of enwik8, published by its author at http://mattmahoney.net/dc/textdata.html
ENWIK8_SHA1 = "57b8363b814821dc9d47aa4d41f58733519076b2"


def _hutter(name: str, symbols: int, sha1: str = "") -> Callable[[Draft, str], None]:
    """The 100 million bytes of enwik8 or text8: 90, 5 and 5 million, by position.

    The exact size and alphabet are checked; a sha1 other than the published one is a warning.
    """

    def fill(draft: Draft, path: str) -> None:
        found, digest = np.zeros(256, dtype=bool), hashlib.sha1(usedforsecurity=False)
        for chunk in _content(path):
            draft.append(chunk)
            digest.update(chunk)
            found[np.frombuffer(chunk, np.uint8)] = True
        if (draft.size, found.sum()) != (100 * MILLION, symbols):
            raise InputError(
                f"{path} is not {name}: it has {draft.size:,} bytes with {found.sum()} different "
                f"values, and {name} {100 * MILLION:,} with {symbols}."
            )
        if sha1 and digest.hexdigest() != sha1:
            draft.warnings.append(
                f"{path} has the size and the alphabet of {name}, but not the sha1 that its author "
                "published: figures on it are not comparable."
            )
        draft.cut({"train": 90 * MILLION, "val": 5 * MILLION, "test": 5 * MILLION})

    return fill


NOT_LIBRARY = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "_vendor", "_bundled")
    + ("encodings", "__pycache__")
)


def _standard_library(draft: Draft, path: str) -> None:
    """The source of the Python standard library on this machine: about 10 MB of real text.

    Tests, vendored packages and the encodings' tables are left out.  A file's split follows a hash
    of its name, so it is the same on every machine; the text differs by Python version.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    splits: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if NOT_LIBRARY.isdisjoint(name.parts[:-1]) and path.is_file():
            # 1 file in 32 each for val and test: 150 kB or more
            slot = hashlib.sha256(name.as_posix().encode()).digest()[0] % 32
            splits[{0: "val", 1: "test"}.get(slot, "train")].append(path)
    for split, files in splits.items():
        for path in files:
            with path.open("rb") as file:
                draft.add(Item(str(path), file, chosen=False))
        draft.end_split(split)
    draft.left_out.clear()  # files that test how Python reads other encodings


_CORPORA = (
    Known(
        BUILT_IN,
        "source of this machine's Python standard library, about 10 MB",
        _standard_library,
        label="{}-{}.{}.{}".format(BUILT_IN, *sys.version_info),
    ),
    Known(
        "tinyshakespeare",
        "plays, 1.1 MB, 65 symbols; split as by nanoGPT",
        _tiny_shakespeare,
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ),
    Known(
        "ptb-char",
        "Penn Treebank by characters, 5.9 MB, 50 symbols",
        _ptb_char,
        "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",
    ),
    Known(
        "enwik8",
        "Wikipedia as it is stored, 100 MB, 205 bytes; figures are per byte",
        _hutter("enwik8", symbols=205, sha1=ENWIK8_SHA1),
        "http://mattmahoney.net/dc/enwik8.zip",
        unit="byte",
    ),
    Known(
        "text8",
        "Wikipedia in small letters, 100 MB, 27 symbols",
        _hutter("text8", symbols=27),
        "http://mattmahoney.net/dc/text8.zip",
    ),
)
KNOWN = {known.name: known for known in _CORPORA}
NAMES = (*KNOWN, *DIAGNOSTICS)
