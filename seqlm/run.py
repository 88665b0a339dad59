"""A trained model: it evaluates, scores and generates."""

import json
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from seqlm import draw
from seqlm.config import Config
from seqlm.errors import NotFound, UsageError
from seqlm.evaluation import dynamic, evaluate, inspect, mix, score
from seqlm.evaluation.dynamic import LR, SEGMENT, Learning
from seqlm.evaluation.ensemble import Ensemble
from seqlm.evaluation.evaluate import loss_and_hit
from seqlm.evaluation.mix import Mixing
from seqlm.evaluation.novelty import Novelty
from seqlm.evaluation.novelty import of_texts as novelty_of
from seqlm.evaluation.passage import Passage, passage_of_split, passage_of_text
from seqlm.files import require_place
from seqlm.generation import context
from seqlm.generation.generate import Sampling, generate_many
from seqlm.generation.items import ENDLESS, bits, documents_of, items, whole_texts
from seqlm.generation.predict import Predictor
from seqlm.model import LanguageModel, parameter_count
from seqlm.progress import OnProgress, silent
from seqlm.runtime import Runtime
from seqlm.text.corpus import Corpus, find_corpus, open_corpus, recorded_corpus
from seqlm.text.tokenizer import Tokenizer

SAMPLE = 10_000  # characters that `Run.novelty` generates


