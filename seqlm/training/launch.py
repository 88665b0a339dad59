"""Checks and sets up a training: a new run, a resumed run, or a run that starts with the weights of
another run."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seqlm import cells
from seqlm.config import Config, cell_files, cell_key, changes, read_toml, resolve, stack
from seqlm.errors import Diverged, InputError, SeqlmError, UsageError
from seqlm.files import is_utf8
from seqlm.model import blueprint, parameter_count
from seqlm.progress import OnProgress, silent
from seqlm.runtime import Runtime, is_out_of_memory, memory_bytes
from seqlm.store import book, history, runs
from seqlm.store.checkpoint import KINDS, OTHER_STEP, Saved
from seqlm.text.corpus import Corpus, open_corpus, recorded_corpus
from seqlm.text.ready import Ready, as_prepared, place, ready
from seqlm.training import parallel, snapshot
from seqlm.training.loop import Report, share_done, train
from seqlm.training.trainer import Trainer

SEQUENCES = {"train.batch", "train.length"}  # keys of the configuration


@dataclass
class Training:
    """A training that is checked and ready.  Nothing is written to the run yet."""

    run: Path
    trainer: Trainer
    resumed: Saved | None = None  # the step from which training continues
    last: Path | None = None  # the last step of the run when it was resumed
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # {key: (old, new value)}
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # about the corpus and the initial weights
    force: bool = False  # replace a run that exists
    note: str | None = None  # for the lab book; None: the run keeps its note

    @property
    def config(self) -> Config:
        return self.trainer.config

    @property
    def runtime(self) -> Runtime:
        return self.trainer.runtime

    @property
    def finished(self) -> bool:
        """Whether this is a resumed run with nothing left to train."""
        if self.resumed is None:
            return False
        progress = self.resumed.progress
        more = any(key.startswith("train.") for key in changes(self.resumed.config, self.config))
        return (progress.finished and not more) or share_done(self.config, progress) >= 1

    def reports(
        self,
        clock: Callable[[], float] = time.perf_counter,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[Report]:
        """Train, and yield a report after every step.

        A run that `force` replaces is deleted at the first validation.  If training diverges before
        that, or ends before it saves a step that learned, the old run is restored.
        """
        if self.finished:
            return
        with _enough_memory(self.config):
            self.trainer.warm_up()
            # a barrier: the writer changes the run's folder next, which others may still read
            parallel.largest(0)
            with self._opened() if parallel.is_writer() else nullcontext():
                yield from train(self.trainer, self.run, clock=clock, interrupted=interrupted)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Lock the run's folder, and set an old run aside that this one replaces."""
        if self.resumed is None:
            runs.new(self.run, self.force)
        with runs.opened(self.run):
            if self.resumed is None:
                runs.set_aside(self.run)
            elif runs.target(self.run / runs.LAST) != self.last:
                raise UsageError(
                    f"Another process has trained {self.run} in the meantime. Resume it again."
                )
            if self.note is not None:
                book.write_note(self.run, self.note)
            try:
                yield
            except Diverged as error:
                if not runs.bring_back(self.run):
                    raise
                raise Diverged(f"{error} The old run {self.run} was restored.") from error
            finally:
                runs.keep_one(self.run)


def start(
    data: str | Sequence[str] | None = None,
    *,
    run: str | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    force: bool = False,
    on_progress: OnProgress = silent,
) -> Training:
    """Check and set up a training: first the configuration, then the run's name, then the corpus.

    data: a corpus, or sources of text, which `text.ready` prepares; it calls `on_progress`.
    settings: {key: value} of --set and flags.
    Raises UsageError for an impossible configuration, and for a run that exists if neither
    `resume` nor `force` is True.
    """
    sources, settings = [data] if isinstance(data, str) else list(data or ()), settings or {}
    path = settings.get("data.path")
    if sources and path is not None and sources != [path]:
        raise UsageError(f"data.path is {path} and another corpus is named. Keep one of them.")
    file = None if config is None else Path(config)
    if resume and force:
        raise UsageError("--resume continues a run and --force replaces it. Choose one.")
    if resume:
        return _resume(sources, run, preset, {**(read_toml(file) if file else {}), **settings})
    wanted, origin = configuration(preset, file, settings)
    sources = sources or ([wanted.data.path] if wanted.data.path else [])
    cell = "-".join(map(cell_key, stack(wanted.cell.name)))
    name = run or f"{place(sources).name}-{cell}"
    folder = runs.new(runs.place(name), force)  # before the text is prepared, which may take long
    prepared = Ready(place(sources), [], [])
    with parallel.writer_first():
        if parallel.is_writer():
            prepared = ready(sources, on_progress)
    corpus = open_corpus(prepared.folder)
    wanted = for_corpus(wanted, corpus)
    fitting = _with_whole_answers(wanted, corpus)
    # only the preset's sequences change, not those that the user chose
    if fitting != wanted and not SEQUENCES & {*settings, *(read_toml(file) if file else ())}:
        wanted = fitting
        prepared.notes.append(
            f"{wanted.train.batch} sequences of {wanted.train.length} characters in a step, so "
            "that each line with an answer fits into one."
        )
    setup = _training(wanted, corpus, folder)
    setup.force, setup.notes, setup.warnings = force, prepared.notes, prepared.warnings
    if origin is not None:
        saved, damaged = origin
        setup.warnings += damaged
        kept, whole = snapshot.init_from(setup.trainer, saved), corpus.tokenizer.vocab_size
        setup.notes.append(
            f"Starting with the weights of {saved.folder}; {kept} of the {whole} symbols have "
            "trained weights."
        )
    return setup


