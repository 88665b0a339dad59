"""seqlm score: a run and a text -> how surprising the text is."""

import csv
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

from seqlm.cli._app import command, read_source, refuse_input, refuse_other_encoding
from seqlm.cli._flags import (
    Dynamic,
    DynamicLr,
    OnUnknown,
    Rounding,
    argument,
    flag,
    learning_rate,
    switch,
)
from seqlm.errors import InputError, UsageError
from seqlm.ui import Screen, pairs

if TYPE_CHECKING:
    from seqlm.evaluation.passage import Passage
    from seqlm.evaluation.score import Row
    from seqlm.run import Run

    Pair = tuple[Row, Row | None]  # of the run, and of the run --against

TABLE, VIEW = "Table", "View"  # panels of --help
SPACE, COLOR = "after|before", "--color"
LARGEST_PAGE = 200_000  # characters: a browser shows a page of this size without delay
ALTERNATIVES = 5  # on a page
SHOWN = (
    *("run", "step", "cell", "protocol", "bits", "bits_per_char", "bits_per_byte", "perplexity"),
    *("entropy_bits", "accuracy", "chars", "bytes", "tokens", "documents", "unknown"),
)


@command(
    "score",
    "seqlm score letter.txt",
    "seqlm score letter.txt --per word --words [A-Za-z]+",
    "seqlm score letter.txt --color",
    "seqlm score letter.txt --html letter.html --against poems-lem",
)
def score(
    screen: Screen,
    reading: Rounding,
    source: Annotated[str, argument("UTF-8 text to score; -: standard input.", "FILE|-")],
    per: Annotated[
        str | None,
        flag("Write a table with one row for each of these.", TABLE, "char|word|line|document"),
    ] = None,
    top: Annotated[
        int, flag("With --per char: also show the N likeliest characters.", TABLE, "N")
    ] = 0,
    words: Annotated[
        str | None,
        flag(r"With --per word: what a word is. Default: \S+ (no white space).", TABLE, "REGEX"),
    ] = None,
    space: Annotated[
        str | None,
        flag(
            "With --per word: a word includes the space after or before it. Default: after.",
            TABLE,
            SPACE,
        ),
    ] = None,
    sort: Annotated[
        bool, switch("Write the row with the most bits per character first.", TABLE, "--sort")
    ] = False,
    jsonl: Annotated[
        bool, switch("With --per: write each row as a JSON object.", TABLE, "--jsonl")
    ] = False,
    color: Annotated[
        bool,
        switch("Show the text, coloured by surprise; without colours, with numbers.", VIEW, COLOR),
    ] = False,
    html: Annotated[
        Path | None, flag("Write a web page with the coloured text.", VIEW, "FILE")
    ] = None,
    against: Annotated[
        str | None, flag("Show where this run is better or worse.", VIEW, "RUN")
    ] = None,
    on_unknown: OnUnknown = "error",
    dynamic: Dynamic = False,
    dynamic_lr: DynamicLr = None,
) -> None:
    """Show how surprising a text is to a model, as a whole or in parts."""
    _refuse_without_effect(screen, per, top, words, space, sort, jsonl, color, html, against)
    if " " in source and not Path(source).exists():
        raise InputError(
            f"There is no file {source!r}. To score a text itself: echo {quote(source)} | seqlm "
            "score -"
        )
    rate = learning_rate(dynamic, dynamic_lr)
    runs = reading.load_all(screen, [] if against is None else [against], "--against")
    refuse_input("--html", html, source)
    text = read_source("FILE", source)
    for run in runs:
        refuse_other_encoding(source, text, run.tokenizer)

    from seqlm.evaluation.passage import passage_of_text

    passages = [passage_of_text([text], run.tokenizer, on_unknown) for run in runs]
    if passages[0].unknown:
        screen.warn(
            f"{passages[0].unknown:,} characters that the model never saw were skipped. Offsets "
            "count the other characters."
        )
    if per is None and not color and html is None:
        _write_totals(screen, runs[0], passages[0], rate)
        return
    unit = per or ("word" if color and not screen.colored() else "char")
    given = dict(words=words, space=space)
    options = {"per": unit, **{name: value for name, value in given.items() if value is not None}}
    if rate is not None:
        screen.note("Protocol dynamic: the model learned from each part after it was scored.")
    rows = _paired(runs, passages, ALTERNATIVES if html else top, rate, options)
    names = [run.path.name for run in runs]
    if html is not None:
        _write_page(screen, html, rows, names, passages[0])
    elif color:
        _show(screen, rows, names)
    else:
        _write_rows(screen, _ordered(screen, rows, unit, sort, space or "after"), unit, top, jsonl)


