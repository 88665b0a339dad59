"""seqlm prepare: text -> tokens."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from seqlm.cli import _complete
from seqlm.cli._app import command
from seqlm.cli._flags import OUTPUT, choice, flag, switch
from seqlm.errors import UsageError
from seqlm.ui import Screen, readable

SYMBOLS, TEXT, CORPUS = "Symbols", "Text", "Corpus"  # panels of --help


def _split(name: str) -> Any:
    return flag(f"The text of the {name} split.", TEXT, "FILE", _complete.files)


@command(
    "prepare",
    "seqlm prepare poems.txt letters/",
    "seqlm prepare names.txt --documents lines",
    "seqlm prepare tinyshakespeare",
)
def prepare(
    screen: Screen,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="Text: files, folders, globs, archives, or - for standard input; or a corpus of "
            "--list.",
            autocompletion=_complete.sources,
        ),
    ] = None,
    unit: Annotated[
        str | None,
        choice(
            "What a symbol of the text is; char by default.",
            SYMBOLS,
            "char",
            "byte",
            "sentencepiece",
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        flag("Number of symbols with --unit sentencepiece; 1024 by default.", SYMBOLS, "N"),
    ] = None,
    model_type: Annotated[
        str | None, choice("How sentencepiece learns its symbols.", SYMBOLS, "unigram", "bpe")
    ] = None,
    documents: Annotated[
        str,
        choice("Treat every line or file as a separate text.", TEXT, "none", "lines", "files"),
    ] = "none",
    answers: Annotated[
        str | None,
        flag(
            "Every line is a question and an answer, with this character between them; only "
            "answers are learned and evaluated.",
            TEXT,
            "MARK",
        ),
    ] = None,
    split: Annotated[
        str | None,
        flag("Percent of the text for train, val and test; 90,5,5 by default.", TEXT, "P,P[,P]"),
    ] = None,
    train: Annotated[str | None, _split("train")] = None,
    val: Annotated[str | None, _split("val")] = None,
    test: Annotated[str | None, _split("test")] = None,
    encoding: Annotated[
        str | None,
        flag(
            "Encoding of the files if not UTF-8; several, separated by commas, are tried in turn.",
            TEXT,
            "NAME",
        ),
    ] = None,
    given: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Read a known corpus from this file instead of downloading it.",
            rich_help_panel=TEXT,
            autocompletion=_complete.files,
        ),
    ] = None,
    show: Annotated[bool, switch("List the known corpora and exit.", OUTPUT, "--list")] = False,
    out: Annotated[
        Path | None, flag("Folder to write; data/CORPUS by default.", CORPUS, "DIR")
    ] = None,
    force: Annotated[
        bool, switch("Replace a corpus that is already prepared.", CORPUS, "--force")
    ] = False,
) -> None:
    """Prepare text for training: write its symbols, its splits and its alphabet into data/."""
    from seqlm.text import prepare as stage

    if show:
        if sources:
            raise UsageError(f"--list shows all corpora. Leave out {sources[0]}, or --list.")
        _list(screen)
        return
    parts = {"train": train, "val": val, "test": test}
    with screen.progress("preparing") as bar:
        folder, manifest, warnings = stage.prepare(
            sources or [],
            unit=unit,
            vocab_size=vocab_size,
            model_type=model_type,
            documents=documents,
            answers=answers,
            split=split,
            parts={name: source for name, source in parts.items() if source is not None},
            out=out,
            given=given,
            encoding=encoding,
            force=force,
            tick=bar.update,
        )
    for warning in warnings:
        screen.warn(warning)
    screen.note(f"{folder}: {manifest['label']}, {manifest['vocab_size']} symbols")
    if manifest["verified"]:
        screen.note(f"verified: {manifest['verified']}")
    screen.aside(_card(manifest))
    rows = [["split", "chars", "bytes", "tokens", "documents", "sha256"]]
    for name, counts in manifest["splits"].items():
        figures = [counts[key] for key in ("chars", "bytes", "tokens", "documents")]
        rows.append([name, *figures, counts["sha256"][:16]])
    kept = ("label", "verified", "unit", "documents", "characters", "vocab_size", "splits", "card")
    result = {"data": str(folder), **{key: manifest[key] for key in kept}, "warnings": warnings}
    screen.product(result, "data", rows)
    screen.hint(f"seqlm train --data {quote(str(folder))}")


def _card(manifest: dict[str, Any]) -> list[list[str]]:
    """The data card as a table."""
    card = manifest["card"]
    per = "byte" if card["chars"] is None else "character"
    rarest = ", ".join(f"{symbol!r} {count:,}" for symbol, count in card["rarest"])
    whole, mb = card["xz_of_bytes"] == card["bytes"], card["xz_of_bytes"] / 1e6
    part = "" if whole else f", on the first {mb:g} MB"
    documents = [counts["documents"] for counts in manifest["splits"].values()]
    return [
        ["data card", ""],
        ["characters", "-" if card["chars"] is None else readable(card["chars"])],
        ["bytes", readable(card["bytes"])],
        ["lines", readable(card["lines"])],
        *([] if None in documents else [["documents", readable(sum(documents))]]),
        ["alphabet", f"{card['alphabet']:,} different {per}s"],
        ["rarest", rarest],
        ["suspected mojibake", f"{card['suspected_mojibake']:,} places"],
        ["repeated lines", f"{card['duplicate_share']:.1%} of the bytes"],
        ["to beat: unigrams", f"{card['unigram_bits_per_char']:.3f} bits per {per}"],
        ["to beat: xz -9", f"{card['xz_bits_per_char']:.3f} bits per {per}{part}"],
    ]


def _list(screen: Screen) -> None:
    from seqlm.text.corpora import KNOWN, NAMES
    from seqlm.text.synthetic import DIAGNOSTICS

    rows = [["corpus", "unit", "about", "downloaded from"]]
    corpora: list[dict[str, Any]] = []
    for known in KNOWN.values():
        rows.append([known.name, known.unit, known.about, known.address or "-"])
        corpora.append(
            {
                "corpus": known.name,
                "unit": known.unit,
                "about": known.about,
                "address": known.address or None,
            }
        )
    for made in DIAGNOSTICS.values():
        options = ",".join(f"{key}={value}" for key, value in made.defaults.items())
        rows.append([made.name, "char", f"{made.about}; {made.name}:{options}", "-"])
        own = {"corpus": made.name, "unit": "char", "about": made.about, "address": None}
        corpora.append({**own, "options": dict(made.defaults)})
    screen.product({"corpora": corpora, "names": " ".join(NAMES)}, "names", rows)
    screen.hint("seqlm prepare CORPUS")