def configuration(
    preset: str | None, file: Path | None, settings: Mapping[str, Any]
) -> tuple[Config, tuple[Saved, list[str]] | None]:
    """The complete configuration of a new run.  If the run starts with the weights of another run,
    also the step that has these weights, and warnings about damaged steps.

    The new model then has the architecture of that step.  Raises UsageError if the settings ask
    for another architecture, or for a model that cannot be built.
    """
    preset = preset or "small"
    config = resolve(preset, file, settings)
    if not config.train.init_from:
        return _buildable(complete(config)), None
    run = runs.find(config.train.init_from, "--init-from")
    saved, warnings = runs.load(run, runs.BEST, "model")
    old = _complete_saved(saved, runs.with_cell_file(saved.config, run, settings.get("cell.name")))
    architecture = {key: value for key, value in old.flat().items() if _is_architecture(key)}
    config = resolve(preset, file, settings, under=architecture)
    whose, way_out = f"The run of --init-from, {run},", "Leave it out, or leave out --init-from."
    return _buildable(_same_architecture(old, config, whose, way_out)), (saved, warnings)


def _buildable(config: Config) -> Config:
    """The configuration, after a test that a model can be built from it.

    A cell file also reads one sequence and one symbol, before a run is created.
    """
    if not cell_files(config.cell.name):
        blueprint(config, vocab_size=1)
        return config
    try:
        model = blueprint(config, vocab_size=1)
        _, state = model(torch.zeros(1, 2, dtype=torch.long))
        model.step(torch.zeros(1, dtype=torch.long), state)
    except SeqlmError:  # such as an option out of range
        raise
    except Exception as error:  # code from the user's file may raise any exception
        raise InputError(
            f"{config.cell.name} does not work as a cell: {type(error).__name__}: {error}. Correct "
            "the file; --debug shows where."
        ) from error
    return config


def _resume(
    sources: Sequence[str], run: str | None, preset: str | None, settings: Mapping[str, Any]
) -> Training:
    if preset:
        raise UsageError(
            "--resume continues with the run's own configuration, so --preset has no effect. "
            "Remove --preset; change single options with --set."
        )
    if settings.get("train.init_from"):
        raise UsageError(
            "--resume continues a run and --init-from starts a new one with the weights of "
            "another. Choose one."
        )
    folder = runs.find(run)
    last = runs.target(folder / runs.LAST)
    saved, warnings = runs.load(folder, runs.LAST, *KINDS)
    old = runs.with_cell_file(saved.config, folder, settings.get("cell.name"))
    old = _complete_saved(saved, old)
    if "data.path" in settings:
        sources = sources or [settings["data.path"]]
    if sources:
        corpus = open_corpus(as_prepared(sources))
    else:
        corpus = recorded_corpus(old.data.path, old.data.fingerprint)
    config = for_corpus(old.continued(settings), corpus)
    _refuse_other_corpus(saved, config, corpus)
    config = _same_architecture(
        old, config, "The run", "Train a new run from the start with --run NAME."
    )
    if config.optim.name != old.optim.name:
        raise UsageError(
            f"The run was trained with optim.name={old.optim.name}, and a resumed run keeps its "
            f"optimizer. Remove optim.name, or start a new run with --init-from {folder.name}."
        )
    # read and checked before a model is built, so that a wrong file takes no memory
    tensors = snapshot.tensors_of(saved, saved.plan(old))
    setup = _training(config, corpus, folder)
    snapshot.restore(setup.trainer, saved, *tensors)
    setup.resumed, setup.last = saved, last
    setup.changed, setup.warnings = changes(old, config), warnings
    try:
        history.refuse_missing(folder, saved.step)
    except InputError as error:  # the weights are whole, so the training can go on
        setup.warnings.append(str(error))
    now, was = snapshot.environment(setup.trainer), saved.environment
    other = [f"{key} {now[key]}, was {was.get(key)}" for key in now if now[key] != was.get(key)]
    if other:
        setup.warnings.append(
            "The environment has changed, so results may differ in the last bits from those of an "
            f"uninterrupted run: {'; '.join(other)}."
        )
    return setup


def _training(config: Config, corpus: Corpus, folder: Path) -> Training:
    runtime = Runtime.pick(config.runtime)
    device = runtime.device.value
    parallel.refuse_unequal(config.train.batch, config.train.accumulate, device)
    _refuse_too_large(config, corpus.tokenizer.vocab_size, device)
    longest = _longest_answer(corpus)
    if longest > config.train.length:
        raise UsageError(
            f"The longest line with an answer has {longest:,} characters, and --length is "
            f"{config.train.length}: answers would be learned without their questions. Give "
            f"--length {longest}, and a smaller --batch if memory is short."
        )
    with _enough_memory(config):
        return Training(folder, Trainer(config, corpus, runtime))


