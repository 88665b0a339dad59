"""seqlm eval: a run -> bits per character."""

from typing import Annotated

import typer

from seqlm.cli._app import command, read_source
from seqlm.cli._flags import Data, Reading, named_run
from seqlm.errors import InputError, UsageError, unknown
from seqlm.ui import Screen, pairs

SHOWN = (
    *("run", "step", "cell", "params", "corpus", "split", "split_sha256", "protocol", "context"),
    *("bits_per_char", "bits_per_byte", "nats_per_char", "perplexity", "accuracy"),
    *("chars", "characters", "bytes", "tokens", "documents", "unknown", "chars_per_second"),
    *("device", "backend"),
)
METRICS = ("bits-per-char", "bits-per-byte", "nats-per-char", "perplexity", "accuracy")


@command(
    "eval",
    "seqlm eval",
    "seqlm eval bits-per-char --split test",
    "seqlm eval --run poems-lem --text letter.txt",
)
def evaluate(
    screen: Screen,
    reading: Reading,
    metric: Annotated[
        str | None,
        typer.Argument(metavar="METRIC", help=f"Print one number: {', '.join(METRICS)}."),
    ] = None,
    data: Data = None,
    split: Annotated[str, typer.Option(metavar="train|val|test", help="Of the corpus.")] = "val",
    text: Annotated[
        str | None, typer.Option(metavar="FILE|-", help="A text instead of a corpus (UTF-8).")
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            metavar="stream|window", help="The whole split as one stream, or cold windows."
        ),
    ] = "stream",
    context: Annotated[int, typer.Option(metavar="N", help="Symbols in a window.")] = 256,
    on_unknown: Annotated[
        str, typer.Option(metavar="error|skip", help="For characters the vocabulary lacks.")
    ] = "error",
) -> None:
    """Evaluate a run: bits per character over a whole split of its corpus."""
    if metric is not None and metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if text is not None and data is not None:
        raise UsageError("Both --text and --data are given. Choose what to evaluate.")

    loaded = reading.load(screen)
    screen.detail(f"{loaded.runtime}; evaluation is in float32")
    options = dict(data=data, split=split, protocol=protocol, context=context)
    options |= dict(
        on_unknown=on_unknown, text=None if text is None else read_source("--text", text)
    )
    with screen.progress("evaluating") as bar:
        figures = loaded.evaluate(tick=bar.update, **options)

    _warn(screen, figures)
    own = METRICS[1] if figures["bits_per_char"] is None else METRICS[0]
    key = (metric or own).replace("-", "_")
    if screen.json or (metric is None and not screen.quiet):
        screen.product(figures, key, pairs(figures, SHOWN))
        screen.hint(f"seqlm generate {named_run(loaded.path, loaded.config.cell.name)}")
        return
    if figures[key] is None:
        raise InputError(
            f"The split's bytes are not text, so it has no {metric}. Ask for bits-per-byte."
        )
    screen.write(f"{figures[key]:.6f}\n")


def _warn(screen: Screen, figures: dict) -> None:
    if figures["unknown"]:
        screen.warn(
            f"{figures['unknown']:,} characters that the vocabulary lacks were left out: the "
            "figure is not comparable with others."
        )
    if figures["data"] and not figures["own_corpus"]:
        screen.warn(
            f"Evaluated on {figures['corpus']}, which is not the corpus the run was trained on."
        )
