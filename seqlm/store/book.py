"""The lab book: the figures of every run in a moment, and the difference between two runs.

Nothing is hashed, and no tensor is read: `seqlm check` does that.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

from seqlm.errors import InputError, UsageError
from seqlm.files import is_utf8, read_small
from seqlm.store import checkpoint, runs
from seqlm.temporary import write_file

LONGEST_NOTE = 1000  # characters
# the fields of `entry` in which two runs are compared
FIGURES = (
    *("params", "steps", "seconds", "chars_per_second", "val_bits_per_char", "val_bits_per_byte"),
    *("protocol", "best_step", "finished", "saved_at", "note"),
)
RunFigures = dict[str, Any]


def entry(run: Path) -> tuple[RunFigures, list[str]]:
    """The figures of a run at its last saved step, and warnings about damaged files.

    Raises InputError if no step can be read.
    """
    warnings: list[str] = []
    folder = runs.target(run / runs.LAST)
    try:
        step = checkpoint.glance(folder or run)
    except InputError:  # `load` finds the newest step that is whole, and says what is wrong
        saved, warnings = runs.load(run, runs.LAST)
        folder, step = saved.folder, checkpoint.glance(saved.folder)
    try:
        note = read_note(run)
    except InputError as error:
        note, warnings = "", [*warnings, str(error)]
    assert folder is not None, "a step was read from it"
    progress = step.progress
    return {
        "run": str(run),
        "cell": step.cell,
        "params": step.params,
        "corpus": Path(step.data).name,
        "data": step.data,
        "steps": progress.step,
        "seconds": progress.elapsed,
        "val_bits_per_char": progress.best_bits_per_char,
        "val_bits_per_byte": progress.best_bits_per_byte,
        "protocol": step.protocol,
        "chars_per_second": progress.chars / progress.elapsed if progress.elapsed else None,
        "finished": progress.finished,
        "best_step": progress.best_step,
        "saved_at": _time(folder.stat().st_mtime),
        "note": note,
    }, warnings


def _time(seconds: float) -> str:
    """Seconds since 1970 as local time, such as 2026-05-01T09:30:00+02:00."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def entries() -> tuple[list[RunFigures], list[str]]:
    """The figures of all runs in checkpoints/, and warnings; a damaged run is left out."""
    found, warnings = [], []
    for path in runs.existing():
        try:
            one, messages = entry(path)
        except InputError as error:
            warnings.append(str(error))
        else:
            found.append(one)
            warnings += messages
    return found, warnings


def difference(first: Path, second: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings in which two runs differ, and the figures of both; and warnings.

    Settings are those of the configuration, and under environment.* what the last step was computed
    with.
    """
    settings, figures, warnings = [], [], []
    for run in (first, second):
        saved, messages = runs.load(run, runs.LAST)
        surroundings = {f"environment.{key}": value for key, value in saved.environment.items()}
        settings.append({**saved.config.flat(), **surroundings})
        figures.append(entry(run)[0])
        warnings += messages
    pairs = {key: [one.get(key) for one in settings] for key in {**settings[0], **settings[1]}}
    return {
        "runs": [str(first), str(second)],
        "settings": {key: pair for key, pair in pairs.items() if pair[0] != pair[1]},
        "figures": {name: [one[name] for one in figures] for name in FIGURES},
    }, warnings


def read_note(run: Path) -> str:
    """The note of a run on one line; "" if it has none."""
    path = run / runs.NOTE
    if not path.exists():
        return ""
    return _on_one_line(read_small(path).decode("utf-8", "replace"))[:LONGEST_NOTE]


def write_note(run: Path, text: str) -> None:
    """Replace the note of a run; an empty text deletes it."""
    text = checked_note(text)
    if text:
        write_file(run / runs.NOTE, f"{text}\n")
    else:
        (run / runs.NOTE).unlink(missing_ok=True)


def checked_note(text: str) -> str:
    """The note on one line; UsageError if it cannot be kept."""
    text = _on_one_line(text)
    if len(text) > LONGEST_NOTE or not is_utf8(text):
        raise UsageError(
            f"The note has {len(text):,} characters; it may have {LONGEST_NOTE:,}, in UTF-8. "
            "Shorten it."
        )
    return text


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
