"""Curves of runs: as a figure of matplotlib, as SVG or PNG, and as characters for a terminal."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from itertools import pairwise
from math import ceil
from pathlib import Path
from statistics import fmean, median
from typing import Any

from seqlm.errors import InputError, unknown
from seqlm.extras import extra
from seqlm.store import history

# the folders of each name.  The first folder is drawn in full colour, the others pale
Runs = Mapping[str, Sequence[Path]]
Read = Callable[[Path], list[dict[str, float]]]

# the axes: field of a line of history, label
X = {
    "steps": ("step", "steps"),
    "chars": ("chars", "characters read"),
    "seconds": ("seconds", "seconds of training"),
}
Y = {
    "bits": ("val_bits_per_char", "val bits per character"),
    "loss": ("loss", "training loss, nats per symbol"),
    "lr": ("lr", "learning rate"),
    "grad-norm": ("grad_norm", "gradient norm"),
    "speed": ("chars_per_second", "training, characters per second"),
}
BYTES = ("val_bits_per_byte", "val bits per byte")  # "bits" where a text is not characters
POINTS = 200  # of a curve; with more steps, each point is the mean of several steps
FORMATS = ("svg", "png")

# distinguishable without red and green; readable, like the grey text, on white and on black
COLORS = ("#3b82c4", "#d98324", "#2a9d8f", "#b266b2", "#8c8c3e", "#7a7f87", "#c2577a", "#5c6bc0")
DASHES = ("-", "--", "-.", (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5, 1, 1.5)))
MARKERS = "os^Dv*PX"
LETTERS = "o+x*#%@&"  # of the curves in a terminal
GREY = "#808080"
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
    **{"axes.edgecolor": GREY, "grid.color": GREY, "font.size": 11},
    # text stays text, "$" is a dollar, and the same curves give the same file
    **{"svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": "seqlm"},
}


@dataclass(frozen=True)
class Curve:
    """One run of a panel."""

    label: str
    number: int  # of its label: chooses colour, line and marker
    first: bool  # of the runs with this label
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """The curves of several runs on one pair of axes."""

    x: str
    y: str
    x_label: str
    y_label: str
    curves: list[Curve]

    def limits(self) -> tuple[float, float]:
        """The ends of the y axis.

        A training starts with large values that fall fast.  The axis leaves them out, so that the
        rest of the curves can be told apart.  The last point of each curve is always inside.
        """
        values = [y for curve in self.curves for _, y in curve.points]
        low, high = min(values), max(values)
        if self.y in ("bits", "loss", "grad-norm"):
            lasts = (curve.points[-1][1] for curve in self.curves)
            high = min(high, max(low + 4 * (median(values) - low), *lasts))
        margin = (high - low) / 20 or abs(high) / 20 or 1.0
        return low - margin, high + margin


def named(folders: Sequence[Path]) -> Runs:
    """The runs by their names, or by their paths where two runs have one name."""
    names = [folder.name or folder.resolve().name for folder in folders]
    unique = len({*names}) == len({*folders})
    return {name if unique else str(f): [f] for name, f in zip(names, folders, strict=True)}


def panel(runs: Runs, x: str = "steps", y: str = "bits", read: Read = history.read) -> Panel:
    """The curves of runs.  x: a name in X; y: a name in Y.

    read: gives the figures of a run; with a cache for several panels, because it takes a while.
    Raises UsageError for another name, and InputError for a run without such figures.
    """
    for axis, name, known in (("x", x, X), ("y", y, Y)):
        if name not in known:
            raise unknown(f"{axis} axis", name, known)
    rows = {folder: read(folder) for folders in runs.values() for folder in folders}
    (x_field, x_label), (y_field, y_label) = X[x], Y[y]
    # bits per byte can be compared where one of the runs has no characters
    if y == "bits" and not all(any(y_field in row for row in one) for one in rows.values()):
        y_field, y_label = BYTES
    found = []
    for place, (label, folders) in enumerate(runs.items()):
        for folder in folders:
            points = _points(rows[folder], x_field, y_field)
            if not points:
                others = ", ".join(name for name in Y if name != y)
                raise InputError(f"{folder} has no {y} over {x} yet. Choose another y: {others}.")
            found.append(Curve(label, place, folder == folders[0], points))
    return Panel(x, y, x_label, y_label, found)


def _points(rows: list[dict[str, float]], x: str, y: str) -> list[tuple[float, float]]:
    if y == "chars_per_second":
        rows = [row for row in rows if {x, "seconds"} <= {*row}]
        begin = dict.fromkeys(("chars", "seconds"), 0.0)
        ends = [begin, *(group[-1] for group in _groups(rows))]
        return [
            (now[x], (now["chars"] - before["chars"]) / (now["seconds"] - before["seconds"]))
            for before, now in pairwise(ends)
            if now["seconds"] > before["seconds"]
        ]
    groups = _groups([row for row in rows if {x, y} <= {*row}])
    return [(group[-1][x], fmean(row[y] for row in group)) for group in groups]


def _groups(rows: list[dict[str, float]]) -> list[list[dict[str, float]]]:
    size = ceil(len(rows) / POINTS) or 1
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def figure(
    runs: Runs,
    xs: Sequence[str] = ("steps",),
    ys: Sequence[str] = ("bits",),
    title: str = "",
    wide: float | None = None,
    read: Read | None = None,
) -> Any:
    """A matplotlib Figure with one panel for each x and y.  A notebook shows it as SVG.

    wide: inches from side to side; panels that are narrow are less tall.  read: as for `panel`.
    Raises what `panel` raises, and SeqlmError if matplotlib is not installed.
    """
    new_figure = extra("matplotlib.figure", "plot").Figure
    from matplotlib import rc_context

    read = read or cache(history.read)
    wide = wide or (7.5 if len(xs) == 1 else 5.5 * len(xs))
    tall = min(3.6, 0.6 * wide / len(xs))
    with rc_context(STYLE):
        drawn: Any = new_figure(figsize=(wide, 0.7 + tall * len(ys)), layout="constrained")
        grid = drawn.subplots(len(ys), len(xs), squeeze=False, sharex="col", sharey="row")
        legend: dict[str, Any] = {}
        for row, y in zip(grid, ys, strict=True):
            for axes, x in zip(row, xs, strict=True):
                legend = _fill(axes, panel(runs, x, y, read)) | legend
        for axes in grid[:, 1:].flat:
            axes.set_ylabel("")
        for axes in grid[:-1].flat:
            axes.set_xlabel("")
        drawn.suptitle(title)
        room = int(13 * wide)  # characters on a line of the legend
        columns = max(1, min(len(legend), room // (max(map(len, legend)) + 8)))
        columns = ceil(len(legend) / ceil(len(legend) / columns))  # rows of equal length
        place = "outside lower center"
        drawn.legend([*legend.values()], [*legend], loc=place, ncols=columns, frameon=False)
    # for notebooks whose user has not imported pyplot
    drawn._repr_svg_ = lambda: saved(drawn, "svg").decode("utf-8")
    return drawn


def _fill(axes: Any, panel: Panel) -> dict[str, Any]:
    """Draw a panel; returns {label in the legend: line}."""
    from matplotlib.ticker import EngFormatter

    legend = {}
    for curve in panel.curves:
        n, (x, y) = curve.number, zip(*curve.points, strict=True)
        (line,) = axes.plot(
            x,
            y,
            color=COLORS[n % len(COLORS)],
            linestyle=DASHES[n % len(DASHES)],
            marker=MARKERS[n % len(MARKERS)],
            markersize=4,
            markevery=max(1, len(x) // 10),
            linewidth=1.8,
            alpha=1.0 if curve.first else 0.4,
        )
        if curve.first:
            legend[_last(curve)] = line
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.x != "seconds":
        axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_ylim(panel.limits())
    tidy(axes)
    return legend


def tidy(axes: Any) -> None:
    """Give axes a pale grid, and no lines at the top and on the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _last(curve: Curve) -> str:
    """The label of a curve with its last value."""
    return f"{curve.label} {number(curve.points[-1][1])}"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def saved(drawn: Any, kind: str) -> bytes:
    """The figure as a file of the format svg or png, on a transparent ground."""
    from matplotlib import rc_context

    with rc_context(STYLE), io.BytesIO() as file:
        no_date = {"Date": None} if kind == "svg" else {}
        drawn.savefig(file, format=kind, dpi=130, transparent=True, metadata=no_date)
        return file.getvalue()