def _longest_answer(corpus: Corpus) -> int:
    """The symbols of the longest line where only answers are learned; 0 for other corpora."""
    ends = corpus.ends("train") if corpus.tokenizer.mark else None
    return 0 if ends is None else int(np.diff(ends, prepend=0).max())


def _with_whole_answers(config: Config, corpus: Corpus) -> Config:
    """The configuration with fewer and longer sequences, if lines with answers need them; the same
    one if none are long enough."""
    longest, batch, length = _longest_answer(corpus), config.train.batch, config.train.length
    parts = config.train.accumulate * parallel.world()
    while length < longest and batch % (2 * parts) == 0:
        batch, length = batch // 2, length * 2
    if length < longest:
        return config
    return replace(config, train=replace(config.train, batch=batch, length=length))


@contextmanager
def _enough_memory(config: Config) -> Iterator[None]:
    """Raises SeqlmError if memory runs out in the block; it names the options to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        train = config.train
        raise SeqlmError(
            "There is not enough memory to train this model with this batch. Lower --batch "
            f"({train.batch} now), --length ({train.length}) or --width ({config.model.width}), or "
            "split the batch: --set train.accumulate=2. Saved steps are intact."
        ) from error


def _refuse_too_large(config: Config, vocab_size: int, device: str) -> None:
    """Raises UsageError for a model that is too large for the memory of the device."""
    parameters = parameter_count(blueprint(config, vocab_size))
    needed, there = 16 * parameters, memory_bytes(device)  # weights, gradients and two moments
    if there and needed > there:
        raise UsageError(
            f"The model has {parameters:,} parameters, and training them takes at least "
            f"{needed / 1e9:,.1f} GB; this {device} has {there / 1e9:,.1f} GB. Choose a smaller "
            "--width, or fewer --layers."
        )


def complete(config: Config) -> Config:
    """The configuration with a value for every option of its cells.

    Raises UsageError for an unknown cell or option, and for settings that exclude each other.
    """
    train = config.train
    if not train.steps and not train.time_limit:
        raise UsageError(
            "0 steps mean that training lasts until the time limit, and no time limit is set. Add "
            "--time-limit, such as --time-limit 5m, or give --steps 500."
        )
    if train.batch % train.accumulate:
        raise UsageError(
            f"train.batch is {train.batch} and train.accumulate {train.accumulate}; the batch must "
            "divide into micro-batches of equal size."
        )
    if train.early_stop and not train.eval_every:
        raise UsageError(
            f"train.early_stop is {train.early_stop} and counts validations, and with "
            "train.eval_every=0 there are none before the end. Set train.eval_every, such as 50."
        )
    options = cells.resolved_options(config.cell.name, config.cell.options)
    return replace(config, cell=replace(config.cell, options=options))


def _complete_saved(saved: Saved, config: Config) -> Config:
    """`complete` for the configuration of a saved step; InputError if it is impossible."""
    try:
        return complete(config)
    except UsageError as error:
        raise InputError(
            f"The configuration in {saved.folder} is damaged: {error} {OTHER_STEP}"
        ) from error


def for_corpus(config: Config, corpus: Corpus) -> Config:
    """The configuration with the path and the fingerprint of the corpus."""
    if not is_utf8(str(corpus.path)):
        raise InputError(
            f"The path {corpus.path} is not UTF-8, and cannot be written into a configuration. "
            "Rename the folder."
        )
    data = replace(config.data, path=str(corpus.path), fingerprint=corpus.fingerprint)
    return replace(config, data=data)


def _refuse_other_corpus(saved: Saved, config: Config, corpus: Corpus) -> None:
    """Raises UsageError if a resumed run would change its corpus, and InputError if the
    tokenizers of run and corpus differ."""
    old = saved.config.data
    if not corpus.has(old.fingerprint):
        raise UsageError(
            f"The run was trained on {old.path} as it was then, and {config.data.path} is another "
            "corpus. A run cannot change its corpus: train a new run with --run NAME."
        )
    if saved.tokenizer.to_dict() != corpus.tokenizer.to_dict():
        raise InputError(
            f"The tokenizer in {saved.folder} is not that of its corpus, {corpus.path}. Train a "
            "new run with --run NAME."
        )


def _same_architecture(old: Config, config: Config, whose: str, way_out: str) -> Config:
    """The complete configuration; UsageError if its model cannot have the weights of `old`."""
    if config.cell.name == old.cell.name:  # options of another cell do not apply; rejected below
        config = complete(config)
    for key, (before, now) in changes(old, config).items():
        if _is_architecture(key):
            raise UsageError(
                f"{whose} was trained with {key} = {before}, which cannot change to {now}. "
                f"{way_out}"
            )
    return config


def _is_architecture(key: str) -> bool:
    if key == "model.dropout" or key.endswith(".solver"):  # these do not change the weights
        return False
    return key.split(".")[0] in ("model", "cell")