def _refuse_without_effect(
    screen: Screen,
    per: str | None,
    top: int,
    words: str | None,
    space: str | None,
    sort: bool,
    jsonl: bool,
    color: bool,
    html: Path | None,
    against: str | None,
) -> None:
    """Raises UsageError for an option that would have no effect beside the others."""
    views = {"--per": per, "--color": color, "--html": html, "--json": screen.json}
    given = [name for name, value in views.items() if value]
    if given == ["--per", "--json"]:
        raise UsageError("--json gives the totals only. For the rows of --per, give --jsonl.")
    if len(given) > 1:
        raise UsageError(f"Both {given[0]} and {given[1]} are given. Choose one.")
    if top and per != "char":
        raise UsageError(
            f"--top {top} has an effect only with --per char. Add it, or remove --top."
        )
    for name, value in {"--words": words, "--space": space}.items():
        if value is not None and per != "word":
            raise UsageError(
                f"{name} has an effect only with --per word. Add it, or remove {name}."
            )
    for name, wanted in {"--sort": sort, "--jsonl": jsonl}.items():
        if wanted and per is None:
            raise UsageError(
                f"{name} has an effect only with --per. Add --per line, or remove {name}."
            )
    if against is not None and given in ([], ["--json"]):
        raise UsageError("--against shows where one run is better: add --per, --color or --html.")


def _write_totals(screen: Screen, run: "Run", passage: "Passage", rate: float | None) -> None:
    from seqlm.evaluation.score import chunks, totals

    with screen.progress("scoring") as bar, run.runtime.active():
        parts = chunks(run.model, passage, 0, run.learning(rate), bar.update)
        found, entropy_bits = totals(parts, passage)
    static = "stream" if passage.answers is None else "answers"
    result = {
        "run": str(run.path),
        "step": run.step,
        "cell": run.config.cell.name,
        "protocol": run.protocol(static if rate is None else "dynamic"),
        "bits": found.bits,
        "bits_per_char": found.bits_per_char,
        "bits_per_byte": found.bits_per_byte,
        "perplexity": found.perplexity,
        "entropy_bits": entropy_bits,
        "accuracy": found.accuracy,
        "chars": found.chars,
        "bytes": found.bytes,
        "tokens": found.tokens,
        "documents": None if passage.ends is None else len(passage.ends),
        "unknown": passage.unknown,
        "text_sha256": passage.sha256,
        "dtype": run.dtype,
        "backend": run.runtime.backend.value,
    }
    screen.product(result, "bits", pairs(result, SHOWN))


def _paired(
    runs: "list[Run]",
    passages: "list[Passage]",
    top: int,
    rate: float | None,
    options: dict[str, Any],
) -> "Iterator[Pair]":
    """The rows of the first run, each with that of the second, if there are two."""
    from seqlm.evaluation.score import chunks, rows

    first, *others = (
        rows(run.runtime.each(found), run.tokenizer, passage, **options)
        for run, passage in zip(runs, passages, strict=True)
        for found in [chunks(run.model, passage, top, run.learning(rate))]
    )
    if not others:
        yield from ((row, None) for row in first)
        return
    for row, other in zip_longest(first, others[0]):
        if row is None or other is None or row.text != other.text:
            raise InputError(
                f"{runs[0].path} and {runs[1].path} read different parts of the text at a time, so "
                "their figures cannot be shown side by side. Choose --per line."
            )
        yield row, other


