"""The cells: each is one file, found by its name.  To add a cell, add a file.

`names` does not import torch; `Cell`, `Recurrence` and `State` are imported on first use.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from seqlm.cells._own import module_of
from seqlm.config import as_type, cell_files, cell_key, stack
from seqlm.errors import InputError, UsageError, unknown
from seqlm.manifest import sha256

if TYPE_CHECKING:
    from seqlm.cells._contract import Cell as Cell
    from seqlm.cells._contract import Recurrence as Recurrence
    from seqlm.cells._contract import State as State

LARGEST_STACK = 1024  # cells: the largest number of layers, too
SCALARS = (int, float, bool, str)  # types of options


@dataclass(frozen=True)
class Option:
    """An option of a cell: its type, one of SCALARS or a Literal of them, and its default."""

    kind: Any
    default: Any  # inspect.Parameter.empty where the option must be given


def __getattr__(name: str) -> object:
    if name in ("Cell", "Recurrence", "State"):
        return getattr(import_module("seqlm.cells._contract"), name)
    raise AttributeError(f"module 'seqlm.cells' has no attribute {name!r}")


def names() -> list[str]:
    """The cells that seqlm has: the files of this folder."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem[0] != "_")


def find(name: str) -> "type[Cell]":
    """The class of a cell: one of `names()`, or the path of a researcher's own .py file.

    Raises UsageError for a name that does not exist, InputError for a file that is not a cell.
    """
    if name.endswith(".py"):
        return _only_cell(module_of(Path(name)), name)
    if name not in names():
        raise unknown("cell", name, names(), remedy="See: seqlm cells")
    return _only_cell(import_module(f"seqlm.cells.{name}"), name)


def _only_cell(module: ModuleType, name: str) -> "type[Cell]":
    """The cell that a module defines, which may derive from another class of the module."""
    base: type[Cell] = import_module("seqlm.cells._contract").Cell
    own = [
        kind
        for kind in dict.fromkeys(k for k in vars(module).values() if inspect.isclass(k))
        if issubclass(kind, base) and kind.__module__ == module.__name__
    ]
    # a class that others derive from is their common base, not a cell
    last = [kind for kind in own if not any(kind in other.__mro__[1:] for other in own)]
    if len(last) != 1:
        which = f": {', '.join(kind.__name__ for kind in last)}" if last else ""
        raise InputError(
            f"{name} defines {len(last)} cells{which}. A cell's file defines one subclass of "
            "Cell, and may define base classes of it."
        )
    return last[0]


def hashes(name: str) -> dict[str, str]:
    """{"cell NAME": sha256} of the researcher's own files in a stack, to detect changes."""
    own = dict.fromkeys(cell_files(name))
    return {f"cell {cell_key(cell)}": sha256(Path(cell)) for cell in own}


def options(kind: type) -> dict[str, Option]:
    """The options of a cell: its constructor's keyword-only arguments.

    An option without annotation has the type of its default.  Raises InputError for an option
    that a TOML file cannot hold.
    """
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: _option(kind, p) for p in parameters if p.kind is p.KEYWORD_ONLY}


def _option(cell: type, rule: inspect.Parameter) -> Option:
    where = f"The option {rule.name} of {cell.__name__}"
    kind = _kind(cell, rule, where)
    if not (kind in SCALARS or (get_origin(kind) is Literal and _are_scalars(get_args(kind)))):
        shown = inspect.formatannotation(kind)
        raise InputError(
            f"{where} is of the type {shown}. Make it int, float, bool, str or a Literal of them: "
            "a configuration file can hold nothing else."
        )
    if rule.default is rule.empty:
        return Option(kind, rule.default)
    try:
        return Option(kind, _checked("its default", rule.default, kind))
    except UsageError as error:
        raise InputError(f"{where} is wrong in the cell's file: {error}") from error


def _kind(cell: type, rule: inspect.Parameter, where: str) -> Any:
    """The type of an option, from its annotation or its default."""
    if rule.annotation is not rule.empty:
        # evaluate only this annotation: others may use names that only a type checker imports
        alone = SimpleNamespace(__annotations__={rule.name: rule.annotation})
        try:
            return get_type_hints(alone, inspect.getattr_static(cell, "__init__").__globals__)[
                rule.name
            ]
        except (NameError, AttributeError, SyntaxError, TypeError) as error:
            raise InputError(
                f"{where} has the annotation {rule.annotation!r}, which cannot be evaluated: "
                f"{error}. Make it int, float, bool or str."
            ) from error
    if rule.default is rule.empty:
        raise InputError(
            f"{where} has neither a type nor a default. Write it as {rule.name}: float = 1.0."
        )
    return type(rule.default)


def _are_scalars(values: tuple[Any, ...]) -> bool:
    return all(type(value) in SCALARS for value in values)


def resolved_options(name: str, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{cell: {option: value}}, complete, for a stack such as 'mingru,mingru,lem'.

    given: {option: value} for every cell of the stack, or {cell: {option: value}} for one cell,
    which takes precedence.  Raises UsageError for an unknown cell or
    option and for a value of the wrong type; the cell itself checks the range.
    """
    if len(stack(name)) > LARGEST_STACK:
        raise UsageError(
            f"cell.name lists {len(stack(name))} cells; it may list at most {LARGEST_STACK}."
        )
    kinds: dict[str, type[Cell]] = {}
    for cell in dict.fromkeys(stack(name)):
        key = cell_key(cell)
        if key in kinds:
            raise UsageError(f"The stack '{name}' has two cells called {key}. Rename the file.")
        kinds[key] = find(cell)
    if "name" in kinds:
        raise UsageError(
            "A cell's file cannot be called name.py, because cell.name is the key for the cell "
            "itself. Rename the file."
        )
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
            values[option] = _checked(f"cell.{cell}.{option}", value, known[option].kind)
        for option, value in values.items():
            if value is inspect.Parameter.empty:
                raise UsageError(f"cell.{cell}.{option} has no default. Give it with --set.")
        result[cell] = values
    return result


def _checked(key: str, value: Any, kind: Any) -> Any:
    """`value` as an option's type; UsageError says what is legal."""
    if get_origin(kind) is not Literal:
        return as_type(key, value, kind)
    for choice in get_args(kind):
        # accept 1 for 1.0, but not True for 1, although True == 1
        if choice == value and isinstance(choice, bool) == isinstance(value, bool):
            return choice
    shown = f"'{value}'" if isinstance(value, str) else repr(value)
    choices = ", ".join(map(str, get_args(kind)))
    raise UsageError(f"{key} is {shown}; it must be one of: {choices}.")
