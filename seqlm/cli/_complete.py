"""What the shell offers while a command is typed.  Imports no torch."""

from collections.abc import Callable, Iterable
from glob import escape, glob
from pathlib import Path

Completer = Callable[[str], list[str]]


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
