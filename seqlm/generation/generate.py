"""Generates text: one pass over the prompt, then one step per symbol with a constant state."""

# V vocabulary

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqlm.errors import InputError, UsageError, not_finite
from seqlm.generation.context import Context, prefill, read, single_step
from seqlm.generation.pattern import Match, Pattern
from seqlm.graphs import Function, recorded
from seqlm.model import LanguageModel
from seqlm.seeds import derived_seed
from seqlm.text.tokenizer import Tokenizer

STRAY_BYTE = re.compile("[\udc80-\udcff]")  # how "surrogateescape" decodes an invalid byte
# texts generated at once: reading the weights still takes most of a step's time with 8 rows
SIDE_BY_SIDE = 8
WINDOW = 64  # symbols of the text so far that the repetition penalty looks at


@dataclass(frozen=True)
class Sampling:
    """How the next symbol is drawn.  The fields apply in the order of repetition_penalty,
    temperature, top_k, top_p, min_p."""

    # 0: always the most likely symbol; several values: from the first to the last over a text
    temperature: float | Sequence[float] = 1.0
    top_k: int = 0  # only the k most likely symbols, in ties those with lower numbers; 0: all
    top_p: float = 1.0  # only the most likely symbols that together reach p
    min_p: float = 0.0  # only symbols with at least min_p times the highest probability
    # logits of the last WINDOW symbols are divided by it; negative logits are multiplied
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Sampling":
        """The fields among some options."""
        return cls(**{field.name: options[field.name] for field in fields(cls)})

    def __post_init__(self) -> None:
        if not self._temperatures or not all(0 <= t <= 100 for t in self._temperatures):
            shown = ",".join(map(str, self._temperatures))
            raise UsageError(f"--temperature {shown}: it must be from 0 (greedy) to 100.")
        if self.top_k < 0:
            raise UsageError(f"--top-k {self.top_k}: it must be at least 1, or 0 for all.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}: it must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"--min-p {self.min_p}: it must be from 0 to 1.")
        if not 1 <= self.repetition_penalty <= 100:
            raise UsageError(
                f"--repetition-penalty {self.repetition_penalty}: it must be from 1 (none) to 100."
            )

    @property
    def _temperatures(self) -> Sequence[float]:
        given = self.temperature
        return (given,) if isinstance(given, int | float) else given

    def temperature_at(self, share: float) -> float:
        """The temperature where this share of a text is written: linear between the values."""
        values = self._temperatures
        if len(values) == 1:  # most often, and np.interp takes a while
            return values[0]
        return float(np.interp(share * (len(values) - 1), range(len(values)), values))

    def draw(
        self,
        logits: Tensor,
        random: torch.Generator,
        recent: Sequence[int] = (),
        share: float = 0.0,
    ) -> int:
        """Draw a symbol from logits: (V,).

        recent: the last symbols of the text.  share: how much of the text is written, 0 to 1.
        """
        if not torch.isfinite(logits.max()):
            raise not_finite()
        logits = logits.cpu().double()
        if self.repetition_penalty != 1 and recent:
            seen = torch.tensor(sorted(set(recent)))
            # CTRL divides all logits; a negative logit would thereby become likelier
            old, r = logits[seen], self.repetition_penalty
            logits[seen] = torch.where(old > 0, old / r, old * r)
        temperature = self.temperature_at(share)
        if temperature == 0:
            return int(logits.argmax())
        # the maximum is subtracted before the division, which then cannot overflow
        p = torch.softmax((logits - logits.max()) / temperature, dim=0)
        if self.top_k:
            p[p.sort(descending=True, stable=True).indices[self.top_k :]] = 0
        if self.top_p < 1:
            ordered, order = (p / p.sum()).sort(descending=True)
            before = ordered.cumsum(0) - ordered  # total probability of the more likely symbols
            p[order[before >= self.top_p]] = 0
        if self.min_p:
            p = p * (p >= self.min_p * p.max())
        return int(torch.multinomial(p, 1, generator=random))


def check_chars(chars: int, least: int = 1) -> None:
    """Raises UsageError for too few characters.  least: 0 where only a state is to be saved."""
    if chars < least:
        zero = "" if chars else ", or 0 with --save-state"
        raise UsageError(f"--chars {chars}: it must be at least {least}{zero}.")


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


def stepper(model: LanguageModel) -> Function:
    """`single_step`, on a GPU recorded as a CUDA graph.

    The next call may overwrite the returned tensors.
    """
    return recorded(single_step(model), model.embedding.weight.device)


@dataclass(frozen=True)
class Rules:
    """What all texts of one call have in common."""

    tokenizer: Tokenizer
    chars: int
    stop: Sequence[str] = ()
    sampling: Sampling = Sampling()
    banned: Tensor | None = None
    pattern: Pattern | None = None
    seed: int = 0
    halted: Callable[[], bool] = lambda: False

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        chars: int,
        stop: str | bytes | Sequence[str | bytes],
        allow: str | None,
        ban: str,
        regex: str | None,
        least: int = 1,
        **others: Any,
    ) -> "Rules":
        """The rules of options; raises UsageError and InputError as `generate_many` says."""
        check_chars(chars, least)
        strings = (stop,) if isinstance(stop, str | bytes) else stop
        stops = [s if isinstance(s, str) else s.decode("utf-8", "surrogateescape") for s in strings]
        if "" in stops:
            raise UsageError("--stop '': the string to stop at is empty. Remove the option.")
        banned = None if allow is None and not ban else banned_symbols(tokenizer, allow, ban)
        pattern = None
        if regex is not None:
            if stops:
                raise UsageError(
                    "--stop would cut a text that --regex has completed. Keep one of the two."
                )
            nothing = np.zeros(tokenizer.vocab_size, dtype=bool)
            refused = nothing if banned is None else banned.numpy()
            pattern = Pattern(regex, tokenizer.texts, tokenizer.end, refused)
            if pattern.shortest > chars:
                raise UsageError(
                    f"--regex {regex}: its shortest text has {pattern.shortest:,} characters, and "
                    f"--chars allows {chars:,}. Raise --chars."
                )
        return cls(tokenizer, chars, stops, banned=banned, pattern=pattern, **others)


