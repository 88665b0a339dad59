"""seqlm cells: the cells and their options."""

from typing import Annotated, Any

from seqlm.cells import names
from seqlm.cli._app import command
from seqlm.cli._flags import argument
from seqlm.ui import Screen


@command("cells", "seqlm cells", "seqlm cells lem")
def cells(
    screen: Screen,
    only: Annotated[list[str] | None, argument("Cells to show. Default: all.", "CELL")] = None,
) -> None:
    """List the cells and their options. To set an option: --set cell.OPTION=VALUE."""
    import sys

    from seqlm.cells import find, options

    found: list[dict[str, Any]] = []
    for name in only or names():
        kind = find(name)
        about = (sys.modules[kind.__module__].__doc__ or "").split("\n")[0].partition(": ")[2]
        size = sum(tensor[0].numel() for tensor in kind(64).initial_state(1)) / 64
        defaults = {option: rule.default for option, rule in options(kind).items()}
        found.append(
            {
                "cell": name,
                "about": about,
                "training": kind.over_time,
                "state_widths": size,
                "options": defaults,
            }
        )
    rows = [["cell", "training", "state size", "options", "about"]]
    for row in found:
        settings = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        state = f"{row['state_widths']:.3g} x width"
        rows.append([row["cell"], row["training"], state, settings, row["about"]])
    screen.product({"cells": found, "names": " ".join(row["cell"] for row in found)}, "names", rows)
    screen.hint("seqlm train --cell NAME")
