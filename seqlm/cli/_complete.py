"""Completions that the shell offers while a command is typed.  Imports no torch."""

from collections.abc import Callable, Iterable
from glob import escape, glob
from pathlib import Path

import typer

Completer = Callable[..., list[str]]  # called with what is typed, and perhaps with the context


def _starting(names: Iterable[str], typed: str) -> list[str]:
    return [name for name in names if name.startswith(typed)]


def one_of(*names: str) -> Completer:
    return lambda incomplete: _starting(names, incomplete)


def files(incomplete: str) -> list[str]:
    """Files and folders whose paths begin so; folders end in a slash."""
    found = sorted(glob(f"{escape(incomplete)}*"))
    return [f"{path}/" if Path(path).is_dir() else path for path in found]


def cells(incomplete: str) -> list[str]:
    """Names of cells, also after a comma, and files of the user's own cells."""
    from seqlm.cells import names

    before, comma, typed = incomplete.rpartition(",")
    own = [path for path in files(typed) if path.endswith((".py", "/"))]
    return [f"{before}{comma}{name}" for name in _starting(names(), typed) + own]


def presets(incomplete: str) -> list[str]:
    from seqlm.config import presets as all_presets

    return _starting(all_presets(), incomplete)


def sources(incomplete: str) -> list[str]:
    """Names of known corpora, and files."""
    from seqlm.text.corpora import NAMES

    return _starting(NAMES, incomplete) + files(incomplete)


def corpora(incomplete: str) -> list[str]:
    """Names of prepared corpora; paths, if no name fits."""
    from seqlm.text.corpus import prepared

    return _starting((path.name for path in prepared()), incomplete) or files(incomplete)


def runs(incomplete: str) -> list[str]:
    """Names of runs; paths, if no name fits."""
    from seqlm.store.runs import existing

    return _starting((path.name for path in existing()), incomplete) or files(incomplete)


def steps(ctx: typer.Context, incomplete: str) -> list[str]:
    """best, last, and the numbers of the run's saved steps."""
    from seqlm.errors import InputError
    from seqlm.store import checkpoint, runs

    try:
        saved = runs.steps(runs.find(ctx.params.get("run")))
    except InputError:  # no such run
        saved = []
    numbers = [str(checkpoint.step_number(folder.name)) for folder in saved]
    return _starting(["best", "last", *numbers], incomplete)


def settings(incomplete: str) -> list[str]:
    """Keys of the configuration; after the equals sign, the values that the key can have."""
    from seqlm.config import Config, rule

    keys = Config().flat()
    key, equals, _ = incomplete.partition("=")
    if not equals or key not in keys:
        return _starting((f"{known}=" for known in keys), incomplete)
    values = rule(key).metadata.get("choices") or ()
    if rule(key).type is bool:
        values = ("true", "false")
    return _starting((f"{key}={value}" for value in values), incomplete)


def runtime_settings(incomplete: str) -> list[str]:
    """Settings of the runtime, for a command that reads a run."""
    return [offered for offered in settings(incomplete) if offered.startswith("runtime.")]


COMPLETERS: dict[str, Completer] = {
    "FILE": files,
    "FILE|-": files,
    "SOURCE": sources,
    "CORPUS": corpora,
    "CORPUS|FILE": corpora,
    "RUN": runs,
    "best|last|N": steps,
    "CELL": cells,
    "CELL,CELL,...": cells,
    "PRESET": presets,
    "KEY=VALUE": settings,
    "runtime.KEY=VALUE": runtime_settings,
}


def of_kind(metavar: str) -> Completer | None:
    """The completer for a value that --help shows as `metavar`; a|b|c completes to these names."""
    choices = metavar.split("|")
    return COMPLETERS.get(metavar) or (one_of(*choices) if len(choices) > 1 else None)
