"""Files compressed by a model: an entropy coder that uses the probabilities of each next symbol.

A packed file is

    HEADER | versions | what the vocabulary lacks | coded symbols | check

The header has MAGIC, 8 bytes of the SHA-256 of the model, 8 bytes of that of the data, the number
of symbols, and the lengths of the next two parts.  The versions name the software and the backend,
since the same probabilities have to come out when the file is unpacked.  The check is 8 bytes of
the SHA-256 of everything before it.  Numbers are little-endian.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from seqlm import __version__
from seqlm.errors import InputError
from seqlm.extras import extra
from seqlm.progress import OnProgress, silent
from seqlm.run import Run
from seqlm.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

MAGIC = b"seqlm"
HEADER = struct.Struct("<5s8s8sIIB")
CHECK = 8  # bytes of a hash that are kept
EVERY = 1000  # symbols between two reports of progress


def pack(run: Run, data: bytes, tick: OnProgress = silent) -> bytes:
    """The data, compressed by the run's model; `unpack` gives it back byte for byte.

    Any bytes are accepted: what the vocabulary lacks is kept beside the symbols.
    Raises SeqlmError if the library constriction is not installed.
    """
    coder, model_of = _coder()
    symbols, lacking = _symbols(run.tokenizer, data)
    encoder = coder.RangeEncoder()
    predictions = _Predictions(run)
    for done, symbol in enumerate(symbols.tolist()):
        encoder.encode(symbol, model_of(predictions.next(), perfect=False))
        predictions.read(symbol)
        if done % EVERY == 0:
            tick(done / len(symbols), f"{done:,} of {len(symbols):,} symbols")
    versions = _versions(run).encode("ascii")
    parts = len(symbols), len(lacking), len(versions)
    header = HEADER.pack(MAGIC, _model(run), _hash(data), *parts)
    coded = encoder.get_compressed().astype("<u4").tobytes()
    whole = header + versions + lacking + coded
    return whole + _hash(whole)


def unpack(run: Run, packed: bytes, tick: OnProgress = silent) -> bytes:
    """The data that was packed by the same model.

    Raises InputError for a damaged file, for another model, and where this machine computes other
    probabilities than the one that packed the file.  It never returns other data.
    """
    body = packed[:-CHECK]
    if not body.startswith(MAGIC) or len(body) < HEADER.size or _hash(body) != packed[-CHECK:]:
        raise InputError(
            "The file is damaged, or seqlm compress did not write it. Compress the original again."
        )
    _, model, digest, count, *lengths = HEADER.unpack_from(body)
    if model != _model(run):
        raise InputError(
            f"Another model than that of {run.path}, step {run.step}, compressed the file. Choose "
            "the run and the step with --run and --step."
        )
    lacking_size, versions_size = lengths
    start = HEADER.size + versions_size
    versions, lacking = body[HEADER.size : start], body[start : start + lacking_size]
    coded = np.frombuffer(body[start + lacking_size :], dtype="<u4").astype(np.uint32)
    coder, model_of = _coder()
    decoder, predictions = coder.RangeDecoder(coded), _Predictions(run)
    symbols = np.empty(count, dtype=np.int64)
    for done in range(count):
        symbols[done] = decoder.decode(model_of(predictions.next(), perfect=False))
        predictions.read(int(symbols[done]))
        if done % EVERY == 0:
            tick(done / count, f"{done:,} of {count:,} symbols")
    data = _data(run.tokenizer, symbols, lacking)
    if _hash(data) != digest:
        raise InputError(
            "This machine computes other probabilities than the one that compressed the file. "
            f"There: {versions.decode('ascii')}. Here: {_versions(run)}. Decompress it there."
        )
    return data


class _Predictions:
    """The probabilities of each next symbol, by single steps on one thread.

    Packing and unpacking need the same bits, so both take the same steps; a pass over a whole
    sequence would round differently.
    """

    def __init__(self, run: Run):
        self.end, self.beginning = run.tokenizer.end, run.predictor()
        self.predictor = self.beginning.copy()

    def next(self) -> np.ndarray:
        return self.predictor.probabilities()

    def read(self, symbol: int) -> None:
        if symbol == self.end:  # the next document begins
            self.predictor = self.beginning.copy()
        else:
            self.predictor.feed_symbols(np.array([[symbol]]))


def _coder() -> tuple[Any, Any]:
    """The range coder of the library constriction, and its model of probabilities."""
    constriction = extra("constriction", "compress")
    return constriction.stream.queue, constriction.stream.model.Categorical


def _versions(run: Run) -> str:
    """What the probabilities depend on, beside the model and the processor."""
    runtime = run.runtime
    chosen = f"{runtime.backend.value} {runtime.device.value}"
    return f"{__version__} {torch.__version__} {chosen}"


def _model(run: Run) -> bytes:
    return bytes.fromhex(run.fingerprint())[:CHECK]


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:CHECK]


def _symbols(tokenizer: Tokenizer, data: bytes) -> tuple[np.ndarray, bytes]:
    """The symbols of the data, and what the vocabulary lacks: compressed JSON, or b"".

    That is [[number of characters before it, bytes in hexadecimal], ...].
    """
    if isinstance(tokenizer, ByteTokenizer):
        return tokenizer.encode(data), b""
    known: list[str] = []
    lacking: list[tuple[int, str]] = []
    allowed = set(tokenizer.symbols) if isinstance(tokenizer, CharTokenizer) else None
    for character in data.decode("utf-8", "surrogateescape"):
        stray = "\ud800" <= character <= "\udfff"
        if stray or (allowed is not None and character not in allowed):
            lacking.append((len(known), character.encode("utf-8", "surrogateescape").hex()))
        else:
            known.append(character)
    beside = zlib.compress(json.dumps(lacking).encode(), 9) if lacking else b""
    return tokenizer.encode("".join(known)), beside


def _data(tokenizer: Tokenizer, symbols: np.ndarray, lacking: bytes) -> bytes:
    """The inverse of `_symbols`."""
    data = tokenizer.decode_bytes(symbols)
    return b"".join(_woven(data.decode("utf-8"), lacking)) if lacking else data


def _woven(text: str, lacking: bytes) -> Iterator[bytes]:
    done = 0
    for place, stray in json.loads(zlib.decompress(lacking)):
        yield text[done:place].encode("utf-8")
        yield bytes.fromhex(stray)
        done = place
    yield text[done:].encode("utf-8")
