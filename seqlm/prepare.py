"""Text -> a prepared corpus: token files, tokenizer and manifest, written whole or not at all.

    data/<corpus>/  manifest.json  tokenizer.json  train.bin  val.bin  test.bin

A token file holds the symbols of a split, little-endian, in the narrowest unsigned type that fits.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from seqlm import corpora
from seqlm.corpora import Text, characters
from seqlm.errors import InputError, SeqlmError, UsageError
from seqlm.storage import new_folder, seal, sha256, to_json
from seqlm.tokenizer import FILE as TOKENIZER_FILE
from seqlm.tokenizer import Tokenizer, train_tokenizer

DATA = Path("data")
MANIFEST = "manifest.json"
SCHEMA = 1


def prepare(
    sources: list[str],
    *,
    unit: str = "char",
    out: Path | None = None,
    given: Path | None = None,
    encoding: str | None = None,
    force: bool = False,
) -> tuple[Path, dict[str, Any], list[str]]:
    """Prepare a corpus known by name, or the user's files, into `out` (data/<corpus> if None).

    Returns the folder, its manifest, and warnings about what looked wrong in the text.
    Raises InputError for text that cannot be read, is too short to split or holds what `unit`
    cannot; UsageError where the folder exists and `force` is not given.
    """
    text = corpora.read(sources, given, encoding, any_bytes=unit == "byte" and encoding is None)
    folder = out or DATA / (text.name if unit == "char" else f"{text.name}-{unit}")
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} exists and is not a corpus. Choose another place with --out.")
    if folder.exists() and not force:
        raise UsageError(
            f"{folder} exists. Replace it with --force, or choose another place with --out DIR."
        )
    _refuse_what_cannot_be_split(text)
    tokenizer = train_tokenizer(unit, list(text.splits.values()))
    with new_folder(folder) as aside:
        splits = {
            split: _write_split(aside, split, data, tokenizer)
            for split, data in text.splits.items()
        }
        (aside / TOKENIZER_FILE).write_text(to_json(tokenizer.to_dict()), encoding="utf-8")
        manifest = seal(
            {
                "schema": SCHEMA,
                "label": text.label,
                "unit": unit,
                "vocab_size": tokenizer.vocab_size,
                "dtype": narrowest(tokenizer.vocab_size),
                "tokenizer_sha256": sha256(aside / TOKENIZER_FILE),
                "splits": splits,
            }
        )
        (aside / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    return folder, manifest, _warnings(text)


def _warnings(text: Text) -> list[str]:
    warnings = []
    if text.left_out:
        shown = ", ".join(text.left_out[:3]) + (", ..." if len(text.left_out) > 3 else "")
        warnings.append(f"{len(text.left_out)} files are not UTF-8 text, left out: {shown}")
    nul = sum(data.count(0) for data in text.splits.values())
    if nul:
        warnings.append(
            f"The text holds {nul:,} NUL characters, kept as they are. If it is UTF-16, prepare "
            "it again with --encoding utf-16."
        )
    return warnings


def _refuse_what_cannot_be_split(text: Text) -> None:
    total = sum(map(len, text.splits.values()))
    if total == 0:
        raise InputError("The text is empty. Name a file with text in it.")
    for split, data in text.splits.items():
        if not data:
            raise InputError(
                f"The text is too short to split: of its {total} bytes none is left for the "
                f"{split} split. Name more text."
            )


def _write_split(aside: Path, split: str, data: bytes, tokenizer: Tokenizer) -> dict[str, Any]:
    ids = tokenizer.encode(data)
    if tokenizer.decode_bytes(ids) != data:
        raise SeqlmError(
            f"The {split} split does not come back from its symbols unchanged. This is a defect of "
            "seqlm: please report it, with the text."
        )
    path = aside / f"{split}.bin"
    ids.astype(narrowest(tokenizer.vocab_size)).tofile(path)
    return {
        "chars": characters(data),
        "bytes": len(data),
        "tokens": len(ids),
        "sha256": hashlib.sha256(data).hexdigest(),
        "file_sha256": sha256(path),
    }


def narrowest(vocab_size: int) -> str:
    """The little-endian numpy type that holds the symbols 0 .. vocab_size - 1."""
    return np.min_scalar_type(vocab_size - 1).newbyteorder("<").str
