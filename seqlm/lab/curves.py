"""The plot of a comparison: validation loss over characters and over seconds of training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seqlm.errors import SeqlmError
from seqlm.store.runs import METRICS, TIMING

FORMATS = ("png", "svg")
# distinguishable without red and green; readable, like the grey text, on white and on black
COLORS = ("#3b82c4", "#d98324", "#2a9d8f", "#b266b2", "#8c8c3e", "#7a7f87", "#c2577a", "#5c6bc0")
GREY = "#808080"
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
    **{"axes.edgecolor": GREY, "grid.color": GREY, "svg.hashsalt": "seqlm"},
}


def draw(runs: Mapping[str, Sequence[Path]], title: str, out: Path) -> list[Path]:
    """Plot the validations of runs into out.png and out.svg, and return these paths.

    runs: the run folders of each label.  The first run of a label is drawn in full colour, the
    others pale.
    Raises SeqlmError when matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise SeqlmError(
            "matplotlib is not installed, so no plot was drawn. Run pip install -e '.[plot]', then "
            "the same command again; no training is repeated."
        ) from None
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        ends = []
        for number, (label, folders) in enumerate(runs.items()):
            color = COLORS[number % len(COLORS)]
            for i, folder in enumerate(folders):
                chars, seconds, bits = zip(*_validations(folder), strict=True)
                style = dict(color=color, linewidth=1.8, alpha=1.0 if i == 0 else 0.4)
                for axes, x in ((left, chars), (right, seconds)):
                    axes.plot(x, bits, **style, label=f"{label} {bits[-1]:.3f}" if not i else None)
                ends.append(bits[-1])
        figure.suptitle(title)
        left.set(xlabel="characters read", ylabel="val bits per character")
        right.set(xlabel="seconds of training")
        lowest = min(ends)
        left.set_ylim(lowest - 0.05, lowest + 1.2)  # cut off the start, where all curves fall alike
        left.xaxis.set_major_formatter(EngFormatter())
        for axes in (left, right):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        right.legend(frameon=False)
        paths = [out.with_suffix(f".{kind}") for kind in FORMATS]
        for path in paths:
            figure.savefig(path, dpi=130, transparent=True)
    return paths


def _validations(folder: Path) -> list[tuple[int, float, float]]:
    """(characters, seconds, bits per character) of each validation of a run."""
    seconds = {row["step"]: row["seconds"] for row in _lines(folder / TIMING)}
    return [
        (
            row["chars"],
            seconds[row["step"]],
            row.get("val_bits_per_char") or row["val_bits_per_byte"],
        )
        for row in _lines(folder / METRICS)
        if row.get("val_bits_per_byte") is not None
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
