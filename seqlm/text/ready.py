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

from seqlm.errors import InputError, UsageError
from seqlm.files import refuse_pickle
from seqlm.manifest import conforms, read_sealed
from seqlm.progress import OnProgress, silent
from seqlm.temporary import scratch
from seqlm.text import corpora
from seqlm.text.corpus import AGAIN, DATA, MANIFEST, SCHEMA, is_corpus, newest
from seqlm.text.prepare import as_recorded, encodings_of, prepare
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

    Raises UsageError if the folder has the corpus of other sources, or one that was prepared with
    options of `seqlm prepare`, which would be lost.
    """
    folder = place(sources)
    if not is_corpus(folder):
        warnings = prepare(sources, tick=on_progress)[2]
        what = join(sources) if sources else f"the built-in corpus, {corpora.BUILT_IN},"
        return Ready(folder, [f"Prepared {what} into {folder}."], warnings)
    with _readable_twice(sources) as texts:
        if _is_current(folder, texts, on_progress):
            return Ready(folder, [], [])
        _refuse_to_replace(sources, folder)
        warnings = prepare(texts, force=True, named=sources, tick=on_progress)[2]
    what = "the text of standard input" if "-" in sources else join(sources)
    changed = (
        f"{folder} was prepared again, because {what} has changed. Runs that were trained "
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


def _is_name(source: Any) -> bool:
    return isinstance(source, str) and source.isprintable()


def _refuse_to_replace(sources: Sequence[str], folder: Path) -> None:
    """Raises UsageError unless the corpus was prepared from the sources, and without options."""
    manifest = read_sealed(folder / MANIFEST, SCHEMA)
    recorded = manifest.get("sources", [])  # an older version has written none
    if not conforms(recorded, list) or not all(map(_is_name, recorded)):
        raise InputError(f"{folder / MANIFEST} is damaged: its sources are no paths. {AGAIN}")
    given = as_recorded(sources)
    if list(map(os.path.abspath, recorded)) != list(map(os.path.abspath, given)):
        of = join(recorded) if recorded else "another text"
        raise UsageError(
            f"{folder} was prepared from {of}, not from {join(sources)}. Name {folder} to train on "
            "it, or prepare this text into a folder of its own: seqlm prepare "
            f"{join(sources)} --out {DATA / 'NAME'}"
        )
    if options := _options(manifest):
        flags = [part for option in options.items() for part in option]
        again = join(["seqlm", "prepare", *sources, *flags, "--force"])
        raise UsageError(
            f"{join(sources)} has changed since {folder} was prepared with options, which training "
            f"does not take. Prepare the corpus again: {again}"
        )
