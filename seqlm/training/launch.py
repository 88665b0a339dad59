"""A training, set up and checked: a new one, one that is resumed, one from another's weights."""

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
from seqlm.store import checkpoint, runs
from seqlm.store.checkpoint import KINDS, Saved
from seqlm.text.corpus import Corpus, open_corpus, recorded_corpus
from seqlm.text.ready import Ready, as_prepared, place, ready
from seqlm.training import parallel, snapshot
from seqlm.training.loop import Report, done, train
from seqlm.training.trainer import Trainer


@dataclass
class Training:
    """A training about to run: everything is checked, and nothing is written yet."""

    run: Path
    trainer: Trainer
    resumed: Saved | None = None
    last: Path | None = None  # the step that the run's pointer named when it was resumed
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # given anew on resuming
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # about the corpus and the first weights
    force: bool = False  # a run that exists is replaced

    @property
    def config(self) -> Config:
        return self.trainer.config

    @property
    def runtime(self) -> Runtime:
        return self.trainer.runtime

    @property
    def finished(self) -> bool:
        """A resumed run that has nothing left to train."""
        return self.resumed is not None and is_finished(self.resumed, self.config)

    def reports(
        self,
        clock: Callable[[], float] = time.perf_counter,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[Report]:
        """Train; a report after every step.  A run that `force` replaces is deleted
        at the first validation; it comes back where training diverges before that, or ends before
        it saves a step that learned."""
        if self.finished:
            return
        with _enough_memory(self.config):
            self.trainer.warm_up()
            parallel.largest(0)  # nobody still looks at what the writer changes now
            with self._opened() if parallel.is_writer() else nullcontext():
                yield from train(self.trainer, self.run, clock=clock, interrupted=interrupted)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """The run's folder, as training begins in it."""
        if self.resumed is None:
            runs.new(self.run, self.force)
        with runs.opened(self.run):
            if self.resumed is None:
                runs.set_aside(self.run)
            elif runs.pointed(self.run / runs.LAST) != self.last:
                raise UsageError(
                    f"Another process trained {self.run} on in the meantime. Resume it again."
                )
            try:
                yield
            except Diverged as error:
                if not runs.bring_back(self.run):
                    raise
                back = f"{self.run} is the run again that was there before."
                raise Diverged(f"{error} {back}") from error
            finally:
                runs.keep_one(self.run)


def start(
    data: str | Sequence[str] | None = None,
    *,
    run: str | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    given: Mapping[str, Any] | None = None,
    resume: bool = False,
    force: bool = False,
    on_progress: OnProgress = silent,
) -> Training:
    """Check and set up a training: first the configuration, then the run's name, then the corpus.

    data: the corpus, or sources of text, which are prepared first, as in `text.ready`;
    `on_progress` is called meanwhile.
    given: {key: value} of --set and flags.  Raises UsageError for a configuration that cannot be,
    and for a run that exists already without `resume` or `force`.
    """
    sources = [data] if isinstance(data, str) else list(data or ())
    recorded = (given or {}).get("data.path")
    if sources and recorded is not None and [*sources] != [recorded]:
        raise UsageError(f"data.path is {recorded} and another corpus is named. Keep one of them.")
    file = None if config is None else Path(config)
    if resume and force:
        raise UsageError("--resume continues a run and --force replaces it. Choose one.")
    if resume:
        settings = {**(read_toml(file) if file else {}), **(given or {})}
        return _resume(sources, run, preset, settings)
    wanted, origin = configuration(preset, file, given)
    sources = sources or ([wanted.data.path] if wanted.data.path else [])
    cell = "-".join(map(cell_key, stack(wanted.cell.name)))
    name = run or f"{place(sources).name}-{cell}"
    folder = runs.new(runs.place(name), force)  # before the text is prepared, which may take long
    found = _corpus(sources, on_progress)
    corpus = open_corpus(found.folder)
    setup = _training(for_corpus(wanted, corpus), corpus, folder)
    setup.force, setup.notes, setup.warnings = force, found.notes, found.warnings
    if origin is not None:
        saved, damaged = origin
        setup.warnings += damaged
        kept, whole = snapshot.init_from(setup.trainer, saved), corpus.tokenizer.vocab_size
        setup.notes.append(
            f"Beginning with the weights of {saved.folder}: {kept} of {whole} symbols keep theirs."
        )
    return setup


def _corpus(sources: Sequence[str], on_progress: OnProgress) -> Ready:
    """The corpus that the sources name; the writer prepares it if it has to be."""
    folder = place(sources)
    with parallel.writer_first():
        return ready(sources, on_progress) if parallel.is_writer() else Ready(folder, [], [])


def configuration(
    preset: str | None, file: Path | None, given: Mapping[str, Any] | None
) -> tuple[Config, tuple[Saved, list[str]] | None]:
    """The complete configuration of a new run, and the step whose weights it begins with, if any,
    with warnings about what of its run was damaged.

    The model of that step is the new one's too.  Raises UsageError for another model, and for a
    configuration of which no model can be built.
    """
    preset = preset or "small"
    config = resolve(preset, file, given)
    if not config.train.init_from:
        return _buildable(complete(config)), None
    run = runs.find(config.train.init_from, "--init-from")
    saved, warnings = runs.load(run, runs.BEST, "model")
    name = (given or {}).get("cell.name")
    old = _whole(saved, runs.with_own_cell(saved.config, run, name))
    own = {key: value for key, value in old.flat().items() if _is_architecture(key)}
    config = resolve(preset, file, given, under=own)
    if config.cell.name == old.cell.name:  # of another cell the options say nothing: refused below
        config = complete(config)
    refuse_other_architecture(old, config)
    return _buildable(config), (saved, warnings)


def _buildable(config: Config) -> Config:
    """The configuration, of which a model can be built."""
    if cell_files(config.cell.name):
        _try_out(config)
    else:
        blueprint(config, vocab_size=1)
    return config


def _try_out(config: Config) -> None:
    """One sequence and one step through a researcher's own cell, before a run is made of it."""
    try:
        model = blueprint(config, vocab_size=1)
        _, state = model(torch.zeros(1, 2, dtype=torch.long))
        model.step(torch.zeros(1, dtype=torch.long), state)
    except SeqlmError:  # an option out of range says so itself
        raise
    except Exception as error:  # the researcher's code: whatever it raises is a fault of the file
        raise InputError(
            f"{config.cell.name} does not work as a cell: {type(error).__name__}: {error}. Correct "
            "the file; --debug shows where."
        ) from error


def _resume(
    sources: Sequence[str], run: str | None, preset: str | None, given: Mapping[str, Any]
) -> Training:
    if preset:
        raise UsageError(
            "--resume continues with the run's own configuration, so --preset has no effect. "
            "Leave it out; change single options with --set."
        )
    if given.get("train.init_from"):
        raise UsageError(
            "--resume continues with all of a run and --init-from begins with weights alone. "
            "Choose one."
        )
    folder = runs.find(run)
    last = runs.pointed(folder / runs.LAST)
    saved, warnings = runs.load(folder, runs.LAST, *KINDS)
    own = _whole(saved, runs.with_own_cell(saved.config, folder, given.get("cell.name")))
    if sources:
        corpus = open_corpus(as_prepared(sources))
    else:
        corpus = recorded_corpus(own.data.path, own.data.fingerprint)
    wanted = own.continued(given)
    if wanted.cell.name == own.cell.name:  # of another cell the options say nothing: refused below
        wanted = complete(wanted)
    config = for_corpus(wanted, corpus)
    refuse_other_corpus(saved, config, corpus)
    refuse_other_architecture(own, config)
    tensors = snapshot.tensors_of(saved, saved.plan(own))  # before a model takes memory
    setup = _training(config, corpus, folder)
    snapshot.restore(setup.trainer, saved, *tensors)
    setup.resumed, setup.last = saved, last
    setup.changed, setup.warnings = changes(own, config), warnings
    now, was = snapshot.environment(setup.trainer), saved.environment
    other = [f"{key} {now[key]}, was {was.get(key)}" for key in now if now[key] != was.get(key)]
    if other:
        setup.warnings.append(
            "The run goes on in another environment, so not to the last bit as it would have: "
            f"{'; '.join(other)}."
        )
    return setup


def _training(config: Config, corpus: Corpus, folder: Path) -> Training:
    runtime = Runtime.pick(config.runtime)
    device = runtime.device.value
    parallel.refuse_unequal(config.train.batch, config.train.accumulate, device)
    refuse_too_large(config, corpus.tokenizer.vocab_size, device)
    longest = _longest(corpus)
    if longest > config.train.length:
        raise UsageError(
            f"A line with its answer has up to {longest:,} characters, and --length is "
            f"{config.train.length}: the answers of longer lines would be learned without their "
            f"questions. Give --length {longest}, and a smaller --batch if memory is short."
        )
    with _enough_memory(config):
        return Training(folder, Trainer(config, corpus, runtime))


def _longest(corpus: Corpus) -> int:
    """The symbols of the longest line to train on whose answer is learned; 0 where all is."""
    ends = corpus.ends("train")
    if not corpus.tokenizer.mark or ends is None:
        return 0
    return int(np.diff(ends, prepend=0).max())


@contextmanager
def _enough_memory(config: Config) -> Iterator[None]:
    """Raises SeqlmError with what to lower where the memory is full."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        train = config.train
        raise SeqlmError(
            "There is not enough memory to train this model with this batch. Lower --batch "
            f"({train.batch} now), --length ({train.length}) or --width ({config.model.width}), or "
            "split the batch: --set train.accumulate=2. What was saved before is intact."
        ) from error


def refuse_too_large(config: Config, vocab_size: int, device: str) -> None:
    """Raises UsageError for a model that cannot be trained in the memory there is."""
    parameters = parameter_count(blueprint(config, vocab_size))
    needed, there = 16 * parameters, memory_bytes(device)  # weights, gradients and two moments
    if there and needed > there:
        raise UsageError(
            f"The model has {parameters:,} parameters, and training them takes "
            f"{needed / 1e9:,.1f} GB at least; this {device} has {there / 1e9:,.1f} GB. Choose a "
            "smaller --width, or fewer --layers."
        )


def complete(config: Config) -> Config:
    """The configuration with every option of its cells written out.

    Raises UsageError for a cell, an option or a combination that cannot be.
    """
    train = config.train
    if not train.steps and not train.time_limit:
        raise UsageError("Nothing says how long to train. Give --steps or --time-limit.")
    if train.batch % train.accumulate:
        raise UsageError(
            f"train.batch is {train.batch} and train.accumulate {train.accumulate}; the batch must "
            "divide into micro-batches of equal size."
        )
    options = cells.resolved_options(config.cell.name, config.cell.options)
    return replace(config, cell=replace(config.cell, options=options))


def _whole(saved: Saved, config: Config) -> Config:
    """The complete configuration of a saved step; InputError where it cannot be."""
    try:
        return complete(config)
    except UsageError as error:
        raise InputError(
            f"{saved.folder} has a configuration that cannot be: {error} {checkpoint.ANOTHER}"
        ) from error


def for_corpus(config: Config, corpus: Corpus) -> Config:
    """The configuration with the corpus' place and identity in it."""
    if not is_utf8(str(corpus.path)):
        raise InputError(
            f"The path {corpus.path} is not UTF-8, and cannot be written into a configuration. "
            "Rename the folder."
        )
    data = replace(config.data, path=str(corpus.path), fingerprint=corpus.fingerprint)
    return replace(config, data=data)


def refuse_other_corpus(saved: Saved, now: Config, corpus: Corpus) -> None:
    """Raises UsageError when a resumed run would get another corpus, InputError where its tokenizer
    is not the one of its corpus."""
    before = saved.config.data
    if before.fingerprint != now.data.fingerprint:
        raise UsageError(
            f"The run was trained on {before.path} as it was then, and {now.data.path} is "
            "another corpus. A run keeps its model and its corpus: train another one with "
            "--run NAME."
        )
    if saved.tokenizer.to_dict() != corpus.tokenizer.to_dict():
        raise InputError(
            f"The tokenizer in {saved.folder} is not that of its corpus, {corpus.path}. Train "
            "another run with --run NAME."
        )


def refuse_other_architecture(saved: Config, now: Config) -> None:
    """Raises UsageError when the weights of a run would get another model."""
    for key, (old, new) in changes(saved, now).items():
        if _is_architecture(key):
            raise UsageError(
                f"The run was trained with {key} = {old}, and {new} is given now. Weights keep "
                "their model: train another run from the start with --run NAME."
            )


def _is_architecture(key: str) -> bool:
    if key == "model.dropout" or key.endswith(".solver"):  # with which the weights are the same
        return False
    return key.split(".")[0] in ("model", "cell")


def is_finished(saved: Saved, config: Config) -> bool:
    """Nothing is left to train: the run ended, and `config` does not ask for more."""
    asked = any(key.startswith("train.") for key in changes(saved.config, config))
    return (saved.progress.finished and not asked) or done(config, saved.progress) >= 1
