"""seqlm prepare: text -> a corpus of symbols."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

from seqlm.cli._app import command
from seqlm.cli._flags import OUTPUT, argument, flag, switch
from seqlm.errors import UsageError
from seqlm.ui import Screen, readable

SYMBOLS, TEXT, CORPUS = "Symbols", "Text", "Corpus"  # panels of --help


def _split(name: str) -> Any:
    return flag(f"Text of the {name} split.", TEXT, "FILE")


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
        argument(
            "Files, folders, globs, archives, - (standard input), or a known corpus.", "SOURCE"
        ),
    ] = None,
    unit: Annotated[
        str | None, flag("Kind of symbol. Default: char.", SYMBOLS, "char|byte|sentencepiece")
    ] = None,
    vocab_size: Annotated[
        int | None,
        flag("Number of symbols with --unit sentencepiece. Default: 1024.", SYMBOLS, "N"),
    ] = None,
    model_type: Annotated[
        str | None, flag("Algorithm of sentencepiece.", SYMBOLS, "unigram|bpe")
    ] = None,
    documents: Annotated[
        str, flag("Make every line or file a separate document.", TEXT, "none|lines|files")
    ] = "none",
    answers: Annotated[
        str | None,
        flag("Lines are a question, MARK and an answer; only answers are learned.", TEXT, "MARK"),
    ] = None,
    split: Annotated[
        str | None,
        flag("Percent of the text in train, val, test. Default: 90,5,5.", TEXT, "P,P[,P]"),
    ] = None,
    train: Annotated[str | None, _split("train")] = None,
    val: Annotated[str | None, _split("val")] = None,
    test: Annotated[str | None, _split("test")] = None,
    encoding: Annotated[
        str | None,
        flag("Encoding, if not UTF-8; or several to try, separated by commas.", TEXT, "NAME"),
    ] = None,
    given: Annotated[
        Path | None, flag("Read the known corpus from this file.", TEXT, "FILE", "--from")
    ] = None,
    show: Annotated[bool, switch("List the known corpora and exit.", OUTPUT, "--list")] = False,
    out: Annotated[
        Path | None, flag("Folder to write. Default: data/CORPUS.", CORPUS, "DIR")
    ] = None,
    force: Annotated[bool, switch("Replace a corpus that exists.", CORPUS, "--force")] = False,
) -> None:
    """Prepare text for training: write its splits and its vocabulary into data/."""
    from seqlm.text import prepare as stage

    if show:
        if sources:
            raise UsageError(f"--list shows all corpora. Remove {sources[0]}, or --list.")
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
            file=given,
            encoding=encoding,
            force=force,
            tick=bar.update,
        )
    screen.warn(*warnings)
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
        ["alphabet", f"{card['alphabet']:,} distinct {per}s"],
        ["rarest (count)", rarest],
        ["suspected mojibake", f"{card['suspected_mojibake']:,} places"],
        ["repeated lines", f"{card['duplicate_share']:.1%} of the bytes"],
        ["baseline: unigrams", f"{card['unigram_bits_per_char']:.3f} bits per {per}"],
        ["baseline: xz -9", f"{card['xz_bits_per_char']:.3f} bits per {per}{part}"],
    ]


def _list(screen: Screen) -> None:
    from seqlm.text.corpora import KNOWN, NAMES
    from seqlm.text.synthetic import DIAGNOSTICS

    keys = "corpus", "unit", "about", "address"
    rows: list[Sequence[Any]] = [(*keys[:3], "download address")]
    corpora: list[dict[str, Any]] = []
    for known in KNOWN.values():
        row = known.name, known.unit, known.about, known.address or None
        rows.append(row)
        corpora.append(dict(zip(keys, row, strict=True)))
    for made in DIAGNOSTICS.values():
        options = ",".join(f"{key}={value}" for key, value in made.defaults.items())
        rows.append((made.name, "char", f"{made.about}; {made.name}:{options}", None))
        own = dict(zip(keys, (made.name, "char", made.about, None), strict=True))
        corpora.append({**own, "options": dict(made.defaults)})
    screen.product({"corpora": corpora, "names": " ".join(NAMES)}, "names", rows)
    screen.hint("seqlm prepare CORPUS")
