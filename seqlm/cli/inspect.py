"""seqlm inspect: a run and a text -> what the state of the model remembers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from seqlm.cli._app import command, read_source, refuse_input
from seqlm.cli._flags import OnUnknown, Reading, argument, flag
from seqlm.errors import UsageError
from seqlm.ui import Screen

if TYPE_CHECKING:
    from seqlm.evaluation.inspect import Inspection, Walk

VIEW = "View"  # a panel of --help


@command(
    "inspect",
    "seqlm inspect letter.txt",
    "seqlm inspect letter.txt --unit 2:17",
    "seqlm inspect letter.txt --html letter.html --run poems-lem",
)
def inspect(
    screen: Screen,
    reading: Reading,
    source: Annotated[
        str, argument("UTF-8 text that the model reads; -: standard input.", "FILE|-")
    ],
    unit: Annotated[
        str | None,
        flag("Show the text coloured by a unit's value, or with numbers.", VIEW, "LAYER:INDEX"),
    ] = None,
    html: Annotated[
        Path | None, flag("Write a web page with plots and the coloured text.", VIEW, "FILE")
    ] = None,
    on_unknown: OnUnknown = "error",
) -> None:
    """Show what the state of a model remembers of a text, and which units react to what."""
    if unit is not None and screen.json and html is None:
        raise UsageError("--unit has no effect with --json. Add --html FILE, or remove --unit.")
    run = reading.load(screen)

    from seqlm.evaluation import inspect as inspecting

    if unit is not None:  # an error before the text is read by the model
        inspecting.place_of(unit, inspecting.widths_of(run.model))
    most = 4 * inspecting.READ  # a character has at most 4 bytes
    refuse_input("--html", html, source)
    raw = read_source("FILE", source, head=most + 1)
    text = inspecting.opening(raw[:most], len(raw) <= most)
    if len(text) < len(raw):
        screen.note(f"Only the first {inspecting.READ:,} characters of the text are read.")
    passage = inspecting.passage_to_inspect(text, run.tokenizer, on_unknown)
    if passage.unknown:
        screen.warn(f"{passage.unknown:,} characters that the model never saw were skipped.")
    arguments = run.model, run.tokenizer, passage
    with screen.progress("inspecting") as bar, run.runtime.active():
        if unit is not None and html is None:
            found = inspecting.walk(*arguments, bar.update)
        else:
            whole = inspecting.inspect(*arguments, bar.update)
    if unit is not None and html is None:
        _show(screen, found, unit)
        return
    if html is not None:
        from seqlm.lab.inspect_page import page
        from seqlm.temporary import write_file

        write_file(html, page(run.path.name, whole, unit))
        screen.note(f"Wrote {html}.")
    about = {"run": str(run.path), "step": run.step, "cell": run.config.cell.name}
    _write(screen, whole, about, run.runtime.backend.value)


def _show(screen: Screen, found: "Walk", unit: str) -> None:
    from seqlm.evaluation.inspect import levels
    from seqlm.lab.inspect_page import legend, numbered
    from seqlm.lab.tint import color

    values = found.unit(unit)
    if not screen.colored():
        screen.write_text("".join(numbered(found.text, values)) + "\n")
        return
    screen.colors([(f" {text} ", color(number)) for number, text in legend(values)])
    shown = zip(found.text, levels(values)[0].tolist(), strict=True)
    screen.colors([("\n", None), *((text, color(number)) for text, number in shown), ("\n", None)])


def _write(screen: Screen, found: "Inspection", about: dict[str, Any], backend: str) -> None:
    """The result: three tables, or one object."""
    from seqlm.lab.inspect_page import NO_GATES, rows, times

    reach = [point._asdict() for point in found.reach]
    result = {
        **about,
        "chars": found.chars,
        "symbols_watched": len(found.walk.text),
        "bits_per_char": found.bits_per_char,
        "reach": reach,
        "times": [
            {"layer": time.layer, "part": time.part, "symbols": time.symbols.tolist()}
            for time in found.walk.times
        ],
        "features": [
            {**feature._asdict(), "units": [unit._asdict() for unit in feature.units]}
            for feature in found.features
        ],
        "backend": backend,
    }
    bits: list[list[Any]] = [[k, b, b - found.bits_per_char] for k, b in found.reach]
    bits[-1][0] = "never"
    headings = ["state reset every", "bits per character", "more than never"]
    screen.product(result, "bits_per_char", [headings, *bits])
    if screen.json or screen.quiet:
        return
    if found.walk.times:
        screen.note("For how many characters the units keep what they hold (time constants):")
        screen.table(times(found.walk.times))
    else:
        screen.note(NO_GATES)
    screen.note("The unit that follows each feature best (AUC 0.5: chance, 1: always):")
    screen.table(rows(found.features))
