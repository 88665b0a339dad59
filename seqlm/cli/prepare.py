"""seqlm prepare: text -> tokens."""

from pathlib import Path
from typing import Annotated

import typer

from seqlm.cli._app import command
from seqlm.ui import Screen


@command("prepare")
def prepare(
    screen: Screen,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="stdlib, tinyshakespeare, ptb-char; files, folders, globs; - for stdin.",
        ),
    ] = None,
    unit: Annotated[str, typer.Option(metavar="char|byte", help="What a symbol is.")] = "char",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write; data/<corpus> by default.")
    ] = None,
    given: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="The file of a corpus known by name."),
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the files, where it is not UTF-8.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a prepared corpus.")] = False,
) -> None:
    """Turn text into a corpus that can be trained on.

    seqlm prepare poems.txt letters/   ·   seqlm prepare tinyshakespeare --from input.txt
    """
    from seqlm import prepare as stage

    folder, manifest, warnings = stage.prepare(
        sources or [], unit=unit, out=out, given=given, encoding=encoding, force=force
    )
    for warning in warnings:
        screen.warn(warning)
    rows = [["split", "chars", "bytes", "tokens", "sha256"]]
    for split, counts in manifest["splits"].items():
        figures = [counts[key] for key in ("chars", "bytes", "tokens")]
        rows.append([split, *figures, counts["sha256"][:16]])
    screen.note(f"{folder}: {manifest['label']}, {manifest['vocab_size']} symbols ({unit})")
    result = {
        "data": str(folder),
        **{key: manifest[key] for key in ("label", "unit", "vocab_size")},
        "splits": {
            split: {key: counts[key] for key in ("chars", "bytes", "tokens", "sha256")}
            for split, counts in manifest["splits"].items()
        },
    }
    screen.product(result, "data", rows)
    screen.hint(f"seqlm train --data {folder}")
