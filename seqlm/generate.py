"""Text from a model: the prompt in one pass, then one step a character with a constant state."""

# V vocabulary

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seqlm.cells import State
from seqlm.errors import SeqlmError, UsageError
from seqlm.evaluate import CHUNK
from seqlm.model import LanguageModel
from seqlm.runtime import derived_seed
from seqlm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next symbol is drawn; the filters apply in the order they stand in here."""

    temperature: float = 1.0  # 0 takes the likeliest
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that together reach p
    min_p: float = 0.0  # only those with at least min_p times the likeliest's probability

    def __post_init__(self):
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
        """logits: (V,) -> a symbol."""
        if not torch.isfinite(logits.max()):
            raise SeqlmError("The model's weights are not finite. Choose another with --step.")
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.cpu().double()
        # the likeliest first brought to 0, so that no temperature is too small
        p = torch.softmax((logits - logits.max()) / self.temperature, dim=0)
        if self.top_k:
            p = p * (p >= p.topk(min(self.top_k, len(p))).values[-1])
        if self.top_p < 1:
            ordered, order = (p / p.sum()).sort(descending=True)
            before = ordered.cumsum(0) - ordered  # what the likelier ones reach already
            p[order[before >= self.top_p]] = 0
        if self.min_p:
            p = p * (p >= self.min_p * p.max())
        return int(torch.multinomial(p, 1, generator=random))


@torch.inference_mode()
def prefill(model: LanguageModel, prompt: np.ndarray, chunk: int = CHUNK) -> tuple[Tensor, State]:
    """Read the beginning of text and the prompt's symbols: logits (V,) and the state after them."""
    device = model.embedding.weight.device
    symbols = torch.from_numpy(np.concatenate([[model.beginning], prompt])).to(device)
    state = None
    for part in symbols.split(chunk):
        logits, state = model(part.unsqueeze(0), state)
    return logits[0, -1], state


@torch.inference_mode()
def symbols(
    model: LanguageModel, logits: Tensor, state: State, sampling: Sampling, seed: int
) -> Iterator[int]:
    """Symbols without end, from what `prefill` gave.  Each takes the same time and memory."""
    random = torch.Generator().manual_seed(derived_seed(seed, "sample"))
    while True:
        symbol = sampling.draw(logits, random)
        yield symbol
        logits, state = model.step(torch.tensor([symbol], device=logits.device), state)
        logits = logits[0]


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    chars: int = 200,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    seed: int = 0,
) -> Iterator[str]:
    """Pieces of whole characters that continue the prompt, `chars` in all.

    Ends earlier at the end of a document, if the tokenizer has documents, and when one of `stop`
    would appear; the stop string itself is not given out.
    Raises UsageError for a count or stop string that cannot be, InputError for a prompt character
    the vocabulary lacks.
    """
    if chars < 1:
        raise UsageError(f"--chars {chars}: it must be at least 1.")
    if "" in stop:
        raise UsageError("--stop '': the string to stop at is empty. Leave the option out.")
    read = tokenizer.encode(prompt)
    if tokenizer.end is not None:  # what is before the document that the prompt begins says nothing
        ends = np.flatnonzero(read == tokenizer.end)
        read = read[ends[-1] + 1 :] if len(ends) else read
    logits, state = prefill(model, read)
    decode = tokenizer.streamer()
    held, left = "", chars  # `held` may be the start of a stop string
    for symbol in symbols(model, logits, state, sampling, seed):
        held += decode(symbol)[: left - len(held)]
        ends = [held.index(s) for s in stop if s in held]
        if ends or len(held) >= left or symbol == tokenizer.end:
            yield held[: min(ends, default=left)]
            return
        free = len(held) - _possible_stop(held, stop)
        if free:
            yield held[:free]
            held, left = held[free:], left - free


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of the stop strings."""
    longest = max(map(len, stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0