class Text:
    """One text that is being generated.  It gives out whole characters, up to the text's end.

    An invalid byte counts as one character, and is shown as U+FFFD.
    """

    def __init__(self, rules: Rules, number: int = 0):
        self.rules, self.number, self.left = rules, number, rules.chars
        self.random = torch.Generator().manual_seed(derived_seed(rules.seed, "sample", number))
        self.decode = rules.tokenizer.streamer("surrogateescape")
        self.recent: deque[int] = deque(maxlen=WINDOW)
        self.match = Match(rules.pattern, rules.chars) if rules.pattern else None
        self.held = ""  # decoded, but not given out: it may be the start of a stop string
        self.surplus = 0  # characters of the last symbol that the text does not have
        self.ended = False

    def draw(self, logits: Tensor) -> int | None:
        """Draw the next symbol from logits: (V,); None if the text has to end without it."""
        refused = self.rules.banned
        if not self.left:
            return None
        if self.match is not None:
            refused = torch.from_numpy(~self.match.allowed())
            if refused.all():
                return None
        if refused is not None:
            logits = logits.masked_fill(refused, -torch.inf)
        share = 1 - (self.left - len(self.held) - 1) / max(1, self.rules.chars - 1)
        return self.rules.sampling.draw(logits, self.random, self.recent, share)

    def take(self, symbol: int | None) -> str:
        """The characters that are final with this symbol, and have not been returned before."""
        read = ""
        if symbol is not None:
            self.recent.append(symbol)
            if self.match is not None:
                self.match.take(symbol)
            read = self.decode(symbol)
        before = len(self.held)
        self.held += read[: self.left - before]
        stops = [(self.held.index(s), len(s)) for s in self.rules.stop if s in self.held]
        self.ended = (
            bool(stops)
            or len(self.held) >= self.left
            or symbol in (None, self.rules.tokenizer.end)
            or self.rules.halted()
        )
        if self.ended:
            end, length = min(stops, default=(len(self.held), 0))
            self.surplus = len(read) - (end + length - before)
            return _shown(self.held[:end])
        free = len(self.held) - _possible_stop(self.held, self.rules.stop)
        piece, self.held = self.held[:free], self.held[free:]
        self.left -= free
        return _shown(piece)


def _shown(text: str) -> str:
    return STRAY_BYTE.sub("\N{REPLACEMENT CHARACTER}", text)


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | bytes = "",
    **options: Any,
) -> Iterator[str]:
    """Pieces of whole characters that continue the prompt; options as in `generate_many`."""
    for _, piece, _ in generate_many(model, tokenizer, prompt, **options):
        yield piece