def _ordered(
    screen: Screen, rows: "Iterator[Pair]", unit: str, sort: bool, space: str
) -> "Iterator[Pair]":
    """The rows in the order of the table, with what must be known about words."""
    if unit == "word":
        screen.note(f"A word includes the space {space} it (--space).")
    if sort:
        rows = iter(sorted(rows, key=lambda pair: -pair[0].surprisal_bits / max(1, pair[0].chars)))
    empty = 0
    for pair in rows:
        empty += not pair[0].text
        yield pair
    if unit == "word" and empty:
        screen.warn(f"Documents without a word: {empty:,}. Each has a row whose word is empty.")


def _write_rows(screen: Screen, rows: "Iterator[Pair]", unit: str, top: int, jsonl: bool) -> None:
    """The rows on standard output: JSON objects, or a tab-separated table."""
    if jsonl:
        for pair in rows:
            screen.json_line(_fields(pair, unit, top))
        return
    table = csv.writer(screen, "excel-tab", lineterminator="\n")
    for number, pair in enumerate(rows):
        fields = _fields(pair, unit, top)
        if not number:
            table.writerow(unit if name == "text" else name for name in fields)
        table.writerow(_cell(name, value) for name, value in fields.items())


def _fields(pair: "Pair", unit: str, top: int) -> dict[str, Any]:
    row, other = pair
    fields = row._asdict() | {"probability": row.probability}
    rank, alternatives = fields.pop("rank"), fields.pop("alternatives")
    if unit == "char":
        fields["rank"] = rank
    if other:
        fields["against_bits"] = other.surprisal_bits
    if top:
        fields["alternatives"] = [{"text": text, "probability": p} for text, p in alternatives]
    return fields


def _cell(name: str, value: Any) -> str:
    """A field as a cell of the table."""
    if name == "text":
        return _escaped(value)
    if name == "alternatives":
        return " ".join(f"{_escaped(one['text'])}:{one['probability']:.4f}" for one in value)
    if isinstance(value, float):
        return f"{value:.6g}" if name == "probability" else f"{value:.6f}"
    return "" if value is None else str(value)


def _escaped(text: str) -> str:
    """The text in one line: a backslash, a tab and a line's end as \\\\, \\t, \\n and \\r."""
    text = text.replace("\\", "\\\\").replace("\t", "\\t")
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _show(screen: Screen, rows: "Iterator[Pair]", names: list[str]) -> None:
    from seqlm.lab.tint import color, legend, level, numbered

    if not screen.colored():
        for text in numbered(rows):
            screen.write_text(text)
        return
    screen.colors([(f" {text} ", color(number)) for number, text in legend(names)])
    screen.colors([("\n", None)])
    line: list[tuple[str, str | None]] = []
    for row, other in rows:
        line.append((row.text, color(level(row, other))))
        if row.text.endswith("\n"):
            screen.colors(line)
            line = []
    screen.colors([*line, ("\n", None)])


def _write_page(
    screen: Screen,
    path: Path,
    rows: "Iterator[Pair]",
    names: list[str],
    passage: "Passage",
) -> None:
    from seqlm.lab.tint import page
    from seqlm.temporary import write_file

    if passage.tokens > LARGEST_PAGE:
        raise UsageError(
            f"The text has {passage.tokens:,} symbols; a page shows at most {LARGEST_PAGE:,}. Give "
            "a part of the text."
        )
    found = list(rows)
    bits = [sum(r.surprisal_bits for r in column if r) for column in zip(*found, strict=True)]
    chars = max(1, sum(row.chars for row, _ in found))
    figures = zip(names, bits, strict=False)
    summary = "; ".join(f"{name}: {b / chars:.3f} bits per character" for name, b in figures)
    write_file(path, page(found, names, f"{chars:,} characters. {summary}."))
    screen.note(f"Wrote {path}.")
