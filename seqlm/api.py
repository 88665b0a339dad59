"""seqlm as a library: `load` and `train` give a Run that evaluates and generates.

The command line is a thin layer over this file: a command and a function do the same thing.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import Any

import torch

from seqlm import checkpoint, evaluate, training
from seqlm import ops as scans
from seqlm.checkpoint import Saved
from seqlm.config import FLAGS, Config, cell_key, changes, read_toml, stack
from seqlm.config import resolve as resolve_config
from seqlm.corpora import BUILT_IN
from seqlm.data import Corpus, find_corpus, open_corpus
from seqlm.errors import InputError, UsageError, unknown
from seqlm.evaluate import Tick
from seqlm.generate import Sampling, generate
from seqlm.model import LanguageModel, build, parameter_count
from seqlm.prepare import prepare
from seqlm.runtime import Choice, pick_device, pick_dtype, set_threads
from seqlm.tokenizer import Tokenizer
from seqlm.training import Learner, Report


@dataclass(frozen=True)
class Run:
    """A trained model with its tokenizer and its configuration, read from one saved step."""

    path: Path
    step: int
    config: Config
    model: LanguageModel
    tokenizer: Tokenizer
    device: Choice
    warnings: list[str] = field(default_factory=list)  # damaged steps that were passed over

    def generate(self, prompt: str = "", chars: int = 200, seed: int = 0, **options: Any) -> str:
        """The continuation of the prompt, `chars` characters; options as in `stream`."""
        return "".join(self.stream(prompt, chars, seed, **options))

    def stream(
        self,
        prompt: str = "",
        chars: int = 200,
        seed: int = 0,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """The continuation as it comes, in pieces of whole characters.

        Raises UsageError for a value out of range, InputError for a prompt character the
        vocabulary lacks.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p)
        return generate(
            self.model,
            self.tokenizer,
            prompt,
            chars=chars,
            sampling=sampling,
            stop=stop,
            seed=seed,
        )

    def bits_per_char(self, text: str) -> float:
        """Bits per character of the text, read as one stream from the beginning of text."""
        passage = evaluate.passage_of_text(text.encode("utf-8"), self.tokenizer)
        return evaluate.stream(self.model, passage.symbols) / log(2) / len(text)

    def evaluate(
        self,
        *,
        data: str | None = None,
        text: bytes | None = None,
        split: str = "val",
        protocol: str = "stream",
        context: int = 256,
        on_unknown: str = "error",
        tick: Tick | None = None,
    ) -> dict[str, Any]:
        """The figures of `seqlm eval --json`: of a split of the run's corpus, or of the corpus
        `data`, or of a text.  `tick` is called with the share that is done."""
        if text is not None:
            passage = evaluate.passage_of_text(text, self.tokenizer, on_unknown)
            source = {"data": None, "corpus": "text", "own_corpus": False, "split": "text"}
        else:
            corpus = open_corpus(find_corpus(data)) if data else self.corpus()
            passage = evaluate.passage_of_split(corpus, split, self.tokenizer, on_unknown)
            own = corpus.fingerprint == self.config.data.fingerprint
            source = {
                "data": str(corpus.path),
                "corpus": corpus.label,
                "own_corpus": own,
                "split": split,
            }
        began = time.perf_counter()
        score = evaluate.score(self.model, self.tokenizer, passage, protocol, context, tick)
        seconds = time.perf_counter() - began
        return {
            "run": str(self.path),
            "step": self.step,
            "cell": self.config.cell.name,
            **source,
            "protocol": protocol,
            "context": context if protocol == "window" else None,
            "bits_per_char": score.bits_per_char,
            "bits_per_byte": score.bits_per_byte,
            "nats_per_char": score.nats_per_char,
            "perplexity": score.perplexity,
            "chars": score.chars,
            "bytes": score.bytes,
            "tokens": score.tokens,
            "unknown": passage.unknown,
            "seconds": seconds,
            "chars_per_second": (score.chars or score.bytes) / seconds,
            "split_sha256": passage.sha256,
            "params": parameter_count(self.model),
            "device": self.device.value,
            "dtype": "float32",
        }

    def corpus(self) -> Corpus:
        """The corpus the run was trained on; InputError where it is gone or another now."""
        path = Path(self.config.data.path)
        if not path.exists():
            raise InputError(
                f"The run's corpus {path} is not here. Prepare it again, or name where it is with "
                "--data DIR."
            )
        corpus = open_corpus(path)
        if corpus.fingerprint != self.config.data.fingerprint:
            raise InputError(
                f"{path} is not the corpus that {self.path} was trained on: it was prepared anew. "
                f"To evaluate on it all the same: --data {path}"
            )
        return corpus


def load(
    path: str | Path | None = None,
    step: str | int = "best",
    *,
    device: str = "cpu",
    cell: str | None = None,
    threads: int = 0,
) -> Run:
    """The run at a path, or of a name under checkpoints/ (None: the newest), at a saved step.

    cell: the path of the researcher's own cell file, needed again for a run trained with one: a
    run's configuration alone never makes seqlm run a file.  Raises InputError for a run that is
    missing or damaged.
    """
    folder = checkpoint.find_run(None if path is None else str(path))
    saved, warnings = checkpoint.load(folder, str(step))
    config = _with_own_cell(saved.config, folder, cell)
    set_threads(threads)
    picked = pick_device(device)
    model = build(config, saved.tokenizer.vocab_size)
    model.load_state_dict(saved.tensors("model"))
    model.to(picked.value).eval()
    return Run(folder, saved.step, config, model, saved.tokenizer, picked, warnings)


