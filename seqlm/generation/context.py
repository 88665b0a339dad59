"""What a model knows after a text: read from a text, and kept in a file."""

# V vocabulary

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from seqlm import ops
from seqlm.cells import State
from seqlm.errors import InputError
from seqlm.files import SMALL, read_small
from seqlm.graphs import Function
from seqlm.model import LanguageModel, symbols_at_once
from seqlm.store.checkpoint import shapes_of
from seqlm.temporary import write_lines
from seqlm.text.tokenizer import Tokenizer

CHUNK = 2048  # symbols of a prompt in one call of the model
FORMAT = "seqlm-state-1"


class Context(NamedTuple):
    """All that the next symbols depend on.  Its size does not depend on the length of the text."""

    logits: Tensor  # (V,) of the next symbol
    state: State  # of one row


def single_step(model: LanguageModel) -> Function:
    """model.step as a function of tensors, which takes one compiled call where that is possible.

    It takes symbols and the state's tensors, and returns logits and the state's tensors.
    """

    def step(symbols: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        logits, state = model.step(symbols, state)
        return logits, *state

    return ops.in_one_call(model, step)


@torch.inference_mode()
def prefill(
    model: LanguageModel, prompt: np.ndarray, chunk: int = CHUNK, after: Context | None = None
) -> Context:
    """Read the symbols of a prompt: the context after them.

    after: the context before them; None: the beginning of a text, whose symbol is read first.
    """
    if after is not None and not len(prompt):
        return after
    begun = [] if after else [model.beginning]
    symbols = torch.from_numpy(np.concatenate([np.array(begun, dtype=np.int64), prompt]))
    state = after.state if after else model.initial_state(1)
    for part in symbols.to(model.embedding.weight.device).split(min(chunk, symbols_at_once(model))):
        logits, state = model(part.unsqueeze(0), state)
    return Context(logits[0, -1], state)


def last_document(tokenizer: Tokenizer, symbols: np.ndarray) -> np.ndarray:
    """The symbols behind the last end of a document; all of them where there is none."""
    if tokenizer.end is None:
        return symbols
    ends = np.flatnonzero(symbols == tokenizer.end)
    return symbols[ends[-1] + 1 :] if len(ends) else symbols


def read(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str | bytes, after: Context | None = None
) -> Context:
    """The context after a prompt.  after: the context before it; a document's end clears it.

    Raises InputError for a character that the vocabulary lacks.
    """
    symbols = tokenizer.encode(prompt)
    last = last_document(tokenizer, symbols)
    return prefill(model, last, after=after if len(last) == len(symbols) else None)


def save(path: Path, context: Context, model_hash: str) -> None:
    """Write a context to a file, completely or not at all.  model_hash: only this model reads it.

    Raises SeqlmError if the file cannot be written.
    """
    from safetensors.torch import save as packed

    # copies, because safetensors refuses tensors that share memory
    tensors = {k: t.to("cpu", copy=True).contiguous() for k, t in _named(context).items()}
    header = {"format": FORMAT, "model": model_hash, "sha256": _hash(tensors)}
    write_lines(path, [packed(tensors, header)])


def load(path: Path, model: LanguageModel, model_hash: str) -> Context:
    """The context in a file of `save`.

    Raises InputError for a file that is missing, damaged or no such file, and for another model.
    """
    from safetensors.torch import load as unpacked

    weights = model.embedding.weight
    state = model.initial_state(1)
    logits = torch.empty(model.vocab_size, dtype=weights.dtype)
    expected = shapes_of(_named(Context(logits, state)))
    data = read_small(path, SMALL + sum(t.nbytes for t in (logits, *state)))
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        saved_format, saved_model, digest = (header[k] for k in ("format", "model", "sha256"))
        tensors = unpacked(data)
        intact = _hash(tensors) == digest
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        saved_format, intact = None, False
    if not intact:
        raise InputError(
            f"{path} is damaged, or is no file of seqlm generate --save-state. Save it again."
        )
    if saved_format != FORMAT:
        raise InputError(
            f"{path} has format {saved_format}, but this version of seqlm reads {FORMAT}. Save it "
            "again."
        )
    if saved_model != model_hash or shapes_of(tensors) != expected:
        raise InputError(
            f"{path} was saved with another model or another --dtype. Choose the same with --run, "
            "--step and --dtype."
        )
    logits, *parts = (tensors[name].to(weights.device) for name in expected)
    return Context(logits, tuple(parts))


def _named(context: Context) -> dict[str, Tensor]:
    return {"logits": context.logits} | {f"state.{n}": t for n, t in enumerate(context.state)}


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
