"""The probabilities of the next symbol, after a text that is given piece by piece."""

# R rows, V vocabulary, T time

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from seqlm.cells import State
from seqlm.cells._contract import chosen_rows
from seqlm.errors import InputError, UsageError, not_finite
from seqlm.generation.context import CHUNK, single_step
from seqlm.model import LanguageModel, symbols_at_once
from seqlm.runtime import Runtime
from seqlm.text.tokenizer import Tokenizer


class Predictor:
    """Reads text and predicts what comes next, at the cost of one step of the model per symbol.

    It holds the state of the model, whose size does not depend on the length of the text.  With
    several rows it reads as many texts side by side, of the same number of symbols.  After the end
    of a document, a row begins again.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, runtime: Runtime, rows: int = 1):
        """Raises UsageError for fewer rows than 1."""
        if rows < 1:
            raise UsageError(f"A predictor has at least 1 row, and rows is {rows}.")
        self.model, self.tokenizer, self.runtime, self.rows = model, tokenizer, runtime, rows
        # encoding a character takes a tenth of a small model's step, unless it is remembered
        self._encode_one = lru_cache(1 << 12)(tokenizer.encode)
        self._step = single_step(model)
        beginning = torch.full((rows,), model.beginning, device=model.embedding.weight.device)
        with runtime.active(), torch.inference_mode():
            self._logits, *state = self._step(beginning, *model.initial_state(rows))
        self._state: State = tuple(state)
        self._begun = tuple(tensor[:1] for tensor in (self._logits, *state))

    @property
    def symbols(self) -> list[str]:
        """The text of each symbol, in the order of `probabilities`; "" for a document's end."""
        return self.tokenizer.shown

    def feed(self, text: str | bytes | Sequence[str | bytes]) -> "Predictor":
        """Read more text: one for all rows, or a list with one for each row.  Returns itself.

        Raises InputError for a character that the vocabulary lacks, and for texts of different
        numbers of symbols.
        """
        texts = [text] * self.rows if isinstance(text, str | bytes) else text
        read = [
            self._encode_one(one) if len(one) == 1 else self.tokenizer.encode(one) for one in texts
        ]
        if len(read) != self.rows or len({len(one) for one in read}) != 1:
            sizes = ", ".join(str(len(one)) for one in read)
            raise InputError(
                f"The texts have {sizes} symbols. Give {self.rows} texts of equal length, one for "
                "each row."
            )
        # for one text np.stack would take a twentieth of the step
        return self.feed_symbols(read[0][None] if self.rows == 1 else np.stack(read))

    def feed_symbols(self, symbols: np.ndarray) -> "Predictor":
        """Read (R, T) symbols.  Returns itself."""
        end = self.tokenizer.end
        with self.runtime.active(), torch.inference_mode():
            if end is None:
                self._read(symbols)
                return self
            ended = symbols == end
            for part in np.split(symbols, np.flatnonzero(ended.any(0)) + 1, axis=1):
                self._read(part)
                if part.shape[1]:
                    self._begin_again(part[:, -1] == end)
        return self

    def _read(self, symbols: np.ndarray) -> None:
        time, device = symbols.shape[1], self._logits.device
        if time == 1:
            tokens = torch.from_numpy(symbols[:, 0]).to(device)
            self._logits, *state = self._step(tokens, *self._state)
            self._state = tuple(state)
            return
        chunk = min(CHUNK, max(1, symbols_at_once(self.model) // self.rows))
        for part in torch.from_numpy(symbols).to(device).split(chunk, dim=1) if time else ():
            logits, self._state = self.model(part, self._state)
            self._logits = logits[:, -1]

    def _begin_again(self, rows: np.ndarray) -> None:
        """rows: (R,) bool, those that are at the beginning of a text now."""
        if not rows.any():
            return
        mask = torch.from_numpy(rows).to(self._logits.device)
        now = self._logits, *self._state
        self._logits, *state = chosen_rows(mask, self._begun, now)
        self._state = tuple(state)

    def probabilities(self) -> np.ndarray:
        """The probability of each symbol: (V,), or (R, V) with several rows, float64.

        Raises SeqlmError if the model's weights are not finite.
        """
        p = torch.softmax(self._logits.cpu(), dim=-1, dtype=torch.float64).numpy()
        if not np.isfinite(p[:, 0]).all():  # one logit that is not finite makes all of them nan
            raise not_finite()
        return p[0] if self.rows == 1 else p

    def copy(self) -> "Predictor":
        """A predictor that goes on from here by itself.

        The copy is made at once: states are never changed in place, so that both share the present
        one.
        """
        return self._with(self._logits, self._state)

    def take(self, rows: Sequence[int]) -> "Predictor":
        """A predictor with these rows of this one, each as often as it is named: for a beam."""
        index = torch.tensor(rows, device=self._logits.device)
        return self._with(self._logits[index], tuple(tensor[index] for tensor in self._state))

    def _with(self, logits: Tensor, state: State) -> "Predictor":
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._logits, new._state, new.rows = logits, state, len(logits)
        return new