def curves_svg(
    runs: Runs,
    xs: Sequence[str] = ("steps",),
    ys: Sequence[str] = ("bits",),
    title: str = "",
    wide: float | None = None,
    read: Read | None = None,
) -> str:
    """`inline` of `figure`."""
    label = title or ", ".join(Y[y][1] for y in ys)
    return inline(figure(runs, xs, ys, title, wide, read), label)


def inline(drawn: Any, label: str) -> str:
    """The <svg> element of a figure, to stand inside an HTML page.

    It becomes as wide as its place allows, and its text has the colour of the page's text.
    """
    svg = saved(drawn, "svg").decode("utf-8")
    svg = svg[svg.index("<svg") :].replace(GREY, "currentColor")
    style = "max-width:100%;height:auto"
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}" style="{style}"', 1)


def characters(panel: Panel, width: int, height: int = 16) -> Iterator[tuple[str, str | None]]:
    """(text, colour or None) of a panel that is drawn with characters, for a terminal."""
    low, high = panel.limits()
    xs = [x for curve in panel.curves for x, _ in curve.points]
    left, right = min(xs), max(xs)
    ticks = {row: number(high + (low - high) * row / (height - 1)) for row in range(0, height, 5)}
    gutter = max(map(len, ticks.values()))
    columns = max(width - gutter - 2, 20)
    blank: tuple[str, str | None] = (" ", None)
    grid = [[blank] * columns for _ in range(height)]
    for curve in reversed(panel.curves):  # the first one stays visible
        places = [
            (
                (x - left) / (right - left or 1) * (columns - 1),
                # a point above the panel leads to its edge
                max((high - y) / (high - low) * (height - 1), -1.0),
            )
            for x, y in curve.points
        ]
        for column, row in _path(places):
            if row >= 0:
                grid[row][column] = _mark(curve)
    yield f"{panel.y_label}\n", None
    for row, cells in enumerate(grid):
        yield f"{ticks.get(row, ''):>{gutter}} {'┤' if row in ticks else '│'}", None
        while cells and cells[-1] == blank:
            cells.pop()
        yield from cells
        yield "\n", None
    first, last = number(left), number(right)
    label = f"{panel.x_label:^{columns - len(first) - len(last)}}"
    yield f"{'':{gutter}} └{'─' * columns}\n{'':{gutter}}  {first}{label}{last}\n", None
    for curve in panel.curves:
        if curve.first:
            yield _mark(curve)
            yield f" {_last(curve)}\n", None


def _mark(curve: Curve) -> tuple[str, str]:
    return LETTERS[curve.number % len(LETTERS)], COLORS[curve.number % len(COLORS)]


def _path(places: Sequence[tuple[float, float]]) -> Iterator[tuple[int, int]]:
    """The cells (column, row) on the straight lines from place to place."""
    for (column, row), (next_column, next_row) in pairwise([places[0], *places]):
        across, down = next_column - column, next_row - row
        count = ceil(max(abs(across), abs(down))) or 1
        for i in range(count + 1):
            yield round(column + across * i / count), round(row + down * i / count)
