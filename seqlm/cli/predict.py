"""seqlm predict: a run and a text -> the probabilities of the next character."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from seqlm.cli._app import command, read_source
from seqlm.cli._flags import Rounding, argument, flag, switch
from seqlm.errors import InputError, UsageError
from seqlm.ui import Screen

if TYPE_CHECKING:
    import numpy as np

PREDICTION = "Prediction"  # a panel of --help
LIKELIEST = 10  # characters in the table


@command(
    "predict",
    'seqlm predict "ROMEO"',
    'seqlm predict "the ca" --symbols tpr',
    "seqlm predict - --top 5 --run poems-lem",
)
def predict(
    screen: Screen,
    reading: Rounding,
    text: Annotated[
        str, argument("Text before the character; -: standard input. Default: none.", "TEXT|-")
    ] = "",
    symbols: Annotated[
        str | None,
        flag("Choose among these characters: their probabilities sum to 1.", PREDICTION, "ABC"),
    ] = None,
    top: Annotated[
        int | None,
        flag(
            f"Show the N likeliest characters; 0: all. Default: {LIKELIEST}; all of --symbols, and "
            "all with --json.",
            PREDICTION,
            "N",
        ),
    ] = None,
    nats: Annotated[
        bool, switch("Show -ln p in nats, not -log2 p in bits.", PREDICTION, "--nats")
    ] = False,
) -> None:
    """Show the probability of each character that may come next."""
    if top is not None and top < 0:
        raise UsageError(f"--top {top}: it must be at least 1, or 0 for all.")
    if top is None:
        top = LIKELIEST if symbols is None and not screen.json else 0
    loaded = reading.load(screen)
    raw = read_source("TEXT", text) if text == "-" else text.encode("utf-8", "surrogateescape")

    from seqlm.generation.context import last_document

    symbols_before = last_document(loaded.tokenizer, loaded.tokenizer.encode(raw))
    predictor = loaded.predictor().feed_symbols(symbols_before[None])
    probabilities = predictor.probabilities()
    if symbols is None:
        found = _added(predictor.symbols, probabilities)
    else:
        found = _among(symbols, loaded.tokenizer.texts, probabilities)
    likeliest = sorted(found.items(), key=lambda item: -item[1])[: top or None]
    unit, base = ("nats", 1.0) if nats else ("bits", math.log(2))
    rows: list[list[Any]] = [
        [symbol, p, max(0.0, -math.log(p) / base) if p else math.inf] for symbol, p in likeliest
    ]
    result: dict[str, Any] = {
        "run": str(loaded.path),
        "step": loaded.step,
        "text": raw.decode("utf-8", "replace"),
        "next": [{"symbol": symbol, "probability": p} for symbol, p, _ in rows],
        "backend": loaded.runtime.backend.value,
    }
    if screen.quiet and not screen.json:
        screen.write(f"{rows[0][0]}\n")
        return
    shown = [[_shown(symbol), f"{p:.6f}", f"{surprise:.3f}"] for symbol, p, surprise in rows]
    if len(rows) < len(found):
        screen.note(f"The {len(rows)} likeliest of {len(found)} are shown. To show all: --top 0")
    screen.product(result, "text", [["next", "probability", unit], *shown])


def _added(symbols: Iterable[str], probabilities: "np.ndarray") -> dict[str, float]:
    """{text: probability}; symbols may have the same text: a byte and a piece."""
    found: dict[str, float] = defaultdict(float)
    for symbol, p in zip(symbols, probabilities.tolist(), strict=True):
        found[symbol] += p
    return found


def _among(chosen: str, texts: Sequence[bytes], probabilities: "np.ndarray") -> dict[str, float]:
    """The probabilities of some characters, on condition that one of them comes next.

    A character's is the sum over the symbols whose text begins with it.
    """
    found: dict[str, float] = {}
    for character in dict.fromkeys(chosen):
        own = character.encode("utf-8", "surrogateescape")
        begins = [i for i, text in enumerate(texts) if text.startswith(own)]
        if not begins:
            raise InputError(
                f"--symbols: no symbol of the run's vocabulary begins with {character!r}. Remove "
                "it."
            )
        found[character] = math.fsum(probabilities[begins])
    whole = math.fsum(found.values())
    if not whole:
        raise InputError(f"None of {chosen!r} can come next: their probability is 0.")
    return {character: p / whole for character, p in found.items()}


def _shown(symbol: str) -> str:
    """A symbol as in Python's strings, without the quotes; what ends a document has a name."""
    return repr(symbol) if symbol else "end of the document"
