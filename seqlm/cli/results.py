"""seqlm results: figures that were measured, and how to measure them again."""

from typing import TYPE_CHECKING, Annotated, Any

from seqlm.cli._app import command
from seqlm.cli._complete import one_of
from seqlm.cli._flags import argument, switch
from seqlm.errors import UsageError
from seqlm.ui import Screen, duration

if TYPE_CHECKING:
    from seqlm.lab.results import Again, Result

# the columns that a narrow terminal does without, the first one first
SPARED = ("date", "seeds", "training", "parameters", "published", "text", "cell")


def _offered(incomplete: str) -> list[str]:
    """What the shell offers."""
    from seqlm.lab import results as lab

    return one_of(*lab.read())(incomplete)


@command("results", "seqlm results", "seqlm results mingru-5m", "seqlm results mingru-5m --run")
def results(
    screen: Screen,
    name: Annotated[
        str | None, argument("Result to show. Default: list all results.", "NAME", _offered)
    ] = None,
    run: Annotated[
        bool,
        switch("Train the result again, into the run results-NAME, and compare.", "Run", "--run"),
    ] = False,
) -> None:
    """List measured results, show one with its command, or train it again and compare."""
    if run and name is None:
        raise UsageError("--run trains one result. Name it: seqlm results NAME --run")

    from seqlm.lab import results as lab

    found = [lab.named(name)] if name is not None else [*lab.read().values()]
    product: dict[str, Any] = {"results": [result.to_dict() for result in found]}
    product["names"] = " ".join(result.name for result in found)
    if name is None:
        rows = [[*lab.HEADINGS], *map(lab.row, found)]
        screen.product(product, "names", rows, SPARED)
        screen.hint("seqlm results NAME")
        return
    result = found[0]
    if not run:
        screen.product({**product, "command": result.command}, "command", _figures(result))
        screen.hint(f"seqlm results {result.name} --run")
        return
    screen.note(f"{result.command} --run results-{result.name}")
    with screen.progress("training") as bar:
        again = lab.again(result, f"results-{result.name}", bar.update)
    product |= {"command": result.command, "bits_per_char": again.bits_per_char}
    product["again"] = again.to_dict()
    screen.product(product, "bits_per_char", [*_figures(result), *_compared(result, again)])


def _figures(result: "Result") -> list[list[Any]]:
    """A result, figure by figure."""
    published = result.published
    rows = [
        ["figure", "value"],
        *([name, getattr(result, name)] for name in ("name", "corpus", "split", "protocol")),
        ["parameters", result.params],
        ["bits per char", result.bits_per_char],
        ["spread", "one seed" if result.spread is None else result.spread],
        *([f"seed {run.seed}", _read(run.bits_per_char, run.chars)] for run in result.runs),
        ["machine", result.machine],
        ["date", result.date.isoformat()],
    ]
    if published is not None:
        rows.append(["published", f"{published.bits_per_char}: {published.source}"])
    return [*rows, ["command", result.command]]


def _compared(result: "Result", again: "Again") -> list[list[Any]]:
    """What training again has given, beside the result."""
    from seqlm.lab.results import WITHIN

    verdict = "no spread is known from one seed"
    if result.spread is not None:
        word = "within" if again.within else "not within"
        verdict = f"{word} {WITHIN} x {result.spread:.4f}, the standard deviation over the seeds"
    before = "an unknown number" if again.chars_before is None else f"{again.chars_before:,}"
    return [
        ["again: run", again.run],
        ["again: bits per char", again.bits_per_char],
        ["again: difference", f"{again.difference:+.4f}, {verdict}"],
        ["again: characters read", f"{again.chars:,} in {duration(again.seconds)}"],
        ["characters that the result read", before],
    ]


def _read(bits: float, chars: int | None) -> str:
    return f"{bits:.4f}" + ("" if chars is None else f" after {chars:,} characters")
