"""What `inspect` found, as figures, as coloured text and as one HTML page."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from seqlm.draw import COLORS, DASHES, MARKERS, STYLE, inline, tidy
from seqlm.evaluation.inspect import Feature, Inspection, Reach, TimeConstants, levels
from seqlm.extras import extra
from seqlm.lab import page as frame
from seqlm.lab import tint

EDGES = np.geomspace(0.1, 1e4, 31)  # of the histograms; time constants beyond are in the last bars
REACH = (
    "The model's state is reset every few characters. Each character is then predicted only from "
    "the characters since the last reset. Where the curve is flat, the state remembers nothing "
    "more that helps."
)
TIMES = (
    "For how many characters each unit keeps what it holds, by its gates: after its time constant, "
    "37 % is left."
)
NO_GATES = (
    "The cells of this model have no gates on their own state, so there are no time constants."
)
FEATURES = (
    "The unit was chosen on the first half of the text, among all units. The AUC is that of the "
    "second half: how often the unit tells a character with the feature from one without. 0.5 is "
    "chance, 1 is always."
)


# figures keep legible text on a narrow screen, and scroll there
NARROW = ".wide svg { min-width: 30rem }\n"


def figures(labelled: Mapping[str, Inspection]) -> tuple[Any, Any | None]:
    """matplotlib Figures: bits by how far back the state may see, and the time constants.

    labelled: {name of a run: what was found}.  The histograms are those of the first run; None if
    its cells have no gates.  Raises SeqlmError if matplotlib is not installed.
    """
    extra("matplotlib.figure", "plot")
    from matplotlib import rc_context

    first = next(iter(labelled.values()))
    with rc_context(STYLE):
        reach = _reach_figure({name: found.reach for name, found in labelled.items()})
        return reach, _times_figure(first.walk.times) if first.walk.times else None


def _axes(rows: int, height: float) -> tuple[Any, list[Any]]:
    """A Figure with panels below each other."""
    drawn = extra("matplotlib.figure", "plot").Figure(figsize=(7.5, height), layout="constrained")
    panels = drawn.subplots(rows, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes in panels:
        tidy(axes)
    return drawn, [*panels]


def _reach_figure(found: Mapping[str, Sequence[Reach]]) -> Any:
    drawn, (axes,) = _axes(1, 3.6)
    for n, (label, points) in enumerate(found.items()):
        look = dict(color=COLORS[n], linestyle=DASHES[n], marker=MARKERS[n], label=label)
        axes.plot(*zip(*points, strict=True), markersize=4, linewidth=1.8, **look)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="characters between two resets of the state", ylabel="bits per character")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    if len(found) > 1:
        axes.legend(frameon=False)
    return drawn


def _times_figure(times: Sequence[TimeConstants]) -> Any:
    layers = sorted({found.layer for found in times})
    drawn, panels = _axes(len(layers), 0.9 + 1.4 * len(layers))
    for axes, layer in zip(panels, layers, strict=True):
        for n, found in enumerate(time for time in times if time.layer == layer):
            counts, _ = np.histogram(found.symbols.clip(EDGES[0], EDGES[-1]), EDGES)
            axes.stairs(counts, EDGES, color=COLORS[n], alpha=0.2, fill=True)
            look = dict(color=COLORS[n], linestyle=DASHES[n], label=found.part)
            axes.stairs(counts, EDGES, linewidth=1.8, **look)
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_ylabel(f"units, layer {layer}")
        axes.legend(frameon=False, loc="upper right")
    panels[-1].set_xlabel("time constant, characters")
    panels[-1].xaxis.set_major_formatter(lambda x, _: f"{x:,g}")
    return drawn


def legend(values: np.ndarray) -> list[tuple[int, str]]:
    """(level, meaning) of every colour of a unit's values."""
    middle, limits = float(np.median(values)), levels(values)[1]
    outer = [(n + 1, limit) for n, limit in enumerate(limits)]
    low = [(-n, f"below {middle - limit:.3g}") for n, limit in reversed(outer)]
    return [*low, (0, f"near {middle:.3g}"), *((n, f"above {middle + a:.3g}") for n, a in outer)]


