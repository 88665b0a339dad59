"""The text of a corpus: a known corpus with its published splits, or the user's own files.

Each choice fills a Draft; prepare.py turns the draft into symbols.
"""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from seqlm.errors import InputError, UsageError, unknown
from seqlm.progress import OnProgress
from seqlm.text import download
from seqlm.text.corpus import DATA, prepared
from seqlm.text.sources import Item, Place, find, folder_name, items
from seqlm.text.splits import SPLITS, shares
from seqlm.text.staging import DOCUMENTS, Draft
from seqlm.text.synthetic import DIAGNOSTICS, MARK, Diagnostic

DOWNLOADS = DATA / ".downloads"
BUILT_IN = "stdlib"
SHARES = "90,5,5"  # percent of train, val and test
# bytes of each split, in the order of the file: the split that papers on enwik8 and text8 use
HUTTER = {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000}


@dataclass(frozen=True)
class Choice:
    """The text that the user asks for, before it is read."""

    name: str  # name of the corpus' folder
    label: str  # name of the corpus in printed results
    unit: str  # default unit of a symbol
    fill: Callable[[Draft, OnProgress], None]  # reads the text into a draft
    shares: Mapping[str, Fraction] | None  # size of each split; None: the text is split already
    answers: str = ""  # the character before each line's answer; empty: no answers
    from_user: bool = False  # whether the text is the user's own files


@dataclass(frozen=True)
class Known:
    """A known corpus.  `fill` checks the text of its file and puts it into a draft."""

    name: str
    about: str
    fill: Callable[[Draft, str], None]  # gets the draft and the path of the file
    address: str = ""  # URL of the file; empty: the text is on every machine
    unit: str = "char"
    label: str = ""  # name in printed results; empty: the same as `name`

    @property
    def file(self) -> Path:
        """Where its download is kept."""
        return DOWNLOADS / Path(self.address).name


def choose(
    sources: Sequence[str],
    parts: Mapping[str, str] | None = None,
    split: str | None = None,
    documents: str = "none",
    file: Path | None = None,
    encoding: str | None = None,
) -> Choice:
    """Choose the text: that of `sources`, or one source for each split in `parts`.

    Without sources and parts, the choice is the standard library.
    file: the file of a known corpus, to use instead of a download.
    Raises UsageError for options that cannot be combined.
    """
    if documents not in DOCUMENTS:
        raise unknown("value of --documents", documents, DOCUMENTS)
    if parts and (sources or split is not None or "train" not in parts or "val" not in parts):
        raise UsageError(
            "--train and --val must be given together, and without SOURCE and --split; --test is "
            "optional. Give both --train and --val, or give a SOURCE."
        )
    sources = list(sources) if parts or sources else [BUILT_IN]
    if [*sources, *(parts or {}).values()].count("-") > 1:
        raise UsageError(
            "Standard input (-) is named twice, but can be read only once. Name it once."
        )
    known = [source for source in sources if by_name(source) is not None]
    if len(known) and len(sources) > 1:
        raise UsageError(
            f"{known[0]} is a known corpus, and cannot be combined with other sources. Name it "
            f"alone, or write ./{known[0]} to name your own file."
        )
    if known and known[0] not in KNOWN:
        return _diagnostic(known[0], split, documents, file, encoding)
    if known:
        return _known(KNOWN[known[0]], split, documents, file, encoding)
    if file is not None:
        raise UsageError(
            f"--from names the file of a known corpus ({', '.join(KNOWN)}). To prepare your own "
            f"text, name the file itself: seqlm prepare {file}"
        )
    divided = None if parts else shares(SHARES if split is None else split)
    by_split = {name: [parts[name]] for name in SPLITS if name in parts} if parts else {"": sources}
    places = {
        name: [place for source in named for place in find(source, NAMES, prepared)]
        for name, named in by_split.items()
    }
    name = folder_name(next(iter(by_split.values()))[0])
    return Choice(name, name, "char", partial(_fill_own, places), divided, from_user=True)


def _known(
    known: Known, split: str | None, documents: str, file: Path | None, encoding: str | None
) -> Choice:
    fixed = {"--encoding": encoding, "--split": split}
    if known.address:
        fixed["--documents"] = None if documents == "none" else documents
    elif file is not None:
        raise UsageError(f"{known.name} is read from this machine's Python. Remove --from.")
    _refuse(fixed, known.name)
    fill = partial(_fill_known, known, file)
    return Choice(known.name, known.label or known.name, known.unit, fill, None)


