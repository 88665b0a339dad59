"""Generates text: one pass over the prompt, then one step per symbol with a constant state."""

# V vocabulary

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqlm.cells import State
from seqlm.errors import InputError, SeqlmError, UsageError
from seqlm.graphs import Function, recorded
from seqlm.model import LanguageModel
from seqlm.seeds import derived_seed
from seqlm.text.tokenizer import Tokenizer

CHUNK = 2048  # symbols of a prompt in one call of the model
STRAY_BYTE = re.compile("[\udc80-\udcff]")  # how "surrogateescape" decodes an invalid byte
# texts generated at once: reading the weights still takes most of a step's time with 8 rows
SIDE_BY_SIDE = 8


@dataclass(frozen=True)
class Sampling:
    """How the next symbol is drawn.  The filters apply in the order of the fields."""

    temperature: float = 1.0  # 0: always the most likely symbol
    top_k: int = 0  # only the k most likely symbols, in ties those with lower numbers; 0: all
    top_p: float = 1.0  # only the most likely symbols that together reach p
    min_p: float = 0.0  # only symbols with at least min_p times the highest probability

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UsageError(
                f"--temperature {self.temperature}: it must be from 0 (greedy) to 100."
            )
        if self.top_k < 0:
            raise UsageError(f"--top-k {self.top_k}: it must be at least 1, or 0 for all.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}: it must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"--min-p {self.min_p}: it must be from 0 to 1.")

    def draw(self, logits: Tensor, random: torch.Generator) -> int:
        """Draw a symbol from logits: (V,)."""
        if not torch.isfinite(logits.max()):
            raise SeqlmError("The model's weights are not finite. Choose another step with --step.")
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.cpu().double()
        # the maximum is subtracted before the division, which then cannot overflow
        p = torch.softmax((logits - logits.max()) / self.temperature, dim=0)
        if self.top_k:
            p[p.sort(descending=True, stable=True).indices[self.top_k :]] = 0
        if self.top_p < 1:
            ordered, order = (p / p.sum()).sort(descending=True)
            before = ordered.cumsum(0) - ordered  # total probability of the more likely symbols
            p[order[before >= self.top_p]] = 0
        if self.min_p:
            p = p * (p >= self.min_p * p.max())
        return int(torch.multinomial(p, 1, generator=random))


@torch.inference_mode()
def prefill(model: LanguageModel, prompt: np.ndarray, chunk: int = CHUNK) -> tuple[Tensor, State]:
    """Read the beginning symbol and the prompt: returns logits (V,) and the state after them."""
    device = model.embedding.weight.device
    symbols = torch.from_numpy(np.concatenate([[model.beginning], prompt])).to(device)
    state = model.initial_state(1)
    for part in symbols.split(chunk):
        logits, state = model(part.unsqueeze(0), state)
    return logits[0, -1], state


def banned_symbols(tokenizer: Tokenizer, allow: str | None, ban: str) -> Tensor:
    """Which symbols may not occur: (V,) bool.

    allow: the only characters that may occur; None allows all.  ban: characters that may not.  A
    symbol of several characters may occur if all of them may; a document's end always may.
    Raises InputError for a character that is no symbol, and where no symbol is left.
    """
    texts = [text.decode("utf-8", "surrogateescape") for text in tokenizer.texts]
    for option, characters in (("--allow", allow or ""), ("--ban", ban)):
        for character in characters:
            if character not in texts:
                raise InputError(
                    f"{option}: {character!r} is not a symbol of the run's vocabulary. Remove it."
                )
    left = [
        (allow is None or set(text) <= set(allow)) and not set(text) & set(ban) for text in texts
    ]
    if not any(left):
        raise InputError("--allow and --ban leave no symbol. Allow more characters.")
    banned = ~torch.tensor(left + [True] * (tokenizer.vocab_size - len(left)))
    if tokenizer.end is not None:
        banned[tokenizer.end] = False
    return banned


def last_document(tokenizer: Tokenizer, prompt: str | bytes) -> np.ndarray:
    """The symbols of the prompt without the documents that end in it, (T,)."""
    read = tokenizer.encode(prompt)
    if tokenizer.end is None:
        return read
    ends = np.flatnonzero(read == tokenizer.end)
    return read[ends[-1] + 1 :] if len(ends) else read


def stepper(model: LanguageModel) -> Function:
    """model.step as a function of tensors, recorded as a CUDA graph on a GPU.

    It takes symbols and the state's tensors, and returns logits and the state's tensors.  The next
    call may overwrite the returned tensors.
    """

    def step(symbols: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        logits, state = model.step(symbols, state)
        return logits, *state

    return recorded(step, model.embedding.weight.device)


class Text:
    """Collects the symbols of one text and gives out whole characters, up to the text's end.

    An invalid byte counts as one character, and is shown as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, chars: int, stop: Sequence[str]):
        self.end, self.stop, self.left = tokenizer.end, stop, chars
        self.decode = tokenizer.streamer("surrogateescape")
        self.held = ""  # decoded, but not given out: it may be the start of a stop string
        self.ended = False

    def take(self, symbol: int) -> str:
        """The characters that are final with this symbol, and have not been returned before."""
        self.held += self.decode(symbol)[: self.left - len(self.held)]
        ends = [self.held.index(s) for s in self.stop if s in self.held]
        self.ended = bool(ends) or len(self.held) >= self.left or symbol == self.end
        if self.ended:
            return _shown(self.held[: min(ends, default=self.left)])
        free = len(self.held) - _possible_stop(self.held, self.stop)
        piece, self.held = self.held[:free], self.held[free:]
        self.left -= free
        return _shown(piece)


def _shown(text: str) -> str:
    return STRAY_BYTE.sub("\N{REPLACEMENT CHARACTER}", text)


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | bytes = "",
    *,
    seed: int = 0,
    **options: Any,
) -> Iterator[str]:
    """Pieces of whole characters that continue the prompt; options as in `generate_many`."""
    for _, piece, _ in generate_many(model, tokenizer, prompt, seeds=[seed], **options):
        yield piece


@torch.inference_mode()
def generate_many(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | bytes = "",
    *,
    seeds: Sequence[int],
    chars: int = 200,
    sampling: Sampling = Sampling(),
    stop: str | bytes | Sequence[str | bytes] = (),
    allow: str | None = None,
    ban: str = "",
) -> Iterator[tuple[int, str, bool]]:
    """Continuations of the prompt, one per seed, generated up to 8 at a time.

    Yields (number of the text, piece of whole characters, whether the text ends there).
    A text has `chars` characters.  It ends earlier at the end of a document, if the tokenizer has
    documents, and before one of the `stop` strings, which is not part of the text.  A prompt or a
    stop string may be bytes for a model of bytes.  Every symbol takes the same time and memory.
    A seed gives the same text alone and beside others, if products round alike for any number of
    rows; the compiled loops ensure that.
    allow, ban: as for `banned_symbols`, whose probability becomes 0 at each step before a symbol is
    drawn.  That is not the distribution of all texts on condition that they contain no banned
    symbol: the model does not look ahead.
    Raises UsageError for an impossible count or stop string, InputError for a prompt character
    that the vocabulary lacks.
    """
    if chars < 1:
        raise UsageError(f"--chars {chars}: it must be at least 1.")
    strings = (stop,) if isinstance(stop, str | bytes) else stop
    stops = [s if isinstance(s, str) else s.decode("utf-8", "surrogateescape") for s in strings]
    if "" in stops:
        raise UsageError("--stop '': the string to stop at is empty. Remove the option.")
    banned = None if allow is None and not ban else banned_symbols(tokenizer, allow, ban)
    first, begun = prefill(model, last_document(tokenizer, prompt))
    step = stepper(model)
    # compile now, so that the first symbol does not wait
    step(torch.zeros(1, dtype=torch.long, device=first.device), *begun)
    for start in range(0, len(seeds), SIDE_BY_SIDE):
        numbers = range(start, min(start + SIDE_BY_SIDE, len(seeds)))
        texts = {number: Text(tokenizer, chars, stops) for number in numbers}
        randoms = {
            n: torch.Generator().manual_seed(derived_seed(seeds[n], "sample")) for n in texts
        }
        logits, state = first.expand(len(texts), -1), tuple(_repeated(s, len(texts)) for s in begun)
        while texts:
            logits = logits.cpu()
            if banned is not None:
                logits = logits.masked_fill(banned, -torch.inf)
            drawn = [sampling.draw(row, randoms[n]) for n, row in zip(texts, logits, strict=True)]
            for (number, text), symbol in zip(texts.items(), drawn, strict=True):
                piece = text.take(symbol)
                if piece or text.ended:
                    yield number, piece, text.ended
            rows = [row for row, text in enumerate(texts.values()) if not text.ended]
            if len(rows) < len(texts):
                state = tuple(tensor[rows] for tensor in state)
                texts = {number: text for number, text in texts.items() if not text.ended}
            if texts:
                symbols = torch.tensor([drawn[row] for row in rows], device=first.device)
                logits, *after = step(symbols, *state)
                state = tuple(after)


def _repeated(state: Tensor, times: int) -> Tensor:
    """A state of one row, repeated."""
    return state.expand(times, *state.shape[1:]).contiguous()


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a prefix of a stop string."""
    longest = max(map(len, stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0