def numbered(text: Sequence[str], values: np.ndarray) -> Iterator[str]:
    """The text with the unit's value behind each word, for output without colours."""
    for (piece, value), (following, _) in pairwise([*zip(text, values, strict=True), ("\n", 0.0)]):
        ends = following.isspace() and not piece.isspace()
        yield f"{piece}[{value:+.2f}]" if ends else piece


def best_unit(found: Inspection) -> str | None:
    """The unit that follows a feature best, as LAYER:INDEX."""
    units = [feature.units[0] for feature in found.features if feature.units]
    return f"{units[0].layer}:{units[0].unit}" if units else None


def page(name: str, found: Inspection, unit: str | None = None) -> str:
    """A self-contained HTML page.  name: of the run.  unit: LAYER:INDEX; None: the best one."""
    reach, times = (
        figure and inline(figure, label)
        for figure, label in zip(
            figures({name: found}), ("Bits per character by reset", "Time constants"), strict=True
        )
    )
    title = f"What the state of {name} remembers"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{found.chars:,} characters of text; {found.bits_per_char:.3f} bits per character. The "
        f"units were watched over the first {len(found.walk.text):,} symbols.</p>",
        f'<h2>How far back</h2>\n<p>{REACH}</p>\n<div class="wide">{reach}</div>',
        f"<h2>For how long</h2>\n<p>{TIMES if times else NO_GATES}</p>\n"
        f'<div class="wide">{times or ""}</div>',
        f"<h2>What units follow</h2>\n<p>{FEATURES}</p>\n{_table(found.features)}",
    ]
    unit = unit or best_unit(found)
    if unit is None:
        return frame.page(title, "\n".join(parts), NARROW)
    values = found.walk.unit(unit)
    spans = map(tint.span, found.walk.text, levels(values)[0].tolist())
    parts.append(
        f"<h2>The text in the colours of unit {escape(unit)}</h2>\n<p>Orange is where the unit is "
        f"high, blue is where it is low.</p>\n{tint.reader(spans, legend(values))}"
    )
    script = (
        f"const values = {frame.value(values.round(3).tolist())};\n"
        f"const tell = i => {frame.value(f'unit {unit}: ')} + values[i].toFixed(3);\n"
    )
    return frame.page(title, "\n".join(parts), tint.STYLE + NARROW, script + tint.SCRIPT)


def times(found: Sequence[TimeConstants]) -> list[list[Any]]:
    """The table of time constants, with its headings."""
    lines: list[list[Any]] = [
        ["layer", "part", "units", "shortest", "median", "9 of 10", "longest"]
    ]
    for layer, part, symbols in ((time.layer, time.part, time.symbols) for time in found):
        shown = [f"{n:.2f}" for n in np.quantile(symbols, (0, 0.5, 0.9, 1))]
        lines.append([layer, part, len(symbols), *shown])
    return lines


HEADINGS = ("feature", "share of the text", "unit", "it is", "AUC", "AUC, first half")


def rows(features: Sequence[Feature]) -> list[list[Any]]:
    """The table of features and the unit that follows each best, with its headings."""
    lines: list[list[Any]] = [[*HEADINGS]]
    for name, share, units in features:
        line: list[Any] = [name, f"{share:.1%}", None, None, None, None]
        for unit in units[:1]:
            high = "high" if unit.high else "low"
            line[2:] = [
                f"{unit.layer}:{unit.unit}",
                high,
                f"{unit.auc:.3f}",
                f"{unit.chosen_auc:.3f}",
            ]
        lines.append(line)
    return lines


def _table(features: Sequence[Feature]) -> str:
    headings, *lines = rows(features)
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell or '-')}</td>" for cell in line) + "</tr>"
        for line in lines
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'