def by_name(source: str) -> "Known | Diagnostic | None":
    """The known corpus or diagnostic that a source names; None if it names neither.

    A diagnostic may have options, as in brackets:depth=4.
    """
    name, colon, _ = source.partition(":")
    return DIAGNOSTICS.get(name) or (None if colon else KNOWN.get(name))


def _diagnostic(
    source: str, split: str | None, documents: str, file: Path | None, encoding: str | None
) -> Choice:
    diagnostic = DIAGNOSTICS[source.partition(":")[0]]
    fixed = {"--from": file, "--encoding": encoding, "--split": split}
    _refuse({**fixed, "--documents": None if documents == "none" else documents}, diagnostic.name)
    options = diagnostic.options(source.partition(":")[2])
    other = [f"{key}={n}" for key, n in options.items() if n != diagnostic.defaults[key]]
    label = ":".join([diagnostic.name, ",".join(other)]) if other else diagnostic.name

    def fill(draft: Draft, tick: OnProgress) -> None:
        for name in SPLITS:
            for text in diagnostic.texts(options, name):
                draft.append(text)
                tick(0.0, f"made {draft.size / 1e6:,.1f} MB")
            draft.end_split(name)

    return Choice("-".join([diagnostic.name, *other]), label, "char", fill, None, MARK)


def _refuse(fixed: Mapping[str, object], name: str) -> None:
    """Raises UsageError for an option that the named corpus does not allow."""
    for option, value in fixed.items():
        if value is not None:
            raise UsageError(
                f"{name} is a fixed corpus and does not take {option}. Remove {option}."
            )


def _fill_own(places: Mapping[str, list[Place]], draft: Draft, tick: OnProgress) -> None:
    """Fill the draft with the user's files.

    places: {split: files}; the key "" holds files that are not split yet.
    """
    draft.watch = lambda size: tick(0.0, f"read {size / 1e6:,.1f} MB")
    for split, files in places.items():
        for place in files:
            try:
                with closing(items(place)) as opened:
                    for item in opened:
                        draft.add(item)
            except InputError as error:
                if place.chosen:
                    raise
                draft.unreadable.append(str(error))
        if split:
            draft.end_split(split)
    if draft.left_out and not draft.size:
        raise InputError(
            f"There is no text: none of the {len(draft.left_out)} files is UTF-8. Name other "
            "files, or give --encoding or --unit byte."
        )
    if draft.unreadable and not draft.size:
        raise InputError(draft.unreadable[0])


def _fill_known(known: Known, file: Path | None, draft: Draft, tick: OnProgress) -> None:
    """Fill the draft with a known corpus, from `file` or from its download.

    Raises InputError if the file is not that corpus, or if the download fails.
    """
    if file is not None and not (file.is_file() or file.is_dir()):
        what = "it is neither a file nor a folder" if file.exists() else "there is no such file"
        raise InputError(f"--from {file}: {what}. Check the path.")
    if not known.address or file is not None:
        return known.fill(draft, str(file))
    way_out = f"or download the file yourself, then: seqlm prepare {known.name} --from FILE"
    new = not known.file.exists()  # whether this call has to download the file
    if new:
        try:
            download.fetch(known.address, known.file, tick)
        except download.NoDownload as error:
            raise InputError(f"{error} Try again, {way_out}") from error
    try:
        known.fill(draft, str(known.file))
    except InputError as error:
        if not new:
            raise InputError(
                f"{known.file} was downloaded earlier, and is no longer {known.name}: "
                f"{error} Delete it to download it again, {way_out}"
            ) from error
        known.file.unlink()
        raise InputError(
            f"The download of {known.address} is not {known.name}, and was deleted: {error} "
            f"Try again later, {way_out}"
        ) from error


class Published(NamedTuple):
    """Size and hash of a file, and who published the hash."""

    size: int
    algorithm: str
    digest: str
    by: str

    def checked(self, chunks: Iterable[bytes], path: str, name: str) -> Iterator[bytes]:
        """The chunks of `path`, unchanged.

        Raises InputError after the last chunk if size or hash differ from the published ones.
        """
        digest, size = hashlib.new(self.algorithm, usedforsecurity=False), 0
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            if size > self.size:  # stop here: a file such as /dev/zero never ends
                break
            yield chunk
        computed = digest.hexdigest()
        if size == self.size and computed == self.digest:
            return
        why = f"its {self.algorithm} is {computed}, not {self.digest} (published by {self.by})"
        if size != self.size:
            why = f"it has {'fewer' if size < self.size else 'more'} than {self.size:,} bytes"
        raise InputError(
            f"{path} is not {name}: {why}. Get the file again, or prepare it as your own text: "
            f"seqlm prepare {quote(os.path.join('.', path))}"
        )


