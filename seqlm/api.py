"""seqlm as a library: `load` and `train` give a Run that evaluates and generates.

The command line is a thin layer over this file: a command and a function do the same thing.
"""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from seqlm import cells, evaluate
from seqlm.config import FLAGS, Config, RuntimeConfig, cell_files, merge_settings
from seqlm.errors import InputError, UsageError, unknown
from seqlm.generate import Sampling, generate_many
from seqlm.model import LanguageModel, build, parameter_count
from seqlm.passage import passage_of_split, passage_of_text
from seqlm.progress import OnProgress, silent
from seqlm.runtime import Runtime
from seqlm.store import runs
from seqlm.text.corpus import Corpus, find_corpus, open_corpus, recorded_corpus
from seqlm.text.tokenizer import Tokenizer
from seqlm.training import launch


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

    def __repr__(self) -> str:
        size = f"{parameter_count(self.model):,} parameters"
        return f"<Run {self.path}, step {self.step}: {self.config.cell.name}, {size}>"

    def generate(
        self, prompt: str | bytes = "", chars: int = 200, seed: int = 0, **options: Any
    ) -> str:
        """The continuation of the prompt, `chars` characters; options as in `stream`."""
        return "".join(self.stream(prompt, chars, seed, **options))

    def stream(
        self, prompt: str | bytes = "", chars: int = 200, seed: int = 0, **options: Any
    ) -> Iterator[str]:
        """The continuation as it comes, in pieces of whole characters; options as in `samples`."""
        for _, piece, _ in self.samples(prompt, 1, chars, seed, **options):
            yield piece

    def samples(
        self,
        prompt: str | bytes = "",
        count: int = 1,
        chars: int = 200,
        seed: int = 0,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: str | bytes | Sequence[str | bytes] = (),
    ) -> Iterator[tuple[int, str, bool]]:
        """`count` continuations with the seeds seed, seed + 1 and so on, up to 8 at a time.

        Yields the number of the text, a piece of whole characters, and whether the text ends there.

        Raises UsageError for a value out of range, InputError for a prompt character the
        vocabulary lacks.
        """
        pieces = generate_many(
            self.model,
            self.tokenizer,
            prompt,
            seeds=range(seed, seed + count),
            chars=chars,
            sampling=Sampling(temperature, top_k, top_p, min_p),
            stop=stop,
        )
        return self.runtime.each(pieces)

    def bits_per_char(self, text: str) -> float:
        """Bits per character of the text, read after the beginning symbol.

        A run on documents reads each document separately and counts its end.  A run on answers
        counts answers only.
        """
        passage = passage_of_text([text.encode("utf-8")], self.tokenizer)
        with self.runtime.active():
            bits = evaluate.score(self.model, self.tokenizer, passage).bits_per_char
        assert bits is not None, "a str has a number of characters"
        return bits

    def evaluate(
        self,
        *,
        data: str | Corpus | None = None,
        text: bytes | None = None,
        split: str = "val",
        protocol: str = "stream",
        context: int = 256,
        on_unknown: str = "error",
        tick: OnProgress = silent,
    ) -> dict[str, Any]:
        """Evaluate a split of a corpus, or a text; returns the object of `seqlm eval --json`.

        data: a path, a name or an open corpus; None takes the run's own corpus.
        tick: called with the share that is done.
        """
        if text is not None:
            passage = passage_of_text([text], self.tokenizer, on_unknown)
            source = {"data": None, "corpus": "text", "own_corpus": False, "split": "text"}
            characters = "code points"
        else:
            corpus = data or self.corpus()
            if isinstance(corpus, str):
                corpus = open_corpus(find_corpus(corpus))
            passage = passage_of_split(corpus, split, self.tokenizer, on_unknown)
            own = corpus.fingerprint == self.config.data.fingerprint
            characters = corpus.manifest["characters"]
            source = {
                "data": str(corpus.path),
                "corpus": corpus.label,
                "own_corpus": own,
                "split": split,
            }
        began = time.perf_counter()
        with self.runtime.active():
            score = evaluate.score(self.model, self.tokenizer, passage, protocol, context, tick)
        seconds = time.perf_counter() - began
        asked = passage.answers is not None  # the model reads the questions, too
        read = len(passage.symbols) if asked else score.chars or score.bytes
        return {
            "run": str(self.path),
            "step": self.step,
            "cell": self.config.cell.name,
            **source,
            "protocol": "answers" if asked else protocol,
            "context": context if protocol == "window" else None,
            "documents": None if passage.ends is None else len(passage.ends),
            "characters": characters,
            "bits_per_char": score.bits_per_char,
            "bits_per_byte": score.bits_per_byte,
            "nats_per_char": score.nats_per_char,
            "perplexity": score.perplexity,
            "accuracy": score.accuracy,
            "chars": score.chars,
            "bytes": score.bytes,
            "tokens": score.tokens,
            "unknown": passage.unknown,
            "seconds": seconds,
            "chars_per_second": read / seconds,
            "split_sha256": passage.sha256,
            "params": parameter_count(self.model),
            "device": self.runtime.device.value,
            "dtype": "float32",
            "backend": self.runtime.backend.value,
        }

    def corpus(self) -> Corpus:
        """The corpus the run was trained on; InputError where it is missing or has changed."""
        corpus = recorded_corpus(self.config.data.path, self.config.data.fingerprint)
        if corpus.fingerprint != self.config.data.fingerprint:
            raise InputError(
                f"{corpus.path} is not the corpus that {self.path} was trained on: it was prepared "
                f"anew. To evaluate on it all the same: --data {corpus.path}"
            )
        return corpus


