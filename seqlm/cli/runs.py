"""seqlm runs: the runs as a lab book."""

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer

from seqlm.cli._app import command
from seqlm.cli._complete import one_of
from seqlm.cli._complete import runs as names_of_runs
from seqlm.cli._flags import argument, flag, switch
from seqlm.errors import UsageError, unknown
from seqlm.ui import Screen, duration, plain

LISTING = "List"  # a panel of --help
HEADINGS = {  # {column of the table: field of --json}
    "run": "run",
    "cell": "cell",
    "params": "params",
    "corpus": "corpus",
    "steps": "steps",
    "time": "seconds",
    "bits": "val_bits_per_char",
    "protocol": "protocol",
    "chars/s": "chars_per_second",
    "when": "saved_at",
    "note": "note",
}
# the columns that a narrow terminal does without, the first one first
SPARED = ("params", "when", "chars/s", "corpus", "time", "protocol", "steps", "note")
ACTIONS = {"diff": "A B", "note": "RUN TEXT", "remove": "RUN"}


def _offered(incomplete: str) -> list[str]:
    """What the shell offers: the actions, and names of runs."""
    return one_of(*ACTIONS)(incomplete) + names_of_runs(incomplete)


@command(
    "runs",
    "seqlm runs --sort bits --filter cell=lem",
    "seqlm runs diff poems-lem poems-mingru",
    "seqlm runs note poems-lem 'the first one that rhymes'",
    "seqlm runs remove poems-lem",
)
def runs(
    screen: Screen,
    words: Annotated[
        list[str] | None,
        argument(
            "diff A B, note RUN TEXT or remove RUN. Default: list the runs.", "ACTION", _offered
        ),
    ] = None,
    sort: Annotated[
        str | None,
        flag("Column to sort by, the smallest first. Default: run.", LISTING, "COLUMN"),
    ] = None,
    filter: Annotated[
        list[str] | None,
        flag(
            "Only runs with this value in the column; * stands for any text.",
            LISTING,
            "COLUMN=VALUE",
        ),
    ] = None,
    tsv: Annotated[
        bool, switch("Print all fields of --json, separated by tabs.", LISTING, "--tsv")
    ] = False,
    yes: Annotated[bool, switch("Remove without asking.", "Remove", "--yes", "-y")] = False,
) -> None:
    """List the runs in checkpoints/ with their figures; compare two, add a note, or remove one."""
    action, *names = words or ["list"]
    if action != "list" and (sort or filter or tsv):
        raise UsageError("--sort, --filter and --tsv are of the list. Remove them.")
    if action != "remove" and yes:
        raise UsageError("--yes has an effect only with remove. Remove it.")
    if action == "list" and not names:
        _list(screen, sort, filter or [], tsv)
        return
    if action not in ACTIONS:
        raise unknown("action of runs", action, ACTIONS)
    if len(names) != len(ACTIONS[action].split()):
        raise UsageError(f"Write it as: seqlm runs {action} {ACTIONS[action]}")

    from seqlm.store import runs as all_runs

    run = all_runs.find(names[0], f"seqlm runs {action}")
    if action == "diff":
        _diff(screen, run, all_runs.find(names[1], "seqlm runs diff"))
    elif action == "note":
        _note(screen, run, names[1])
    else:
        _remove(screen, run, yes)


def _list(screen: Screen, sort: str | None, filters: Sequence[str], tsv: bool) -> None:
    if tsv and screen.json:
        raise UsageError("Both --tsv and --json are given. Keep one of them.")

    from seqlm.store import book

    key = None if sort is None else _field("--sort", sort)
    wanted = [_condition(text) for text in filters]
    found, warnings = book.entries()
    screen.warn(*warnings)
    listed = [one for one in found if all(_fits(one, f, value) for f, value in wanted)]
    if key is not None:  # a run without the figure comes last
        listed.sort(key=lambda one: (one[key] is None, one[key]))
    if tsv:
        fields = [*(listed or [dict.fromkeys(HEADINGS.values())])[0]]
        screen.table([fields, *([one[f] for f in fields] for one in listed)], tabs=True)
        return
    names = "\n".join(one["run"] for one in listed)
    rows = [[*HEADINGS], *(_row(one) for one in listed)]
    screen.product({"runs": listed, "names": names}, "names", rows, SPARED)
    if not found:
        screen.hint("seqlm train")
    elif not listed:
        screen.note(f"None of the {len(found):,} runs fits {' and '.join(filters)}.")


def _field(option: str, name: str) -> str:
    """The field of --json that a column has, by its heading or by the field's own name."""
    known = {**HEADINGS, **{field: field for field in HEADINGS.values()}}
    if name not in known:
        raise unknown(f"column of {option}", name, HEADINGS)
    return known[name]


def _condition(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--filter {text}: write it as COLUMN=VALUE, such as --filter cell=lem.")
    return _field("--filter", name), value


def _fits(one: Mapping[str, Any], field: str, pattern: str) -> bool:
    """Whether the field's value fits, as --json has it or as the table shows it."""
    shown = plain(_shown(one)[field])
    return fnmatchcase(_text(one[field]), pattern) or fnmatchcase(shown, pattern)


def _text(value: Any) -> str:
    """A value as --json shows it."""
    return str(value) if isinstance(value, float) else plain(value)


def _shown(one: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a run, with the values of the table in place of those of --json."""
    speed = one["chars_per_second"]
    per_byte = one["val_bits_per_char"] is None and one["val_bits_per_byte"] is not None
    return {
        **one,
        "run": Path(one["run"]).name,
        "seconds": duration(one["seconds"]),
        "val_bits_per_char": one["val_bits_per_byte" if per_byte else "val_bits_per_char"],
        "protocol": one["protocol"] + (", per byte" if per_byte else ""),
        "chars_per_second": None if speed is None else round(speed),
        "saved_at": f"{datetime.fromisoformat(one['saved_at']):%Y-%m-%d %H:%M}",
    }


def _row(one: Mapping[str, Any]) -> list[Any]:
    shown = _shown(one)
    return [shown[field] for field in HEADINGS.values()]


def _diff(screen: Screen, first: Path, second: Path) -> None:
    from seqlm.store import book

    result, warnings = book.difference(first, second)
    screen.warn(*warnings)
    rows = [["field", *result["runs"]]]
    # not rounded, so that two small learning rates differ
    rows += [[key, *map(_text, pair)] for key, pair in result["settings"].items()]
    rows += [[name, *pair] for name, pair in result["figures"].items()]
    screen.product({**result, "differing": "\n".join(result["settings"])}, "differing", rows)


def _note(screen: Screen, run: Path, text: str) -> None:
    from seqlm.store import book

    book.write_note(run, text)
    result = {"run": str(run), "note": book.read_note(run)}
    screen.product(result, "note", [["run", "note"], [*result.values()]])


def _remove(screen: Screen, run: Path, yes: bool) -> None:
    from seqlm.store import runs as all_runs

    if not yes:
        if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError(f"Removing {run} cannot be undone. Add --yes to remove it.")
        steps = len(all_runs.steps(run))
        question = f"Remove {run} with its {steps} saved steps? This cannot be undone."
        if not typer.confirm(question, err=True):
            screen.note("Nothing was removed.")
            raise typer.Exit(1)
    left = all_runs.remove(run)
    result = {"run": str(run), "left": left}
    screen.product(result, "run", [["removed"], [str(run)]])
    if left:
        screen.warn(f"{run} still has files that are not of the run: {', '.join(left)}.")
