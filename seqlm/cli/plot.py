"""seqlm plot: the curves of runs, in the terminal or as a picture."""

from functools import cache
from pathlib import Path
from typing import Annotated, Any

from seqlm.cli._app import command
from seqlm.cli._flags import argument, flag
from seqlm.errors import UsageError
from seqlm.ui import Screen, visible

PICTURE = "Picture"  # a panel of --help


@command(
    "plot",
    "seqlm plot",
    "seqlm plot poems-mingru poems-lem --x seconds",
    "seqlm plot poems-mingru --y bits,loss --out curves.svg",
)
def plot(
    screen: Screen,
    names: Annotated[
        list[str] | None,
        argument("Runs: paths, or names in checkpoints/. Default: the newest.", "RUN"),
    ] = None,
    x: Annotated[
        str, flag("What is on the horizontal axis.", PICTURE, "steps|chars|seconds")
    ] = "steps",
    y: Annotated[
        str,
        flag(
            "What is drawn: bits (per character, of the validations), loss, lr, grad-norm or "
            "speed. Several, separated by commas, are drawn below each other.",
            PICTURE,
            "bits|loss|lr|grad-norm|speed",
        ),
    ] = "bits",
    out: Annotated[
        Path | None,
        flag("Picture to write, .svg or .png. Default: draw here.", PICTURE, "FILE"),
    ] = None,
) -> None:
    """Draw the curves of one or several runs."""
    from seqlm import draw
    from seqlm.store import history, runs
    from seqlm.temporary import write_lines

    kind = "" if out is None else out.suffix.lower().removeprefix(".")
    if out is not None and kind not in draw.FORMATS:
        raise UsageError(f"--out {out}: the name must end in .svg or .png.")
    found = [runs.find(name, "RUN") for name in names or ()] or [runs.find(None)]
    drawn = draw.named(found)
    ys = y.split(",")
    read = cache(history.read)
    panels = [draw.panel(drawn, x, one, read) for one in ys]
    if out is not None:
        write_lines(out, [draw.saved(draw.figure(drawn, [x], ys, read=read), kind)])
    elif not screen.json:
        for panel in panels:
            parts = draw.characters(panel, min(screen.width(), 100))
            if screen.colored():
                screen.colors(parts, style="")
            else:
                screen.write(visible("".join(text for text, _ in parts)))
        return
    curves: list[dict[str, Any]] = []
    rows: list[list[Any]] = [["run", "figure", "last", "lowest"]]
    for panel in panels:
        for curve in panel.curves:
            values = [value for _, value in curve.points]
            curves.append({"run": curve.label, "y": panel.y, "points": curve.points})
            rows.append([curve.label, panel.y_label, values[-1], min(values)])
    result = {"x": x, "out": None if out is None else str(out), "curves": curves}
    screen.product(result, "out", rows)