@torch.inference_mode()
def generate_many(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | bytes = "",
    *,
    seed: int = 0,
    numbers: Sequence[int] = (0,),
    chars: int = 200,
    sampling: Sampling = Sampling(),
    stop: str | bytes | Sequence[str | bytes] = (),
    allow: str | None = None,
    ban: str = "",
    regex: str | None = None,
    after: Context | None = None,
    keep: Callable[[Context], None] | None = None,
    halted: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, str, bool]]:
    """Continuations of the prompt, one for each number, generated up to 8 at a time.

    Yields (number of the text, piece of whole characters, whether the text ends there).
    A text has `chars` characters.  It ends earlier at the end of a document, if the tokenizer has
    documents, and before one of the `stop` strings, which is not part of the text.  A prompt or a
    stop string may be bytes for a model of bytes.  Every symbol takes the same time and memory.
    The seed and its number decide a text: it is the same alone and beside others, if products
    round alike for any number of rows; the compiled loops ensure that.
    allow, ban: as for `banned_symbols`, whose probability becomes 0 at each step before a symbol is
    drawn.  regex: the text matches it; at each step, only symbols keep a probability that lead to a
    match of up to `chars` characters.  A text ends where no symbol does, and a document ends only
    in a match.  Neither is the distribution of all texts on condition that they are allowed: the
    model does not know the rules ahead.
    after: the context before the prompt; None: the beginning of a text.
    keep: gets the context after the text, once its last piece was taken; for one number only, and
    for 0 characters, too.  The context has read the stop string; after the end of a document it is
    the beginning of a text.
    halted: asked after every symbol; True ends the texts.
    Raises UsageError for an impossible count, stop string or regex, InputError for a prompt
    character that the vocabulary lacks, and for a regex that no text of it matches.
    """
    others: dict[str, Any] = dict(sampling=sampling, seed=seed, halted=halted)
    rules = Rules.of(tokenizer, chars, stop, allow, ban, regex, 0 if keep else 1, **others)
    first = read(model, tokenizer, prompt, after)
    step = stepper(model)
    # compile now, so that the first symbol does not wait
    step(torch.zeros(1, dtype=torch.long, device=first.logits.device), *first.state)
    for start in range(0, len(numbers), SIDE_BY_SIDE):
        texts = [Text(rules, number) for number in numbers[start : start + SIDE_BY_SIDE]]
        for text, piece, symbol, context in _side_by_side(step, first, texts):
            yield text.number, piece, text.ended
            if keep is not None and text.ended:
                keep(_following(model, context, text, symbol))


def _side_by_side(
    step: Function, first: Context, texts: list[Text]
) -> Iterator[tuple[Text, str, int | None, Context]]:
    """Each piece with its text, its last symbol and the context before that symbol."""
    logits = first.logits.expand(len(texts), -1)
    state = tuple(_repeated(s, len(texts)) for s in first.state)
    while texts:
        drawn = [text.draw(row) for text, row in zip(texts, logits.cpu(), strict=True)]
        for row, (text, symbol) in enumerate(zip(texts, drawn, strict=True)):
            piece = text.take(symbol)
            if piece or text.ended:
                # the context is read only after the end of a text that is alone
                yield text, piece, symbol, Context(logits[row], state)
        rows = [row for row, text in enumerate(texts) if not text.ended]
        if len(rows) < len(texts):
            state = tuple(tensor[rows] for tensor in state)
            texts = [texts[row] for row in rows]
        if texts:
            symbols = torch.tensor([drawn[row] for row in rows], device=first.logits.device)
            logits, *after = step(symbols, *state)
            state = tuple(after)


def _following(model: LanguageModel, context: Context, text: Text, symbol: int | None) -> Context:
    """The context after a text that ended with this symbol.  context: the one before the symbol."""
    tokenizer = text.rules.tokenizer
    if symbol is None:
        return Context(context.logits.clone(), tuple(tensor.clone() for tensor in context.state))
    if symbol == tokenizer.end:
        return prefill(model, np.array([], dtype=np.int64))
    symbols = np.array([symbol])
    if text.surplus:
        symbols = tokenizer.encode(tokenizer.decode(symbols)[: -text.surplus])
    for one in symbols.tolist():
        logits, state = model.step(torch.tensor([one], device=context.logits.device), context.state)
        context = Context(logits[0], state)
    return context


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