def load(
    path: str | Path | None = None,
    step: str | int = "best",
    *,
    device: str = "cpu",
    cell: str | None = None,
    threads: int = 0,
    backend: str = "auto",
    graphs: str = "auto",
) -> Run:
    """The run at a path, or of a name under checkpoints/ (None: the newest), at a saved step.

    device, threads, backend, graphs: where and how this Run computes, as runtime.device and so on
    of `seqlm train`; how the run was trained does not matter.
    cell: the path of the researcher's own cell file, needed again for a run trained with one: a
    run's configuration alone never makes seqlm run a file.  Raises InputError for a run that is
    missing or damaged, and warns of a damaged step that was passed over.

    On a machine with other work, set GOMP_SPINCOUNT=1000 in the environment before torch is
    imported, or take threads=1: else idle threads of torch hold the cores that others need.
    """
    wanted = RuntimeConfig(device=device, threads=threads, backend=backend, graphs=graphs)
    run = read(path, step, Runtime.pick(wanted), cell)
    _warn(run.warnings)
    return run


def read(
    path: str | Path | None, step: str | int, runtime: Runtime, cell: str | None = None
) -> Run:
    """`load` for a Runtime that is picked already."""
    folder = runs.find(None if path is None else str(path))
    saved, said = runs.load(folder, str(step), "model")
    _refuse_cell_without_effect(folder, saved.config.cell.name, cell)
    config = runs.with_cell_file(saved.config, folder, cell)
    for name, now in cells.hashes(config.cell.name).items():
        if saved.environment.get(name) != now:
            said.append(f"The file of {name} is not as it was in training.")
    weights = saved.weights(config)  # first: only what the files bear out takes memory
    model = build(config, saved.tokenizer.vocab_size)
    model.load_state_dict(weights)
    model.to(runtime.device.value).eval()
    return Run(folder, saved.step, config, model, saved.tokenizer, runtime, said)


def _refuse_cell_without_effect(folder: Path, recorded: str, given: str | None) -> None:
    """Raises UsageError for a cell that is named where the run's cells are all seqlm's own."""
    if given is not None and given != recorded and not cell_files(recorded):
        raise UsageError(
            f"--cell {given}: {folder} was trained with {recorded}, a cell of seqlm, and needs no "
            "file. Leave --cell out."
        )


def train(
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    set: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    **flags: Any,
) -> Run:
    """Train and return the best step: `seqlm train` with the same options by the same names.

    data: a prepared corpus, by its path or its name in data/; a corpus known by name; or one or
    several files or folders of text, which are prepared into data/ first.
    flags: cell, width, layers, batch, length, lr, dropout, steps, time_limit, state, seed,
    init_from, device, dtype, threads.
    set: {"section.name": value}.  progress: draw a bar on standard error.
    On a machine with other work, set GOMP_SPINCOUNT as `load` says.
    """
    for name in flags:
        if name not in FLAGS:
            raise unknown("option of train", name, FLAGS)
    settings = merge_settings(set or {}, flags)
    if data is None:
        sources = []
    elif isinstance(data, str | Path):
        sources = [str(data)]
    else:
        sources = [str(source) for source in data]
    setup = launch.start(
        sources,
        run=None if run is None else str(run),
        preset=preset,
        config=config,
        settings=settings,
        resume=resume,
        force=force,
    )
    _warn(setup.warnings)
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=1.0, bar_format=layout, dynamic_ncols=True, disable=not progress) as bar:
        for report in setup.reports():
            bar.set_description_str(f"step {report.step:,} loss {report.loss:.4f}", refresh=False)
            bar.update(report.progress - bar.n)
    best = read(setup.run, "best", setup.runtime, setup.config.cell.name)
    _warn(best.warnings)
    return best


def _warn(texts: Sequence[str]) -> None:
    """Python's warnings for what the commands print, at the line that called seqlm."""
    for text in texts:
        warnings.warn(text, stacklevel=3)