@dataclass(frozen=True, repr=False)
class Run:
    """A trained model with its tokenizer and its configuration, read from one saved step."""

    path: Path
    step: int
    config: Config
    model: LanguageModel
    tokenizer: Tokenizer
    runtime: Runtime
    warnings: list[str] = field(default_factory=list)  # damaged steps that were passed over
    others: tuple["Run", ...] = ()  # of an ensemble: the runs that `model` mixes with this one
    dtype: str = "float32"  # whose numbers the matrices have
    temperature: float = 1.0  # that the logits are divided by

    def __repr__(self) -> str:
        size = f"{parameter_count(self.model):,} parameters"
        return f"<Run {self.path}, step {self.step}: {self.config.cell.name}, {size}>"

    def mixed_with(self, *others: "Run") -> "Run":
        """This run with a model whose probabilities are the mean of those of all these runs.

        Raises UsageError if a run has another tokenizer: its probabilities are of other symbols;
        and if a run has a temperature or another dtype: figures name those of the mixture.
        """
        for run in (self, *others):
            if run.temperature != 1 or run.dtype != self.dtype:
                raise UsageError(
                    f"{run.path} has temperature {run.temperature:g} and {run.dtype} matrices. "
                    "Load all runs with one dtype, and call `tempered` on the mixture."
                )
            if run.tokenizer.to_dict() != self.tokenizer.to_dict():
                raise UsageError(
                    f"{run.path} has another tokenizer than {self.path}, so their probabilities "
                    "cannot be mixed. Mix runs on one corpus."
                )
        model = Ensemble([self.model, *(other.model for other in others)]).eval()
        mixed = (run for other in others for run in (other, *other.others))
        return replace(self, model=model, others=(*self.others, *mixed))

    def tempered(self, temperature: float) -> "Run":
        """This run with a model whose logits are divided by a temperature, above 0.

        A model that has learned its text by heart is too sure of itself on other text, and better
        with a temperature above 1.
        """
        if not 0 < temperature <= 100:
            raise UsageError(f"--temperature {temperature:g}: it must be above 0, and at most 100.")
        model = deepcopy(self.model)
        model.temper(temperature)
        return replace(self, model=model, temperature=self.temperature * temperature)

    def generate(
        self, prompt: str | bytes = "", chars: int = 200, seed: int = 0, **options: Any
    ) -> str:
        """Continue the prompt by `chars` characters; options as in `samples`."""
        return "".join(self.stream(prompt, chars, seed, **options))

    def stream(
        self, prompt: str | bytes = "", chars: int = 200, seed: int = 0, **options: Any
    ) -> Iterator[str]:
        """`generate` as a stream: yields pieces of whole characters."""
        for _, piece, _ in self.samples(prompt, 1, chars, seed, **options):
            yield piece

    def samples(
        self,
        prompt: str | bytes = "",
        count: int = 1,
        chars: int = 200,
        seed: int = 0,
        *,
        temperature: float | Sequence[float] = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | bytes | Sequence[str | bytes] = (),
        allow: str | None = None,
        ban: str = "",
        regex: str | None = None,
        load_state: str | Path | None = None,
        save_state: str | Path | None = None,
    ) -> Iterator[tuple[int, str, bool]]:
        """Generate `count` continuations, up to 8 at a time.

        Yields (number of the text, piece of whole characters, whether the text ends there).
        The seed and its number decide a text.
        temperature: several values go from the first to the last over `chars` characters.
        allow: the only characters that may occur.  ban: characters that may not.  regex: what the
        text without the prompt matches.
        load_state: the file of a state to go on from.  save_state: the file for the state after the
        text; for one text only, which may have 0 characters.
        Raises UsageError for a value out of range, InputError for a character of the prompt that
        is not in the vocabulary, and for a state that is damaged or another model's.
        """
        if save_state is not None:
            require_place(Path(save_state))
            if count != 1:
                raise UsageError(f"--save-state keeps the state of one text, not of {count:,}.")
        return self.runtime.each(
            generate_many(
                self.model,
                self.tokenizer,
                prompt,
                seed=seed,
                numbers=range(count),
                chars=chars,
                sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
                stop=stop,
                allow=allow,
                ban=ban,
                regex=regex,
                after=None if load_state is None else self.load_context(load_state),
                keep=None if save_state is None else partial(self.save_context, save_state),
            )
        )

    def load_context(self, path: str | Path) -> context.Context:
        """What the model knew when a state was saved.  Raises InputError as `context.load` says."""
        return context.load(Path(path), self.model, self.fingerprint())

    def save_context(self, path: str | Path, known: context.Context) -> None:
        """Save a state, for this model alone.  Raises SeqlmError if it cannot be written."""
        context.save(Path(path), known, self.fingerprint())

    def fingerprint(self) -> str:
        """A SHA-256 of the names and values of all weights, and of the tokenizer."""
        digest = sha256(json.dumps(self.tokenizer.to_dict(), sort_keys=True).encode("utf-8"))
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode("utf-8"))
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def items(
        self,
        count: int,
        prompt: str | bytes = "",
        chars: int = 10_000,
        seed: int = 0,
        *,
        unique: bool = True,
        new: bool = True,
        **options: Any,
    ) -> Iterator[str]:
        """`count` documents, for a run on documents: whole, and without the line's end.

        unique: no two are alike.  new: none is in the run's corpus.  options as in `samples`.
        Raises UsageError for a run without documents, and for an option that cuts documents;
        SeqlmError if 1,000 texts in a row are not wanted.
        """
        for name in ("stop", "load_state", "save_state"):
            if options.get(name):
                raise UsageError(f"Items are whole documents, so {name} has no place. Remove it.")
        if self.tokenizer.end is None:
            raise UsageError(
                f"{self.path} was trained on one stream of text, so its texts have no end. For "
                "whole lines, prepare its text again and train on that: seqlm prepare TEXT "
                "--documents lines --out DIR, then seqlm train DIR"
            )
        seen = documents_of(self.corpus()) if new else set()
        pieces = self.samples(prompt, ENDLESS, chars, seed, **options)
        shown = prompt if isinstance(prompt, str) else prompt.decode("utf-8", "replace")
        return items(whole_texts(pieces, self.tokenizer, shown, chars), count, seen, unique)

    def document_bits(self, texts: Sequence[str]) -> list[float]:
        """The surprisal of each text in bits, as a document of its own with its end."""
        with self.runtime.active():
            return bits(self.model, self.tokenizer, texts)

    def novelty(
        self, texts: Sequence[str] | None = None, seed: int = 0, tick: OnProgress = silent
    ) -> dict[str, Novelty]:
        """How much of the texts also occurs in the training text; the same for the val split.

        texts: None: a text of 10,000 characters is generated, or documents with as many together.
        Returns the novelty under "text" and under "held_out".
        """
        corpus = self.corpus()
        return novelty_of(self._sample(seed) if texts is None else texts, corpus, tick)

    def _sample(self, seed: int) -> list[str]:
        """Generated texts with SAMPLE characters together."""
        if self.tokenizer.end is None:
            return [self.generate(chars=SAMPLE, seed=seed)]
        texts: list[str] = []
        found = self.items(SAMPLE, chars=SAMPLE, seed=seed, unique=False, new=False)
        while sum(map(len, texts)) < SAMPLE:
            texts.append(next(found))
        return texts

    def bits_per_char(self, text: str) -> float:
        """Bits per character of the text, read after the beginning symbol.

        With documents, each is read separately, and its end is counted.  With answers, only the
        answers are counted.
        """
        passage = passage_of_text([text.encode("utf-8")], self.tokenizer)
        with self.runtime.active():
            found = evaluate.score(self.model, self.tokenizer, passage).bits_per_char
        assert found is not None, "a str has a number of characters"
        return found

    def predictor(self, rows: int = 1) -> Predictor:
        """A Predictor at the beginning of a text: the probabilities of the next symbol.

        It is what a typing aid or a beam search needs: feed(text), probabilities(), copy().
        """
        return Predictor(self.model, self.tokenizer, self.runtime, rows)

    def score(
        self,
        text: str | bytes,
        per: str = "char",
        *,
        words: str = score.WORDS,
        space: str = "after",
        top: int = 0,
        on_unknown: str = "error",
        dynamic_lr: float | None = None,
    ) -> score.Scores:
        """How surprising each character, word, line or document of a text is, as arrays.

        The arguments are those of `seqlm score`.  seqlm.evaluation.score.Row explains the columns.
        dynamic_lr: the learning rate of the protocol dynamic; None: the model does not learn.
        Raises InputError for a character that the vocabulary lacks, unless on_unknown is "skip".
        """
        raw = text.encode("utf-8") if isinstance(text, str) else text
        passage = passage_of_text([raw], self.tokenizer, on_unknown)
        chunks = self.runtime.each(
            score.chunks(self.model, passage, top, self.learning(dynamic_lr))
        )
        rows = score.rows(chunks, self.tokenizer, passage, per, words=words, space=space)
        return score.Scores.of([*rows])

    def inspect(self, text: str | bytes, on_unknown: str = "error") -> inspect.Inspection:
        """What the state remembers of a text, for how long, and which units follow what.

        It reads at most the first 32,768 characters.  seqlm.evaluation.inspect explains the fields.
        Raises InputError for a text that is too short, or a character that the vocabulary lacks,
        and UsageError for a mixture of runs.
        """
        if self.others:
            raise UsageError("A mixture has the states of several models. Inspect one run.")
        raw = text.encode("utf-8") if isinstance(text, str) else text
        opening = inspect.opening(raw, whole=True)
        passage = inspect.passage_to_inspect(opening, self.tokenizer, on_unknown)
        with self.runtime.active():
            return inspect.inspect(self.model, self.tokenizer, passage)

    def evaluate(
        self,
        *,
        data: str | Corpus | None = None,
        text: bytes | None = None,
        split: str = "val",
        protocol: str = "stream",
        context: int = 256,
        on_unknown: str = "error",
        dynamic_lr: float | None = None,
        mix: str | None = None,
        tick: OnProgress = silent,
    ) -> dict[str, Any]:
        """Evaluate a split of a corpus, or a text; returns the object of `seqlm eval --json`.

        data: a path, a name or an open corpus; None takes the run's own corpus.
        dynamic_lr: evaluate also by the protocol dynamic, with this learning rate.
        mix: evaluate also mixed with a context model, "ppm:N".
        tick: called with the share that is done.
        Raises UsageError to mix on the split train, which the context model has counted.
        """
        mixing = self.mixing(mix, None if text is not None else split)
        if text is not None:
            passage = passage_of_text([text], self.tokenizer, on_unknown)
            source = {"data": None, "corpus": "text", "own_corpus": False, "split": "text"}
            source["characters"] = "code points"
        else:
            corpus = data or self.corpus()
            if isinstance(corpus, str):
                corpus = open_corpus(find_corpus(corpus))
            passage = passage_of_split(corpus, split, self.tokenizer, on_unknown)
            source = {
                "data": str(corpus.path),
                "corpus": corpus.label,
                "own_corpus": corpus.has(self.config.data.fingerprint),
                "split": split,
                "characters": corpus.manifest["characters"],
            }
        with self.runtime.active():
            # compiles what is not to be timed, without a look at a file that may be cut meanwhile
            evaluate.stream(self.model, np.zeros(2, passage.symbols.dtype), silent)
            began = time.perf_counter()
            result = evaluate.score(self.model, self.tokenizer, passage, protocol, context, tick)
            seconds = time.perf_counter() - began
        asked = passage.answers is not None
        # the model reads the questions, too, so they count for the speed
        read = len(passage.symbols) if asked else result.chars or result.bytes
        figures: dict[str, Any] = {
            "run": str(self.path),
            "step": self.step,
            "cell": self.config.cell.name,
            "others": [str(other.path) for other in self.others],
            **source,
            "protocol": self.protocol("answers" if asked else protocol),
            "context": context if protocol == "window" else None,
            "documents": None if passage.ends is None else len(passage.ends),
            **result.metrics(),
            "chars": result.chars,
            "bytes": result.bytes,
            "tokens": result.tokens,
            "unknown": passage.unknown,
            "seconds": seconds,
            "chars_per_second": read / seconds,
            "split_sha256": passage.sha256,
            "params": parameter_count(self.model),
            "device": self.runtime.device.value,
            "dtype": self.dtype,
            "backend": self.runtime.backend.value,
        }
        learning = self.learning(dynamic_lr)
        if learning is not None or mixing is not None:
            figures |= self._adapted(passage, learning, mixing, tick)
        return figures

    def protocol(self, name: str) -> str:
        """The name of a protocol, with what was done to the model."""
        parts = [f"ensemble of {1 + len(self.others)}"] if self.others else []
        parts += [] if self.temperature == 1 else [f"temperature {self.temperature:g}"]
        parts += [] if self.dtype == "float32" else [f"{self.dtype} matrices"]
        return ", ".join([name, *parts])

    def learning(self, lr: float | None = LR) -> Learning | None:
        """How the model learns by the protocol dynamic; None if it does not (lr is None).

        The size of gradients is taken from the train split of the run's corpus, if it is there.
        """
        return None if lr is None else Learning(lr, self._trained_on())

    def mixing(self, name: str | None, split: str | None = None) -> Mixing | None:
        """The context model `name`, "ppm:N", to mix with; None if the name is None.

        It starts from the train split of the run's corpus, if it is there.
        split: the split to evaluate; UsageError for train, which would be counted before it.
        """
        if name is None:
            return None
        order = mix.order_of(name)
        if split == "train":
            raise UsageError(
                f"--mix {name} counts the train split first, so it cannot score it. Choose --split "
                "val or test."
            )
        return Mixing(order, self._trained_on())

    def _trained_on(self) -> Passage | None:
        """The train split of the run's corpus; None if the corpus is missing or another one."""
        try:
            corpus = self.corpus()
        except NotFound:
            return None
        return passage_of_split(corpus, "train", self.tokenizer)

    def _adapted(
        self,
        passage: Passage,
        learning: Learning | None,
        mixing: Mixing | None,
        tick: OnProgress,
    ) -> dict[str, Any]:
        """The figures by the protocol dynamic, and those of the mixture with a context model."""
        figures: dict[str, Any] = {}
        began = time.perf_counter()
        read = dynamic.read(self.model, passage, loss_and_hit, learning, tick)
        judged = [*self.runtime.each(read)]  # both figures need it
        if learning is not None:
            figures["dynamic"] = {
                "protocol": self.protocol("dynamic"),
                **evaluate.scored(judged, passage).metrics(),
                "seconds": time.perf_counter() - began,
                "lr": learning.lr,
                "segment": SEGMENT,
                "gradients": learning.source,
            }
        if mixing is not None:
            found = mix.score(judged, passage, self.model.vocab_size, mixing)
            static = "stream" if passage.answers is None else "answers"
            name = static if learning is None else "dynamic"
            metrics = found.score.metrics()
            del metrics["accuracy"]  # the likeliest symbol of the mixture is not computed
            figures["mixed"] = {
                "protocol": f"{self.protocol(name)}, {mixing.name}",
                **metrics,
                "seconds": time.perf_counter() - began,
                "start": mixing.source,
                "weight": found.weight,
                "alone_bits_per_char": found.alone.bits_per_char,
                "alone_bits_per_byte": found.alone.bits_per_byte,
            }
        return figures

    def plot(self, *others: "Run", x: str = "steps", y: str = "bits") -> Any:
        """The curves of this run and of other runs, as a matplotlib Figure.

        x: steps, chars or seconds.  y: bits (per character, of the validations), loss, lr,
        grad-norm or speed.  A notebook shows the figure; `plot().savefig("curves.svg")` saves it.
        Raises SeqlmError if matplotlib is not installed.
        """
        return draw.figure(draw.named([run.path for run in (self, *others)]), [x], [y])

    def corpus(self) -> Corpus:
        """The corpus of the run; InputError if it is damaged, NotFound if it is not there."""
        corpus = recorded_corpus(self.config.data.path, self.config.data.fingerprint)
        if not corpus.has(self.config.data.fingerprint):
            raise NotFound(
                f"{corpus.path} is not the corpus that {self.path} was trained on: it was prepared "
                f"again. To evaluate on it nevertheless: --data {corpus.path}"
            )
        return corpus