MAHONEY = "mattmahoney.net/dc/textdata.html"
ENWIK8 = Published(100_000_000, "sha1", "57b8363b814821dc9d47aa4d41f58733519076b2", MAHONEY)
TEXT8 = Published(100_000_000, "md5", "3bea1919949baf155f99411df5fada7e", MAHONEY)
# the author publishes no hash; many projects check the file against this one
SHAKESPEARE = Published(
    1_115_394,
    "sha256",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "the projects that use it",
)
TORCHTEXT = "torchtext.datasets.PennTreebank"
PTB = {  # Mikolov's word files
    "train": ("ptb.train.txt", "f26c4b92c5fdc7b3f8c7cdcb991d8420", 5_101_618),
    "val": ("ptb.valid.txt", "aa0affc06ff7c36e977d7cd49e3839bf", 399_782),
    "test": ("ptb.test.txt", "8b80168b89c18661a38ef683c0dc3721", 449_945),
}


def _one_file(
    name: str, published: Published, sizes: Mapping[str, int]
) -> Callable[[Draft, str], None]:
    """A function that fills a draft with one published file.

    sizes: {split: bytes}, in the order in which the splits stand in the file.
    """

    def fill(draft: Draft, path: str) -> None:
        chunks = chain.from_iterable(item.chunks() for item in items(Place(path, chosen=True)))
        for chunk in published.checked(chunks, path, name):
            draft.append(chunk)
        draft.verified = f"size, and {published.algorithm} as published by {published.by}"
        draft.cut(sizes)

    return fill


def _ptb_char(draft: Draft, path: str) -> None:
    """The Penn Treebank by characters, made from Mikolov's word files; 50 symbols.

    Each line is stripped, a space becomes '_', and the newline stays as the end of the line.
    """
    texts = {}  # by split
    for item in chain.from_iterable(map(items, find(path))):
        # the name of a file in an archive is "archive: folder/file"
        inside = Path(item.name).name.rpartition(" ")[2]
        for split, (name, digest, size) in PTB.items():
            if inside == name:
                published = Published(size, "md5", digest, TORCHTEXT)
                texts[split] = b"".join(published.checked(item.chunks(), path, name))
    for split, (name, *_) in PTB.items():
        if split not in texts:
            raise InputError(f"{path} holds no {name}. Give Mikolov's simple-examples.tgz.")
        for line in texts[split].splitlines():
            draft.append(line.strip().replace(b" ", b"_") + b"\n")
        draft.end_split(split)
    draft.verified = f"sizes, and md5 of the word files as published by {TORCHTEXT}"


NOT_LIBRARY = frozenset(
    (
        *("test", "tests", "idle_test", "site-packages", "dist-packages", "_vendor", "_bundled"),
        *("encodings", "__pycache__"),
    )
)


def _standard_library(draft: Draft, path: str) -> None:
    """The source of the Python standard library on this machine: about 10 MB of real text.

    Tests, vendored packages and the tables of encodings are left out.  A hash of a file's name
    chooses its split, so a file is in the same split on every machine.  The text depends on the
    version of Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    splits: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for source in sorted(root.rglob("*.py")):
        name = source.relative_to(root)
        if NOT_LIBRARY.isdisjoint(name.parts[:-1]) and source.is_file():
            # 1 file in 32 each for val and test: 150 kB or more
            slot = hashlib.sha256(name.as_posix().encode()).digest()[0] % 32
            splits[{0: "val", 1: "test"}.get(slot, "train")].append(source)
    for split, files in splits.items():
        for source in files:
            with source.open("rb") as file:
                draft.add(Item(str(source), file, chosen=False))
        draft.end_split(split)
    # these few files test how Python reads other encodings: no need to warn about them
    draft.left_out.clear()


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
        # split as nanoGPT does: the first int(0.9 N) characters train, the rest val
        _one_file("tinyshakespeare", SHAKESPEARE, {"train": 1_003_854, "val": 111_540}),
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ),
    Known(
        "ptb-char",
        "Penn Treebank by characters, 5.9 MB, 50 symbols",
        _ptb_char,
        "https://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",
    ),
    Known(
        "enwik8",
        "Wikipedia in XML, 100 MB, 205 different bytes; results are per byte",
        _one_file("enwik8", ENWIK8, HUTTER),
        "https://mattmahoney.net/dc/enwik8.zip",
        unit="byte",
    ),
    Known(
        "text8",
        "Wikipedia in lower case, 100 MB, 27 symbols",
        _one_file("text8", TEXT8, HUTTER),
        "https://mattmahoney.net/dc/text8.zip",
    ),
)
KNOWN = {known.name: known for known in _CORPORA}
NAMES = (*KNOWN, *DIAGNOSTICS)
