"""Optional libraries, which the extras of pyproject.toml install."""

from importlib import import_module
from typing import Any

from seqlm.errors import SeqlmError


def extra(library: str, name: str) -> Any:
    """Import an optional library.  name: the extra that installs it.

    Raises SeqlmError that names the extra if the library is not installed.
    """
    try:
        return import_module(library)
    except ImportError:
        raise SeqlmError(
            f"{library.partition('.')[0]} is not installed. Run pip install -e '.[{name}]' and try "
            "again."
        ) from None