def _with_own_cell(config: Config, run: Path, given: str | None) -> Config:
    """The configuration with the cell file that the user names; InputError where one is missing."""
    recorded = config.cell.name
    files = [name for name in stack(recorded) if name.endswith(".py")]
    if not files:
        return config
    if given is None or [*map(cell_key, stack(given))] != [*map(cell_key, stack(recorded))]:
        raise InputError(
            f"{run} was trained with a cell of its author's own, {', '.join(files)}, which is "
            f"code. If you trust the file, name it: --cell {recorded}"
        )
    return config.updated({"cell.name": given})


@dataclass
class Training:
    """A training about to run: everything is checked, and nothing is written yet."""

    run: Path
    learner: Learner
    device: Choice
    dtype: Choice
    backend: Choice
    resumed: Saved | None = None
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # given anew on resuming
    warnings: list[str] = field(default_factory=list)

    @property
    def config(self) -> Config:
        return self.learner.config

    @property
    def finished(self) -> bool:
        """A resumed run that has nothing left to train."""
        return self.resumed is not None and training.is_finished(self.resumed, self.config)

    def reports(
        self,
        clock: Callable[[], float] = time.perf_counter,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[Report]:
        """Train; a report after every step.  A run that `force` replaces is deleted first."""
        if self.resumed is None and self.run.exists():
            shutil.rmtree(self.run)
        yield from training.train(self.learner, self.run, clock=clock, interrupted=interrupted)


def start(
    data: str | None = None,
    *,
    run: str | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    given: Mapping[str, Any] | None = None,
    resume: bool = False,
    force: bool = False,
) -> Training:
    """Check and set up a training: first the configuration, then the corpus, then the run.

    given: {key: value} of --set and flags.  Raises UsageError for a configuration that cannot be,
    and for a run that exists already without `resume` or `force`.
    """
    file = None if config is None else Path(config)
    if resume:
        return _resume(data, run, preset, {**(read_toml(file) if file else {}), **(given or {})})
    wanted = configuration(preset, file, given)
    corpus = open_corpus(find_corpus(data) or prepare([BUILT_IN])[0])
    cell = "-".join(map(cell_key, stack(wanted.cell.name)))
    folder = checkpoint.new_run(run or f"{corpus.path.name}-{cell}", force)
    return _training(training.for_corpus(wanted, corpus), corpus, folder)


def configuration(preset: str | None, file: Path | None, given: Mapping[str, Any] | None) -> Config:
    """The complete configuration of a new run; UsageError unless a model can be built from it."""
    config = training.complete(resolve_config(preset or "small", file, given))
    with torch.device("meta"):
        build(config, vocab_size=1)
    return config


def _resume(
    data: str | None, run: str | None, preset: str | None, given: Mapping[str, Any]
) -> Training:
    if preset:
        raise UsageError(
            "--resume continues with the run's own configuration, so --preset has no effect. "
            "Leave it out; change single options with --set."
        )
    folder = checkpoint.find_run(run)
    saved, warnings = checkpoint.load(folder, "last")
    own = _with_own_cell(saved.config, folder, given.get("cell.name"))
    corpus = open_corpus(find_corpus(data or own.data.path))
    wanted = own.continued(given)
    if wanted.cell.name == own.cell.name:  # of another cell the options say nothing: refused below
        wanted = training.complete(wanted)
    config = training.for_corpus(wanted, corpus)
    training.refuse_other_architecture(own, config)
    setup = _training(config, corpus, folder)
    setup.learner.restore(saved)
    setup.resumed, setup.changed, setup.warnings = saved, changes(own, config), warnings
    return setup


def _training(config: Config, corpus: Corpus, folder: Path) -> Training:
    set_threads(config.runtime.threads)
    device = pick_device(config.runtime.device)
    dtype = pick_dtype(config.runtime.dtype, device.value)
    backend = scans.pick(config.runtime.backend)
    learner = Learner(config, corpus, device.value, dtype.value, backend.value)
    return Training(folder, learner, device, dtype, backend)


def train(
    data: str | Path | None = None,
    *,
    set: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    **flags: Any,
) -> Run:
    """Train and return the best step: `seqlm train` with the same options by the same names.

    data: a prepared corpus, a path or a name under data/.  flags: cell, width, layers, batch,
    length, lr, dropout, steps, time_limit, state, seed, device, dtype, threads.
    set: {"section.name": value}.
    """
    for name in flags:
        if name not in FLAGS:
            raise unknown("option of train", name, FLAGS)
    given = {**(set or {}), **{FLAGS[name]: value for name, value in flags.items()}}
    setup = start(
        None if data is None else str(data),
        run=None if run is None else str(run),
        preset=preset,
        config=config,
        given=given,
        resume=resume,
        force=force,
    )
    for _ in setup.reports():
        pass
    return load(setup.run, device=setup.device.value, cell=setup.config.cell.name)
