"""The files of a run with a line for each step: its figures, its times and its samples."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from seqlm.errors import InputError
from seqlm.files import cannot_write
from seqlm.manifest import conforms
from seqlm.temporary import write_lines

METRICS, TIMING, SAMPLES = FILES = ("metrics.jsonl", "timing.jsonl", "samples.jsonl")
LONGEST_LINE = 1 << 16  # bytes


def append(run: Path, lines: Mapping[str, Mapping[str, Any]]) -> None:
    """Add a line to each of these files of the run.  lines: {name of one of FILES: object}.

    Times have a file of their own, so that the others are the same whenever a run is repeated.
    """
    for name, row in lines.items():
        try:
            with (run / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise cannot_write(run / name, error) from error


def cut(run: Path, step: int) -> None:
    """Remove the lines after a step."""
    for name in FILES:
        if (run / name).is_file():
            with (run / name).open("rb") as file:
                rows = iter(lambda: file.readline(LONGEST_LINE), b"")
                write_lines(run / name, (row for row in rows if _step_of(row) <= step))


def read(run: Path) -> list[dict[str, float]]:
    """The figures of each step: its line of metrics.jsonl, and its seconds from timing.jsonl.

    A step has no entry for a figure that was not finite or not measured.  Raises InputError if
    metrics.jsonl is missing, and for a line that is not an object of numbers.
    """
    rows = list(_figures(run / METRICS))
    timing = _figures(run / TIMING) if os.path.lexists(run / TIMING) else ()
    seconds = {row.get("step"): row for row in timing}
    return [seconds.get(row.get("step"), {}) | row for row in rows]


def refuse_missing(run: Path, step: int) -> None:
    """Raises InputError if metrics.jsonl lacks the line of a step up to this one."""
    lines = {row.get("step") for row in read(run)}
    missing = [number for number in range(1, step + 1) if number not in lines]
    if missing:
        raise InputError(
            f"{run / METRICS} was cut or changed: it lacks {len(missing):,} of {step:,} steps, the "
            f"first of them step {missing[0]:,}. Curves and reports lack them, too. Restore it "
            "from a backup."
        )


def samples(run: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl, oldest first; none if the file is missing.

    Raises InputError for a line that is no sample.
    """
    path, found = run / SAMPLES, []
    types = {"step": int, "temperature": int | float, "seed": int, "text": str}
    for number, row in _objects(path, "a sample") if path.is_file() else ():
        if not conforms(row, types):
            raise _no_line(path, number, "a sample")
        found.append(row)
    return found


def _figures(path: Path) -> Iterator[dict[str, float]]:
    """The objects of a file of figures, without what was not finite or not measured."""
    if not path.is_file():
        raise InputError(f"{path} is missing, so the run has no curves. Restore it from a backup.")
    for number, row in _objects(path, "an object of numbers"):
        try:
            values = {key: float(value) for key, value in row.items() if value is not None}
        except (ValueError, TypeError, OverflowError) as error:
            raise _no_line(path, number, "an object of numbers") from error
        yield {key: value for key, value in values.items() if math.isfinite(value)}


def _objects(path: Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, object) of the whole lines of a file; InputError for any other line.

    A last line that a kill cut short is left out.  what: what a line should be.
    """
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield number, row
            elif line.endswith(b"\n"):
                raise _no_line(path, number, what)


def _no_line(path: Path, number: int, what: str) -> InputError:
    return InputError(f"{path}, line {number}: not {what}. Restore the file from a backup.")


def _step_of(row: bytes) -> float:
    """The step of a line; infinity for a damaged line, such as one that a kill cut short."""
    if not row.endswith(b"\n"):
        return math.inf
    try:
        step = json.loads(row)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf
