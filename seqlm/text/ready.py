"""The corpus for a training.  If the user names a text, it is prepared here.

A text is prepared again only if it has changed: the manifest of its corpus has the text's hash.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from shlex import join
from typing import Any, NamedTuple

from seqlm.errors import UsageError
from seqlm.files import refuse_pickle
from seqlm.manifest import read_sealed
from seqlm.progress import OnProgress, silent
from seqlm.temporary import scratch
from seqlm.text import corpora
from seqlm.text.corpus import DATA, MANIFEST, SCHEMA, is_corpus, newest
from seqlm.text.prepare import encodings_of, prepare
from seqlm.text.sources import folder_name, standard_input
from seqlm.text.staging import Draft


def place(sources: Sequence[str]) -> Path:
    """The folder of the corpus that the sources name; it may not be prepared yet.

    A single source may be a prepared corpus: a path, or a name in data/.  Any other source is a
    known corpus or text.  Without sources it is the newest corpus, or else the built-in one.
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
    """A prepared corpus, with messages for the user about its preparation."""

    folder: Path
    notes: list[str]
    warnings: list[str]


def ready(sources: Sequence[str], on_progress: OnProgress = silent) -> Ready:
    """Prepare the corpus that the sources name, if it is new or if its text has changed.

    Raises UsageError if the text has changed and the corpus was prepared with options of `seqlm
    prepare`: preparing it here would lose them.
    """
    folder = place(sources)
    if not is_corpus(folder):
        warnings = prepare(sources, tick=on_progress)[2]
        what = join(sources) if sources else f"the built-in corpus, {corpora.BUILT_IN},"
        return Ready(folder, [f"Prepared {what} into {folder}."], warnings)
    with _readable_twice(sources) as texts:
        if _is_current(folder, texts, on_progress):
            return Ready(folder, [], [])
        _refuse_to_lose_options(sources, folder)
        warnings = prepare(texts, force=True, tick=on_progress)[2]
    changed = (
        f"{folder} was prepared again, because {join(sources)} has changed. Runs that were trained "
        "on the old text can still generate, but cannot be evaluated on the old text."
    )
    return Ready(folder, [], [changed, *warnings])


def as_prepared(sources: Sequence[str], on_progress: OnProgress = silent) -> Path:
    """The folder of the corpus that the sources name.

    Raises UsageError if it is not prepared, or was prepared from another text.
    """
    folder = place(sources)
    if is_corpus(folder):
        with _readable_twice(sources) as texts:
            if _is_current(folder, texts, on_progress):
                return folder
    raise UsageError(
        f"No prepared corpus holds the text {join(sources)}, and a run cannot change its corpus. "
        "Name no text to continue the run, or train a new run on this text with --run NAME."
    )


def _is_text(sources: Sequence[str], folder: Path) -> bool:
    """Whether the sources are the user's text, rather than a name of the corpus in the folder."""
    if len(sources) != 1:
        return bool(sources)
    (source,) = sources
    if Path(source) == folder or corpora.by_name(source) is not None:
        return False
    return source == "-" or os.path.exists(source) or not is_corpus(DATA / source)


@contextmanager
def _readable_twice(sources: Sequence[str]) -> Iterator[list[str]]:
    """The sources, with a temporary file in place of standard input, to be read several times."""
    if "-" not in sources:
        yield list(sources)
        return
    with scratch() as aside:
        copy = aside / folder_name("-")
        with copy.open("wb") as file:
            shutil.copyfileobj(standard_input(), file)
        yield [str(copy) if source == "-" else source for source in sources]


def _is_current(folder: Path, sources: Sequence[str], on_progress: OnProgress) -> bool:
    """Whether the corpus was prepared from what the text of the sources is now."""
    if not _is_text(sources, folder):
        return True
    manifest = read_sealed(folder / MANIFEST, SCHEMA)
    documents = str(manifest.get("documents"))
    encodings = encodings_of(str(manifest.get("unit")), _options(manifest).get("--encoding"))
    # only the hash is needed, so the text itself is not kept
    with closing(Draft(Path(os.devnull), documents, encodings)) as draft:
        corpora.choose(sources, documents=documents).fill(draft, on_progress)
        return draft.sha256 == manifest.get("text_sha256")


def _options(manifest: Mapping[str, Any]) -> dict[str, str]:
    options = manifest.get("options")
    return options if isinstance(options, dict) else {}


def _refuse_to_lose_options(sources: Sequence[str], folder: Path) -> None:
    manifest = read_sealed(folder / MANIFEST, SCHEMA)
    options = _options(manifest)
    if not options and manifest.get("text_sha256"):
        # there are no options, but the source may be a folder that only has the name of the corpus
        if len(sources) > 1 or not os.path.isdir(sources[0]) or os.sep in sources[0]:
            return
        raise UsageError(
            f"The folder {sources[0]} does not hold the text of the corpus {folder}. Name {folder} "
            f"to train on the corpus, or ./{sources[0]} to prepare the folder."
        )
    flags = [part for option in options.items() for part in option]
    again = join(["seqlm", "prepare", *sources, *flags, "--force"])
    raise UsageError(
        f"{join(sources)} has changed since {folder} was prepared with options, which training "
        f"does not take. Prepare the corpus again: {again}"
    )
