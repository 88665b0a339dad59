"""A prepared corpus on disk: its format, and reading it as memory-mapped symbols.

    data/<corpus>/  manifest.json  tokenizer.json  train.bin  val.bin  test.bin
                    train.ends  val.ends  test.ends       where documents end, if there are any

A token file holds the symbols of a split, little-endian, in the narrowest unsigned type that fits.
A file of ends holds the number of symbols up to the end of each document, little-endian, 64 bits.
"""

# N symbols of a split

import hashlib
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from seqlm.errors import InputError, NotFound, UsageError
from seqlm.files import names_in, refuse_pickle, to_json
from seqlm.manifest import changed, conforms, read_sealed, refuse_changed
from seqlm.temporary import bring_all_back, bring_back
from seqlm.text.splits import SPLITS
from seqlm.text.tokenizer import LARGEST_TOKENIZER, TOKENIZER_FILE, Tokenizer, load_tokenizer

DATA = Path("data")
MANIFEST = "manifest.json"
CORPUS_FILES = (
    *(MANIFEST, TOKENIZER_FILE),
    *(f"{split}.{ending}" for split in SPLITS for ending in ("bin", "ends")),
)
SCHEMA = 2
HASHED_AT_ONCE = 1 << 24  # bytes
END_TYPE = "<i8"
CHARACTERS = ("code points", "bytes")  # what counts as a character
AGAIN = "Prepare the corpus again: seqlm prepare SOURCE --force"
COUNTS = {
    "chars": int | None,
    "bytes": int,
    "tokens": int,
    "documents": int | None,
    "sha256": str,
}


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, verified when it is opened.

    Its files stay mapped into memory, so it stays readable when `prepare --force` replaces it.
    """

    path: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    maps: dict[str, mmap.mmap] = field(default_factory=dict, repr=False)  # by the name of the file

    @property
    def label(self) -> str:
        """The corpus' name in printed results."""
        return self.manifest["label"]

    @property
    def fingerprint(self) -> str:
        """A hash of the symbols, the tokenizer and what counts as a character.

        The same text has it again when it is prepared from another place or with other options
        that do not change the splits.
        """
        content = {key: self.manifest[key] for key in ("characters", "files")}
        return hashlib.sha256(to_json(content).encode()).hexdigest()

    def has(self, fingerprint: str) -> bool:
        """Whether a run with this fingerprint was trained on the corpus.

        Older runs recorded the fingerprint of the manifest.
        """
        return fingerprint in (self.fingerprint, self.manifest["fingerprint"])

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """{split: counts and hashes}, as in the manifest."""
        return self.manifest["splits"]

    def chars_per_symbol(self, split: str) -> float:
        """The mean length of a symbol of the split in characters; 1 for bytes that are no text."""
        counts = self.splits[split]
        return (counts["chars"] or counts["tokens"]) / counts["tokens"]

    def symbols(self, split: str) -> np.ndarray:
        """The split's N symbols, memory-mapped; UsageError for a split the corpus does not have."""
        if split not in self.splits:
            raise UsageError(
                f"{self.path} has no {split} split. Choose one of: {', '.join(self.splits)}."
            )
        return np.frombuffer(self.maps[f"{split}.bin"], dtype=self.manifest["dtype"])

    def ends(self, split: str) -> np.ndarray | None:
        """The offset at which each document of the split ends, memory-mapped; None if the text is
        one stream."""
        if self.tokenizer.end is None:
            return None
        ends = np.frombuffer(self.maps[f"{split}.ends"], dtype=END_TYPE)
        if (np.diff(ends, prepend=0) < 1).any() or ends[-1] != self.splits[split]["tokens"]:
            raise InputError(f"{self.path / split}.ends is damaged: it is out of order. {AGAIN}")
        return ends

    def answers(self, split: str) -> np.ndarray | None:
        """The offset of the answer in each document of the split; None if the whole text counts."""
        return self.tokenizer.answers(self.symbols(split), self.ends(split))

    def verify(self, split: str) -> None:
        """Raises InputError if a byte of the split has changed, or a symbol is not in the
        vocabulary."""
        for name in _sizes(self, split):
            listed, digest = self.manifest["files"][name], hashlib.sha256()
            for start in range(0, len(self.maps[name]), HASHED_AT_ONCE):
                self.refuse_cut(split)
                digest.update(self.maps[name][start : start + HASHED_AT_ONCE])
            if digest.hexdigest() != listed.get("sha256"):
                raise changed(self.path / name, AGAIN)
        self.refuse_unknown(split, self.symbols(split))

    def refuse_cut(self, split: str) -> None:
        """Raises InputError if a file of the split has become smaller or larger.

        The system kills a process that reads a part that a mapped file has lost (SIGBUS).
        """
        for name, size in _sizes(self, split).items():
            if self.maps[name].size() != size:
                raise changed(self.path / name, AGAIN)

    def refuse_unknown(self, split: str, symbols: np.ndarray) -> None:
        """Raises InputError for a symbol of the split that the vocabulary does not have."""
        if symbols.max() >= self.tokenizer.vocab_size:
            raise InputError(
                f"{self.path / split}.bin holds symbol {symbols.max()}, and the vocabulary has "
                f"{self.tokenizer.vocab_size}: it is damaged. {AGAIN}"
            )


def open_corpus(path: Path) -> Corpus:
    """The corpus in the folder; InputError for a file that is missing, cut or changed.

    It is equally quick for every size: only some places of large files are hashed here, and
    `Corpus.verify` hashes all of them.  While `prepare --force` replaces the corpus, this returns
    either the old corpus or the new one.
    """
    while True:
        before = _identity(path)
        try:
            corpus = _open(path)
        except InputError:
            bring_back(path)
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return corpus


