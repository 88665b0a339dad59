"""The corpus that a training names: one that is prepared, or text that is prepared now.

A text is prepared once: its hash in the manifest tells whether it is still the same.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import join
from typing import Any, NamedTuple

from seqlm.errors import UsageError
from seqlm.files import refuse_pickle
from seqlm.manifest import read_sealed
from seqlm.progress import OnProgress, silent
from seqlm.text import corpora
from seqlm.text.corpus import DATA, MANIFEST, SCHEMA, is_corpus, newest
from seqlm.text.prepare import encodings_of, prepare
from seqlm.text.sources import folder_name, standard_input
from seqlm.text.staging import Draft


def place(sources: Sequence[str]) -> Path:
    """The folder of the corpus that the sources name, which may have to be prepared.

    A single source may be a prepared corpus: a path, or a name in data/.  Any other source is a
    known corpus or text.  No source: the corpus prepared last, or else the built-in one.
    """
    if not sources:
        return newest() or DATA / corpora.BUILT_IN
    if len(sources) == 1:
        for folder in (Path(sources[0]), DATA / sources[0]):
            if is_corpus(folder):
                return folder
        refuse_pickle(sources[0])
    return DATA / corpora.choose(sources).name


class Ready(NamedTuple):
    """A corpus that is prepared, and what to say about how it was."""

    folder: Path
    notes: list[str]
    warnings: list[str]


def ready(sources: Sequence[str], on_progress: OnProgress = silent) -> Ready:
    """The corpus that the sources name, prepared now if it is not, or if its text has changed.

    Raises UsageError where the text has changed and options of `seqlm prepare` would be lost.
    """
    folder = place(sources)
    if not is_corpus(folder):
        warnings = prepare(sources, tick=on_progress)[2]
        what = join(sources) if sources else f"the built-in corpus, {corpora.BUILT_IN},"
        return Ready(folder, [f"Prepared {what} into {folder}."], warnings)
    if not _is_text(sources, folder):
        return Ready(folder, [], [])
    with _readable_twice(sources) as texts:
        manifest = read_sealed(folder / MANIFEST, SCHEMA)
        if _is_same_text(texts, manifest, on_progress):
            return Ready(folder, [], [])
        _refuse_to_lose_options(sources, folder, manifest)
        warnings = prepare(texts, force=True, tick=on_progress)[2]
    changed = (
        f"{join(sources)} is not the text that {folder} was prepared from: prepared it anew. Runs "
        "on the old text can still generate, but not be evaluated on it."
    )
    return Ready(folder, [], [changed, *warnings])


def as_prepared(sources: Sequence[str], on_progress: OnProgress = silent) -> Path:
    """The folder of the corpus that the sources name; UsageError where it is not prepared, or was
    prepared from another text."""
    folder = place(sources)
    if is_corpus(folder) and not _is_text(sources, folder):
        return folder
    if is_corpus(folder):
        with _readable_twice(sources) as texts:
            if _is_same_text(texts, read_sealed(folder / MANIFEST, SCHEMA), on_progress):
                return folder
    raise UsageError(
        f"{join(sources)} is not the text that a prepared corpus holds, and a run keeps its "
        "corpus. Name no text to continue the run, or train another run on it with --run NAME."
    )


def _is_text(sources: Sequence[str], folder: Path) -> bool:
    """Whether the sources are the user's text, and not a name of the corpus in the folder."""
    if len(sources) != 1:
        return bool(sources)
    (source,) = sources
    if Path(source) == folder or corpora.by_name(source) is not None:
        return False
    return source == "-" or os.path.exists(source) or not is_corpus(DATA / source)


@contextmanager
def _readable_twice(sources: Sequence[str]) -> Iterator[list[str]]:
    """The sources, with a file in the place of standard input, which can be read only once."""
    if "-" not in sources:
        yield list(sources)
        return
    with tempfile.TemporaryDirectory() as aside:
        copy = Path(aside) / folder_name("-")
        with copy.open("wb") as file:
            shutil.copyfileobj(standard_input(), file)
        yield [str(copy) if source == "-" else source for source in sources]


def _is_same_text(
    sources: Sequence[str], manifest: Mapping[str, Any], on_progress: OnProgress
) -> bool:
    """Whether the corpus was prepared from what the sources hold now."""
    options = _options(manifest)
    documents = str(manifest.get("documents"))
    encodings = encodings_of(str(manifest.get("unit")), options.get("--encoding"))
    with tempfile.TemporaryDirectory() as aside:
        draft = Draft(Path(aside) / "draft", documents, encodings)
        try:
            corpora.choose(sources, documents=documents).fill(draft, on_progress)
            return draft.sha256() == manifest.get("text_sha256")
        finally:
            draft.close()


def _options(manifest: Mapping[str, Any]) -> dict[str, str]:
    options = manifest.get("options")
    return options if isinstance(options, dict) else {}


def _refuse_to_lose_options(
    sources: Sequence[str], folder: Path, manifest: Mapping[str, Any]
) -> None:
    options = _options(manifest)
    if not options and manifest.get("text_sha256"):
        if len(sources) > 1 or not os.path.isdir(sources[0]) or os.sep in sources[0]:
            return
        raise UsageError(
            f"The folder {sources[0]} does not hold the text of {folder}. To train on the corpus: "
            f"{folder}. To prepare the folder anew: ./{sources[0]}"
        )
    flags = [part for option in options.items() for part in option]
    again = join(["seqlm", "prepare", *sources, *flags, "--force"])
    raise UsageError(
        f"{join(sources)} is not the text that {folder} was prepared from, and it was prepared in "
        f"another way than training would. Prepare it anew: {again}"
    )
