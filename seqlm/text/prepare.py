"""Prepares a corpus from text.  It is written completely or not at all; corpus.py has its format.

Memory does not grow with the size of the text.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seqlm.errors import InputError, SeqlmError, UsageError, unknown
from seqlm.files import to_json
from seqlm.manifest import listed, seal
from seqlm.progress import OnProgress, silent
from seqlm.temporary import bring_back, new_folder
from seqlm.text import corpora
from seqlm.text.card import Card, measure, xz
from seqlm.text.corpora import Choice
from seqlm.text.corpus import (
    CHARACTERS,
    CORPUS_FILES,
    DATA,
    END_TYPE,
    MANIFEST,
    SCHEMA,
    narrowest,
)
from seqlm.text.sources import encodings
from seqlm.text.splits import divide
from seqlm.text.staging import Draft, code_points
from seqlm.text.tokenizer import (
    LARGEST_VOCABULARY,
    MODEL_TYPES,
    SMALLEST_VOCABULARY,
    TOKENIZER_FILE,
    UNITS,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    train_sentencepiece,
)

BYTE_ORDER_MARK, CARRIAGE_RETURN = 0xFEFF, 13
VOCAB_SIZE = 1024
LARGE_VAL = 5_000_000  # bytes: the val split of enwik8 and text8, the largest in common use
# sentencepiece learns its pieces from this many bytes, taken from this many places
SAMPLE, SAMPLE_PARTS = 10_000_000, 100


def prepare(
    sources: Sequence[str] = (),
    *,
    unit: str | None = None,
    vocab_size: int | None = None,
    model_type: str | None = None,
    documents: str = "none",
    answers: str | None = None,
    split: str | None = None,
    parts: Mapping[str, str] | None = None,
    out: Path | None = None,
    file: Path | None = None,
    encoding: str | None = None,
    force: bool = False,
    named: Sequence[str] | None = None,
    tick: OnProgress = silent,
) -> tuple[Path, dict[str, Any], list[str]]:
    """Prepare a known corpus, or the user's files, into `out` (data/<corpus> if None).

    answers: the character before each line's answer.  Only answers are learned and counted, and
    lines are documents then.  split: percent of train, val and test, "90,5,5" if None.
    parts: {split: source}, which replaces `sources` and `split`.
    file: the file of a known corpus, to use instead of a download.
    named: what the manifest records as the sources, where they are copies of these.
    Returns the folder, its manifest, and warnings about the text.
    Raises InputError for a text that cannot be read, is too short to split, or cannot be
    represented in `unit`; UsageError for options that cannot be combined, and for a folder that
    exists, unless `force` is True.
    """
    choice = corpora.choose(sources, parts, split, documents, file, encoding)
    symbols = _symbols(choice, unit, vocab_size, model_type)
    mark = _mark(answers, choice, parts, documents, symbols.unit)
    documents = "lines" if mark else documents
    readable = encodings_of(symbols.unit, encoding)
    options = _options(unit, vocab_size, model_type, documents, answers, split, parts, encoding)
    folder = out or DATA / (choice.name if unit in (None, "char") else f"{choice.name}-{unit}")
    _refuse_to_overwrite(folder, force)
    with (
        new_folder(folder, lambda: _refuse_to_overwrite(folder, force)) as aside,
        _draft(aside, documents, readable) as draft,
        ThreadPoolExecutor(1) as second_core,
    ):
        choice.fill(draft, tick)
        if not draft.size:
            raise InputError("The text is empty. Name a file with text in it.")
        card = measure(draft, tick, as_text=choice.unit != "byte")
        if choice.shares:
            divide(draft, choice.shares, card.chars)
        _refuse_empty_splits(draft, choice)
        draft.flush()
        # xz releases Python's lock, so it runs while the splits are written
        packed = second_core.submit(xz, draft.path)
        tokenizer = _tokenizer(symbols, draft, card, mark)
        in_bytes = choice.unit == "byte"  # papers on such a corpus count bytes as characters
        count = len if in_bytes else code_points if card.chars is not None else None
        splits = {s: _write_split(aside, s, draft, tokenizer, count, tick) for s in draft.splits}
        (aside / TOKENIZER_FILE).write_text(to_json(tokenizer.to_dict()), encoding="utf-8")
        files = [path for path in aside.iterdir() if path != draft.path]
        manifest = seal(
            {
                "schema": SCHEMA,
                "label": choice.label,
                "verified": draft.verified,
                "sources": as_recorded(sources if named is None else named),
                "text_sha256": draft.sha256 if choice.from_user else None,
                "options": options,
                "unit": symbols.unit,
                "documents": documents,
                "characters": CHARACTERS[in_bytes],
                "vocab_size": tokenizer.vocab_size,
                "dtype": narrowest(tokenizer.vocab_size),
                "splits": splits,
                "card": card.to_dict(packed.result()),
                "files": listed(files, "sha256", "spot_sha256"),
            }
        )
        (aside / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    return folder, manifest, _warnings(choice, draft, card, tokenizer, symbols)


def as_recorded(sources: Sequence[str]) -> list[str]:
    """The sources as a manifest has them, where what cannot be printed is an escape."""
    return [repr(str(source))[1:-1] for source in sources]


def encodings_of(unit: str, encoding: str | None) -> list[str]:
    """The encodings to try in turn; none where the symbols are the bytes of the file."""
    return [] if unit == "byte" and encoding is None else encodings(encoding)


def _options(
    unit: str | None,
    vocab_size: int | None,
    model_type: str | None,
    documents: str,
    answers: str | None,
    split: str | None,
    parts: Mapping[str, str] | None,
    encoding: str | None,
) -> dict[str, str]:
    """{option: value} of the options with which the user would have to prepare the text again."""
    options = {"unit": unit, "vocab-size": vocab_size, "model-type": model_type, "answers": answers}
    options |= {"documents": None if documents == "none" or answers else documents}
    options |= {"split": split, "encoding": encoding, **dict.fromkeys(parts or {}, "FILE")}
    return {f"--{name}": str(value) for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class _Symbols:
    """The kind of symbols into which the text is converted."""

    unit: str
    vocab_size: int
    model_type: str


def _symbols(
    choice: Choice, unit: str | None, vocab_size: int | None, model_type: str | None
) -> _Symbols:
    if unit is not None and unit not in UNITS:
        raise unknown("unit", unit, UNITS)
    if choice.unit == "byte" and unit not in (None, "byte"):
        raise UsageError(f"{choice.name} is defined in bytes. Remove --unit {unit}.")
    if choice.answers and unit not in (None, "char"):
        raise UsageError(
            f"{choice.label} is a fixed corpus and does not take --unit {unit}. Remove --unit."
        )
    unit = unit or choice.unit
    if unit != "sentencepiece" and (vocab_size is not None or model_type is not None):
        raise UsageError(
            f"--vocab-size and --model-type need --unit sentencepiece, but the unit is {unit}. "
            "Remove these options, or give --unit sentencepiece."
        )
    size = VOCAB_SIZE if vocab_size is None else vocab_size
    model_type = model_type or MODEL_TYPES[0]
    if model_type not in MODEL_TYPES:
        raise unknown("value of --model-type", model_type, MODEL_TYPES)
    if not SMALLEST_VOCABULARY <= size <= LARGEST_VOCABULARY:
        raise UsageError(
            f"--vocab-size {size}: it must be from {SMALLEST_VOCABULARY} to "
            f"{LARGEST_VOCABULARY:,}, because 256 symbols are needed for the bytes."
        )
    return _Symbols(unit, size, model_type)


def _mark(
    answers: str | None, choice: Choice, parts: Mapping[str, str] | None, documents: str, unit: str
) -> str:
    """The character before each answer; "" if the whole text counts.

    Raises UsageError for an impossible character, and for options that exclude answers.
    """
    if answers is None:
        return choice.answers
    if choice.shares is None and not parts:
        raise UsageError(
            f"{choice.label} is a fixed corpus and does not take --answers. Remove --answers."
        )
    if len(answers) != 1 or answers in "\r\n":
        raise UsageError(f"--answers {answers!r}: give one character, the one before each answer.")
    if documents == "files" or unit != "char":
        raise UsageError(
            "Answers are characters at the ends of lines. Remove --documents and --unit."
        )
    return answers


def _refuse_to_overwrite(folder: Path, force: bool) -> None:
    bring_back(folder)
    if not os.path.lexists(folder):
        return
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} exists and is not a corpus. Choose another place with --out.")
    if not force:
        raise UsageError(
            f"{folder} exists. Replace it with --force, or choose another place with --out DIR."
        )
    if folder.samefile(Path.cwd()):  # the shell would stay in the deleted folder
        raise UsageError(
            f"{folder} is the current folder, which --force would replace by another. Run seqlm "
            "from another folder."
        )
    others = [p.name for p in folder.iterdir() if p.name not in CORPUS_FILES or not p.is_file()]
    if others:
        raise UsageError(
            f"{folder} also holds {others[0]}, which --force would delete. Move it, or choose "
            "another place with --out DIR."
        )


@contextmanager
def _draft(aside: Path, documents: str, readable: list[str]) -> Iterator[Draft]:
    """A draft beside the files of the corpus, deleted when the block ends."""
    draft = Draft(aside / "draft", documents, readable)
    try:
        yield draft
    finally:
        draft.close()
        draft.path.unlink()


def _refuse_empty_splits(draft: Draft, choice: Choice) -> None:
    empty = [split for split, (start, end) in draft.splits.items() if start >= end]
    if empty and not choice.shares:
        raise InputError(
            f"The text of the {empty[0]} split is empty. Name a source with text in it."
        )
    if empty and draft.documents != "none":
        raise InputError(
            f"Too few distinct {draft.documents}: the {empty[0]} split would be empty. Prepare "
            f"more {draft.documents}, or name a text for each split with --train, --val and --test."
        )
    if empty:
        raise InputError(
            f"The text is too short to split: it has {draft.size:,} bytes, and the {empty[0]} "
            "split would be empty. Name more text."
        )


def _tokenizer(symbols: _Symbols, draft: Draft, card: Card, answers: str) -> Tokenizer:
    """The tokenizer of the unit, with the alphabet of all splits, and with pieces learned from the
    train split only."""
    if symbols.unit == "byte":
        return ByteTokenizer(draft.documents)
    if answers and not card.counts[ord(answers)]:
        raise InputError(f"No line has an answer after a {answers!r}. Choose another --answers.")
    if answers and card.counts[CARRIAGE_RETURN]:
        raise InputError(
            "Lines end with a carriage return, which would become part of their answers. Remove "
            "the carriage returns first: tr -d '\\r'"
        )
    if symbols.unit == "char":
        return CharTokenizer("".join(map(chr, card.alphabet)), draft.documents, answers)
    text = _sample(draft)
    model = train_sentencepiece(text, card.by_frequency, symbols.vocab_size, symbols.model_type)
    return SentencePieceTokenizer(model, draft.documents)


def _sample(draft: Draft) -> Iterator[bytes]:
    """The train split, or 10 MB of it from evenly spaced places where it is larger."""
    start, end = draft.splits["train"]
    if end - start <= SAMPLE:
        yield from draft.chunks((start, end))
        return
    length = SAMPLE // SAMPLE_PARTS
    for place in range(start, end - length, (end - start) // SAMPLE_PARTS):
        yield from draft.chunks((place, place + length))


def _write_split(
    aside: Path,
    split: str,
    draft: Draft,
    tokenizer: Tokenizer,
    count: Callable[[bytes], int] | None,
    tick: OnProgress,
) -> dict[str, Any]:
    """Write the symbols of a split and the ends of its documents; return its counts.

    count: counts the characters of a text; None if the text is not UTF-8.
    Raises InputError for a line without an answer, if answers are used.
    """
    text, size, chars, tokens, documents = hashlib.sha256(), 0, 0, 0, 0
    dtype = narrowest(tokenizer.vocab_size)
    ends_path = aside / f"{split}.ends"
    with (aside / f"{split}.bin").open("wb") as file, ends_path.open("wb") as ends_file:
        for chunk, last in draft.documents_of(split):
            encode = tokenizer.encode_document if last else tokenizer.encode
            ids = encode(chunk)
            if tokenizer.decode_bytes(ids) != chunk:
                raise SeqlmError(
                    f"The symbols of the {split} split do not decode to its text. This is a bug in "
                    "seqlm: please report it, together with the text."
                )
            file.write(ids.astype(dtype).tobytes())
            if tokenizer.end is not None:
                ends = tokens + 1 + np.flatnonzero(ids == tokenizer.end)
                ends_file.write(ends.astype(END_TYPE).tobytes())
                documents += len(ends)
            text.update(chunk)
            tokens, size = tokens + len(ids), size + len(chunk)
            chars += count(chunk) if count else 0
            tick(0.5 + 0.5 * (draft.splits[split][0] + size) / draft.size, "encoding")
    if tokenizer.end is None:
        ends_path.unlink()
    if tokenizer.mark:
        symbols = np.memmap(aside / f"{split}.bin", dtype, mode="r")
        tokenizer.answers(symbols, np.memmap(ends_path, END_TYPE, mode="r"))
    return {
        "chars": chars if count else None,
        "bytes": size,
        "tokens": tokens,
        "documents": documents if tokenizer.end is not None else None,
        "sha256": text.hexdigest(),
    }


def _warnings(
    choice: Choice, draft: Draft, card: Card, tokenizer: Tokenizer, symbols: _Symbols
) -> list[str]:
    warnings = []
    if choice.from_user and choice.name in corpora.KNOWN:
        warnings.append(
            f"This corpus has the name of the known corpus {choice.name}, but its own splits. So "
            "its figures cannot be compared with published ones. For the published splits: seqlm "
            f"prepare {choice.name} --from FILE"
        )
    if draft.left_out:
        shown = ", ".join(draft.left_out[:3]) + (", ..." if len(draft.left_out) > 3 else "")
        warnings.append(
            f"Left out, because they are not UTF-8 ({len(draft.left_out)}): {shown}. To read such "
            "files in another encoding: --encoding utf-8,cp1252"
        )
    if draft.unreadable:
        warnings.append(f"Left out ({len(draft.unreadable)}): {draft.unreadable[0]}")
    if draft.empty_lines:
        warnings.append(f"{draft.empty_lines:,} empty lines were left out: they are not documents.")
    if card.counts[0]:
        warnings.append(
            f"The text holds {card.counts[0]:,} NUL characters, kept as they are. If it is UTF-16, "
            "prepare it again with --encoding utf-16."
        )
    if card.chars is not None and card.counts[BYTE_ORDER_MARK]:
        warnings.append(
            f"The text holds {card.counts[BYTE_ORDER_MARK]:,} byte order marks (U+FEFF), kept as "
            "characters. To read files without theirs: --encoding utf-8-sig"
        )
    if card.mojibake:
        warnings.append(
            f"{card.mojibake:,} places look like text that was decoded with a wrong encoding "
            "earlier (mojibake). They are kept as they are."
        )
    if draft.size_of("val") > LARGE_VAL:
        warnings.append(
            f"The val split has {draft.size_of('val'):,} bytes, and every validation reads all of "
            "them. For a smaller one: --split 99,0.5,0.5"
        )
    if symbols.unit == "sentencepiece" and tokenizer.text_symbols < symbols.vocab_size:
        warnings.append(
            f"The text gave {tokenizer.text_symbols:,} symbols, fewer than --vocab-size "
            f"{symbols.vocab_size:,}."
        )
    return warnings
