"""seqlm cells: the cells in their groups, or all about some of them."""

from typing import TYPE_CHECKING, Annotated, Any

from seqlm.cells import names
from seqlm.cli._app import command
from seqlm.cli._flags import argument
from seqlm.ui import Screen

if TYPE_CHECKING:
    from seqlm.lab.cells import CellFacts


@command("cells", "seqlm cells", "seqlm cells lem")
def cells(
    screen: Screen,
    only: Annotated[
        list[str] | None,
        argument("Cells to describe, or .py files. Default: list all cells.", "CELL"),
    ] = None,
) -> None:
    """List the cells, or show the equations, the options and the size of some of them."""
    from seqlm.lab.cells import facts, in_groups

    found = [facts(name) for name in only] if only else in_groups([*map(facts, names())])
    if only and not (screen.json or screen.quiet):
        for cell in found:
            _describe(screen, cell)
    else:
        rows: list[list[Any]] = [["group", "cell", "training", "state size", "about"]]
        rows += [[c.heading, c.cell, c.training, _state(c), c.about] for c in found]
        product = {"cells": [cell.to_dict() for cell in found]}
        screen.product({**product, "names": " ".join(cell.cell for cell in found)}, "names", rows)
    screen.hint(f"seqlm train --cell {found[0].cell}" if only else "seqlm cells NAME")


def _state(cell: "CellFacts") -> str:
    return "-" if cell.state_widths is None else f"{cell.state_widths:.3g} x width"


def _describe(screen: Screen, cell: "CellFacts") -> None:
    """Text, figures and options of a cell."""
    source = f"Source: {cell.source}" if cell.source else ""
    blocks = [f"{cell.title}: {cell.about}", cell.text, source]
    screen.write_text("\n\n".join(filter(None, blocks)) + "\n\n")
    given = "".join(f", cell.{option}={value}" for option, value in cell.preset_options.items())
    figures = {
        "group": cell.heading,
        "training": cell.training,
        "in the preset small": f"width {cell.width}{given}",
        "numbers in the state": cell.state,
        "parameters": cell.parameters,
        "multiplications per character": cell.multiplications,
    }
    screen.table([["figure", "value"], *([name, _cell(value)] for name, value in figures.items())])
    screen.write("\n")
    if cell.options:
        options = [["option", "values", "default", "meaning"]]
        for name, option in cell.options.items():
            default = "-" if option.default is None else _cell(option.default)
            options.append([f"cell.{name}", option.values, default, option.meaning])
        screen.table(options)
        screen.write("\n")


def _cell(value: object) -> str:
    """A value for a table, as --set takes it, except that sizes have thousands separators."""
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