def _identity(folder: Path) -> tuple[int, int] | None:
    """The folder's inode and the time of its last change; None if there is no folder."""
    try:
        info = folder.stat()
    except OSError:
        return None
    return info.st_ino, info.st_ctime_ns  # a new folder may get the inode of a deleted one


def _open(path: Path) -> Corpus:
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path} is not a prepared corpus. Make one: seqlm prepare SOURCE")
    manifest = read_sealed(path / MANIFEST, SCHEMA)
    files = manifest.get("files")
    refuse_changed(path, files, {TOKENIZER_FILE: LARGEST_TOKENIZER}, "spot_sha256", AGAIN)
    corpus = Corpus(path, manifest, load_tokenizer(path))
    fault = _fault(corpus)
    if fault:
        raise InputError(f"{path / MANIFEST} is damaged: {fault}. {AGAIN}")
    assert isinstance(files, dict), "refuse_changed found the tokenizer in it"
    for split in corpus.splits:
        sizes = _sizes(corpus, split)
        refuse_changed(path, files, sizes, "spot_sha256", AGAIN)
        for name, size in sizes.items():
            if files[name]["bytes"] != size:
                raise InputError(f"{path / name} is damaged: its size is not {size:,}. {AGAIN}")
            corpus.maps[name] = _mapped(path / name)
    return corpus


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty now
        raise InputError(f"Cannot read {path}: {error}. {AGAIN}") from error


def _sizes(corpus: Corpus, split: str) -> dict[str, int]:
    """{name: size in bytes} of the files of a split."""
    counts = corpus.splits[split]
    sizes = {f"{split}.bin": counts["tokens"] * np.dtype(corpus.manifest["dtype"]).itemsize}
    if corpus.tokenizer.end is not None:
        sizes[f"{split}.ends"] = counts["documents"] * np.dtype(END_TYPE).itemsize
    return sizes


def _fault(corpus: Corpus) -> str | None:
    """What is wrong with the manifest; None if it is correct."""
    manifest, tokenizer = corpus.manifest, corpus.tokenizer
    shape = {"label": str, "characters": str, "splits": {}, "card": {"xz_bits_per_char": float}}
    if not conforms(manifest, shape) or not manifest["label"].isprintable():
        return "it is not the manifest of a corpus"
    if manifest["characters"] not in CHARACTERS:
        return f"its characters are not {' or '.join(CHARACTERS)}"
    if not {"train", "val"} <= corpus.splits.keys() <= set(SPLITS):
        return "its splits are not train, val and test"
    if manifest.get("dtype") != narrowest(tokenizer.vocab_size):
        return "its symbols are not those of the tokenizer"
    needed = ["bytes", "tokens"] + ([] if tokenizer.end is None else ["documents"])
    for split, counts in corpus.splits.items():
        if not conforms(counts, COUNTS) or not all(counts[name] for name in needed):
            return f"its counts of {split} are impossible"
    return None


def narrowest(vocab_size: int) -> str:
    """The little-endian numpy type that holds the symbols 0 .. vocab_size - 1."""
    return np.min_scalar_type(vocab_size - 1).newbyteorder("<").str


def prepared() -> list[Path]:
    """The corpora under data/."""
    bring_all_back(DATA)
    return sorted(path.parent for path in DATA.glob(f"[!.]*/{MANIFEST}"))


def recorded_corpus(path: str, fingerprint: str) -> Corpus:
    """The corpus with which a run was trained: at its old path, or moved to another name in data/.

    If it is at neither place, but another corpus is at the path, returns that one; the caller
    compares fingerprints.  Raises NotFound if there is no corpus.
    """
    corpus = open_corpus(Path(path)) if _is_there(Path(path)) else None
    if corpus is None or not corpus.has(fingerprint):
        corpus = moved_corpus(fingerprint) or corpus
    if corpus is None:
        raise NotFound(
            f"The run's corpus {path} does not exist, and {DATA}/ has no copy. Prepare it again, "
            "or give its folder with --data DIR."
        )
    return corpus


def moved_corpus(fingerprint: str) -> Corpus | None:
    """The corpus under data/ that has the fingerprint, if there is one."""
    for folder in prepared():
        with suppress(InputError):  # a damaged corpus is not the one that is looked for
            corpus = open_corpus(folder)
            if corpus.has(fingerprint):
                return corpus
    return None


def is_corpus(path: Path) -> bool:
    """Whether the path is a folder with a corpus; InputError if it cannot be read."""
    return _is_there(path) and MANIFEST in names_in(path)


def newest() -> Path | None:
    """The corpus that was prepared last; None if there is none."""
    return max(prepared(), key=_prepared_at, default=None)


def find_corpus(name: str) -> Path:
    """The folder that --data names: a path, or a name under data/."""
    for path in (Path(name), DATA / name):
        if is_corpus(path):
            return path
    refuse_pickle(name)
    raise InputError(
        f"--data {name}: neither {name} nor {DATA / name} is a prepared corpus. "
        "Make one: seqlm prepare SOURCE"
    )


def _is_there(path: Path) -> bool:
    """Whether the folder exists, after restoring it if a process was killed while replacing it."""
    if not os.path.isdir(path):
        bring_back(path)
    return os.path.isdir(path)


def _prepared_at(path: Path) -> int:
    """When the corpus was written, in ns; 0 if it was just deleted."""
    with suppress(FileNotFoundError):
        return (path / MANIFEST).stat().st_mtime_ns
    return 0
