"""seqlm compare: cells under equal conditions."""

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from seqlm.cli._app import command
from seqlm.cli._flags import CELLS, MODEL, TrainingData, TrainingOptions, flag, named_run
from seqlm.errors import SeqlmError, UsageError, unknown
from seqlm.temporary import write_file, write_lines
from seqlm.ui import Screen, duration

if TYPE_CHECKING:
    from seqlm.lab.compare import EntryFigures
    from seqlm.lab.entries import Entry

COMPARISON = "Comparison"  # a panel of --help
SPEEDS = ("training, characters/s", "generation, characters/s")
# the columns that a narrow terminal does without, the first one first; compare.md has all
SPARED = ("nats-per-char", "state, bytes", "memory, MB", *SPEEDS, "parameters", "width x layers")
MEASURED = ("val", "test")  # splits that no model is trained on


@command(
    "compare",
    "seqlm compare --cells mingru,lem --steps 500",
    "seqlm compare --cells mingru,lem,lstm --match time --time-limit 3m --seeds 3",
    "seqlm compare --cells mingru,mingru:model.conv=0,lem:optim.lr=0.03 --steps 500",
)
def compare(
    screen: Screen,
    training: TrainingOptions,
    data: TrainingData = None,
    cells: Annotated[
        str,
        flag(
            f"The cells to compare: {CELLS}. A+A+B is a stack of layers; A:option=value sets an "
            "option of a cell, and A:model.conv=4 or A:optim.lr=0.01 a setting for it alone.",
            MODEL,
            "CELL,CELL,...",
        ),
    ] = "mingru,minlstm,lem,cfc",
    match: Annotated[
        str,
        flag(
            "What is equal: parameters and steps (params), parameters and seconds (time), or only "
            "steps (steps).",
            COMPARISON,
            "params|time|steps",
        ),
    ] = "params",
    seeds: Annotated[int, flag("Number of trainings of each cell.", COMPARISON, "N")] = 1,
    out: Annotated[
        str | None,
        flag("Folder for the results: a path, or a name in checkpoints/.", COMPARISON, "DIR"),
    ] = None,
    split: Annotated[str, flag("Split to evaluate.", COMPARISON, "|".join(MEASURED))] = "val",
) -> None:
    """Compare cells: same text, same batches, and equal numbers of parameters.

    --width is the width of the first cell. The other cells get the width that makes their number of
    parameters nearly equal.
    """
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: it must be at least 1.")
    if split not in MEASURED:
        raise unknown("value of --split", split, MEASURED)
    given = training.given()
    if "data.path" in given:
        raise UsageError("--set data.path has no effect here. Name the corpus with --data.")

    from seqlm.lab import compare as lab
    from seqlm.lab.entries import entries
    from seqlm.runtime import Runtime
    from seqlm.text.corpus import open_corpus
    from seqlm.text.ready import ready

    with screen.progress("preparing") as bar:
        prepared = ready([data] if data is not None else [], bar.update)
    screen.note(*prepared.notes)
    screen.warn(*prepared.warnings)
    corpus = open_corpus(prepared.folder)
    corpus.symbols(split)  # raises an error before the training if there is no such split
    names = [name.strip() for name in cells.split(",")]
    size = corpus.tokenizer.vocab_size
    found = entries(names, match, training.preset, training.config, given, vocab_size=size)
    folder = lab.place(out or f"{corpus.path.name}-compare")
    _announce(screen, found, match, corpus.label, seeds, folder)
    total = len(found) * seeds
    try:
        with screen.progress("comparing") as bar:
            for now in lab.compare(corpus, found, seeds, folder, split):
                bar.update(now.trainings / total, f"{now.label}, seed {now.seed}: {now.share:.0%}")
    except KeyboardInterrupt:
        screen.note("Stopped. To continue, run the same command again.")
        raise
    rows = lab.results(corpus, found, seeds, folder, split)
    table = _table(rows, answers=bool(corpus.tokenizer.mark))
    result: dict[str, Any] = {
        "data": str(corpus.path),
        "split": split,
        "match": match,
        "out": str(folder),
        "backend": Runtime.pick(found[0].config.runtime).backend.value,
        "rows": [asdict(row) for row in rows],
    }
    _keep(screen, folder, table, result, found, seeds, f"{corpus.label}, equal {match}")
    screen.product({**result, "best": rows[0].cell}, "best", table, SPARED)
    (config, first), *_ = found[0].trainings(folder, 1)
    screen.hint(f"seqlm eval {named_run(first, config.cell.name)} --split {split}")


def _announce(
    screen: Screen, found: list["Entry"], match: str, label: str, seeds: int, folder: Path
) -> None:
    shapes = ", ".join(f"{e.label} {e.config.model.width} x {e.config.model.layers}" for e in found)
    limit = sum(e.config.train.time_limit for e in found) * seeds
    took = f", {duration(limit)} of training" if limit else ""
    screen.note(f"{folder}: {len(found) * seeds} trainings on {label}{took}. Widths: {shapes}.")
    first = found[0].params
    far = [e for e in found if abs(e.params - first) > first / 100]
    if match != "steps" and far:
        sizes = ", ".join(f"{e.label} {e.params / first - 1:+.1%}" for e in far)
        screen.warn(
            f"The numbers of parameters differ from the first cell's by more than 1 %: {sizes}. A "
            "larger --width allows a closer match."
        )


def _keep(
    screen: Screen,
    folder: Path,
    table: list[list[str]],
    result: dict[str, Any],
    found: list["Entry"],
    seeds: int,
    title: str,
) -> None:
    """Write the table as Markdown, CSV and JSON, and draw the plot."""
    from seqlm import draw

    lines = ["| " + " | ".join(map(str, line)) + " |" for line in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    write_file(folder / "compare.md", "\n".join(lines) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, result["rows"][0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(result["rows"])
    write_file(folder / "compare.csv", text.getvalue())
    write_file(folder / "compare.json", json.dumps(result, indent=2) + "\n")
    trained = {e.label: [run for _, run in e.trainings(folder, seeds)] for e in found}
    try:
        picture = draw.figure(trained, ("chars", "seconds"), ("bits",), title)
    except SeqlmError as error:
        screen.warn(f"{error} No training is repeated.")
        return
    for kind in draw.FORMATS:
        write_lines(folder / f"compare.{kind}", [draw.saved(picture, kind)])


def _table(rows: "list[EntryFigures]", answers: bool) -> list[list[str]]:
    """answers: whether the corpus has answers, for which the accuracy is shown, too."""
    table = [["cell", "width x layers", "parameters", "bits-per-char", *["accuracy"] * answers]]
    table[0] += ["difference to the best (95 % interval over passages)", "nats-per-char"]
    table[0] += [*SPEEDS, "memory, MB", "state, bytes"]
    for row in rows:
        spread = "" if row.spread is None else f" ± {row.spread:.4f}"
        behind = f"{row.behind:.4f}" if row.behind else ""
        behind += "" if row.low is None else f" ({row.low:.4f} to {row.high:.4f})"
        table.append(
            [
                row.cell,
                f"{row.width} x {row.layers}",
                f"{row.params:,}",
                f"{row.bits_per_char:.4f}{spread}",
                *[f"{row.accuracy:.1%}"] * answers,
                behind,
                f"{row.nats_per_char:.4f}",
                f"{row.chars_per_second:,.0f}",
                f"{row.decode_chars_per_second:,.0f}",
                f"{row.peak_memory_bytes / 1e6:,.0f}",
                f"{row.state_bytes:,}",
            ]
        )
    return table
