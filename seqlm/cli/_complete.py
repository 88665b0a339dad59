"""What the shell offers while a command is typed.  Imports no torch."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from glob import escape, glob
from pathlib import Path

import typer

Completer = Callable[..., list[str]]  # of what is typed, and of the context where it is asked for


def _starting(names: Iterable[str], typed: str) -> list[str]:
    return [name for name in names if name.startswith(typed)]


def one_of(*names: str) -> Completer:
    return lambda incomplete: _starting(names, incomplete)


def files(incomplete: str) -> list[str]:
    """Files, and folders with a slash, that a path may become."""
    found = sorted(glob(f"{escape(incomplete)}*"))
    return [f"{path}/" if Path(path).is_dir() else path for path in found]


def cells(incomplete: str) -> list[str]:
    """Names of cells, also behind the comma of a stack, and a researcher's own files."""
    from seqlm.cells import names

    before, comma, typed = incomplete.rpartition(",")
    own = [path for path in files(typed) if path.endswith((".py", "/"))]
    return [f"{before}{comma}{name}" for name in _starting(names(), typed) + own]


def presets(incomplete: str) -> list[str]:
    from seqlm.config import presets as all_presets

    return _starting(all_presets(), incomplete)


def sources(incomplete: str) -> list[str]:
    """Corpora known by name, and files."""
    from seqlm.text.corpora import NAMES

    return _starting(NAMES, incomplete) + files(incomplete)


def corpora(incomplete: str) -> list[str]:
    """Prepared corpora, by name, and paths to others."""
    from seqlm.text.corpus import prepared

    return _starting((path.name for path in prepared()), incomplete) or files(incomplete)


def runs(incomplete: str) -> list[str]:
    """Runs by name, and paths to others."""
    from seqlm.store.runs import found

    return _starting((path.name for path in found()), incomplete) or files(incomplete)


def steps(ctx: typer.Context, incomplete: str) -> list[str]:
    """best, last, and the numbers of the steps that the run has saved."""
    from seqlm.store import checkpoint
    from seqlm.store import runs as all_runs

    name = ctx.params.get("run")
    run = all_runs.named(name) if name else max(all_runs.found(), key=_changed, default=None)
    saved = [] if run is None else all_runs.steps(run)
    numbers = [str(checkpoint.number(folder.name)) for folder in saved]
    return _starting(["best", "last", *numbers], incomplete)


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def settings(incomplete: str) -> list[str]:
    """Keys of the configuration, and behind the equals sign the values that a key can have."""
    from seqlm.config import Config

    config = Config()
    key, equals, _ = incomplete.partition("=")
    if not equals:
        return _starting((f"{known}=" for known in config.flat()), incomplete)
    section, _, name = key.partition(".")
    rules = fields(getattr(config, section)) if hasattr(config, section) else ()
    rule = next((rule for rule in rules if rule.name == name), None)
    values = () if rule is None else rule.metadata.get("choices") or ()
    if rule is not None and rule.type is bool:
        values = ("true", "false")
    return _starting((f"{key}={value}" for value in values), incomplete)


def runtime_settings(incomplete: str) -> list[str]:
    """Those settings that a command which reads a run takes."""
    return [found for found in settings(incomplete) if found.startswith("runtime.")]
