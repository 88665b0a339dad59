"""The cells: one file each, found by its name; a new cell is a new file.

`names` answers without torch; `Cell`, `Recurrence` and `State` are loaded on first use.
"""

import importlib.util
import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from seqlm.config import as_type, cell_key, stack
from seqlm.errors import InputError, UsageError, unknown
from seqlm.manifest import sha256

MOST = 1024  # cells in a stack, as many as layers


def __getattr__(name: str):
    if name in ("Cell", "Recurrence", "State"):
        return getattr(import_module("seqlm.cells._contract"), name)
    raise AttributeError(f"module 'seqlm.cells' has no attribute {name!r}")


def names() -> list[str]:
    """The cells that seqlm has: the files of this folder."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem[0] != "_")


def find(name: str) -> type:
    """The class of a cell: one of `names()`, or the path of a researcher's own .py file.

    Raises UsageError for a name that does not exist, InputError for a file that is not a cell.
    """
    if name.endswith(".py"):
        return _only_cell(_module_from(Path(name)), name)
    if name not in names():
        raise unknown("cell", name, names(), remedy="See: seqlm cells")
    return _only_cell(import_module(f"seqlm.cells.{name}"), name)


def _module_from(path: Path):
    if not path.is_file():
        raise InputError(f"The cell file {path} does not exist. Check the path.")
    spec = importlib.util.spec_from_file_location(f"seqlm_cell_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (
        Exception,
        SystemExit,
    ) as error:  # the researcher's code: whatever it raises is a fault of the file
        raise InputError(
            f"The cell file {path} cannot be imported: {type(error).__name__}: {error}. Correct "
            "it; --debug shows where."
        ) from error
    return module


def _only_cell(module, name: str) -> type:
    base = import_module("seqlm.cells._contract").Cell
    own = [
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, base) and kind.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise InputError(
            f"{name} defines {len(own)} cells; a cell's file defines one subclass of Cell."
        )
    return own[0]


def hashes(name: str) -> dict[str, str]:
    """{"cell NAME": sha256} of the researcher's own files in a stack, by which a change shows."""
    own = (cell for cell in dict.fromkeys(stack(name)) if cell.endswith(".py"))
    return {f"cell {cell_key(cell)}": sha256(Path(cell)) for cell in own}


def options(kind: type) -> dict[str, inspect.Parameter]:
    """The options of a cell: its constructor's keyword-only arguments."""
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def resolved_options(name: str, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{cell: {option: value}}, complete, for a stack such as 'mingru,mingru,lem'.

    `given` is what the configuration says: {option: value} for every cell of the stack, or
    {cell: {option: value}} for one of them, which wins.  Raises UsageError for an unknown cell or
    option and for a value of the wrong type; the cell itself checks the range.
    """
    if len(stack(name)) > MOST:
        raise UsageError(f"cell.name lists {len(stack(name))} cells; it may list {MOST}.")
    kinds = {cell_key(cell): find(cell) for cell in dict.fromkeys(stack(name))}
    if "name" in kinds:
        raise UsageError("A cell's file cannot be called name.py: cell.name is a key of its own.")
    shared = {k: v for k, v in given.items() if not isinstance(v, Mapping)}
    for cell in kinds.keys() & shared.keys():
        raise UsageError(
            f"cell.{cell} is {shared[cell]!r}; write cell.{cell}.OPTION for an option."
        )
    for owner in given.keys() - shared.keys() - kinds.keys():
        raise UsageError(f"cell.{owner} is set, but {owner} is not in the stack '{name}'.")
    result = {}
    for cell, kind in kinds.items():
        known = options(kind)
        values = {option: rule.default for option, rule in known.items()}
        for option, value in {**shared, **given.get(cell, {})}.items():
            if option not in known:
                raise unknown(f"option of {cell}", option, known)
            values[option] = _checked(f"cell.{cell}.{option}", value, known[option].annotation)
        for option, value in values.items():
            if value is inspect.Parameter.empty:
                raise UsageError(f"cell.{cell}.{option} has no default. Give it with --set.")
        result[cell] = values
    return result


def _checked(key: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UsageError(f"{key} is '{value}'; it must be one of: {', '.join(get_args(kind))}.")
        return value
    return as_type(key, value, kind)
