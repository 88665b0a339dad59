"""Training: set up and checked, then a generator of reports, one a step.

The command line draws the reports, tests read them.
"""

import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from seqlm import cells, checkpoint, ops
from seqlm.checkpoint import Progress, Saved
from seqlm.config import Config, cell_key, changes, read_toml, stack
from seqlm.config import resolve as resolve_config
from seqlm.corpora import BUILT_IN
from seqlm.data import Corpus, find_corpus, open_corpus, recorded_corpus
from seqlm.errors import Diverged, InputError, SeqlmError, UsageError
from seqlm.evaluate import Score
from seqlm.learner import Learner, learning_rate
from seqlm.model import build
from seqlm.prepare import prepare
from seqlm.runtime import Choice, pick_device, pick_dtype, set_threads
from seqlm.storage import cannot_write

PATIENCE = 10  # steps in a row that may fail to be finite
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Report:
    """What one step came to; the fields after `seconds` only where something happened."""

    step: int
    chars: int  # trained on so far
    loss: float  # nats per symbol
    bits_per_char: float  # of the loss; per byte where the corpus is not text
    lr: float
    grad_norm: float  # before clipping
    progress: float  # of the whole training, 0 to 1
    seconds: float  # of training so far
    val: Score | None = None  # protocol stripes
    best: bool = False  # the best validation so far
    sample: str | None = None
    stopped: str | None = None  # why training ends with this step

    def metrics(self) -> dict[str, Any]:
        """The line of metrics.jsonl; null stands for a number that is not finite."""
        row = {"loss": self.loss, "lr": self.lr, "grad_norm": self.grad_norm}
        if self.val is not None:
            row["val_bits_per_char"] = self.val.bits_per_char
            row["val_bits_per_byte"] = self.val.bits_per_byte
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in row.items()}
        return {"step": self.step, "chars": self.chars, **finite}

    def timing(self) -> dict[str, Any]:
        """The line of timing.jsonl."""
        return {"step": self.step, "chars": self.chars, "seconds": round(self.seconds, 6)}


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
    force: bool = False  # a run that exists is replaced

    @property
    def config(self) -> Config:
        return self.learner.config

    @property
    def finished(self) -> bool:
        """A resumed run that has nothing left to train."""
        return self.resumed is not None and is_finished(self.resumed, self.config)

    def reports(
        self,
        clock: Callable[[], float] = time.perf_counter,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[Report]:
        """Train; a report after every step.  A run that `force` replaces is deleted first."""
        if self.finished:
            return
        if self.resumed is None and checkpoint.new_run(self.run, self.force).exists():
            shutil.rmtree(self.run)
        yield from train(self.learner, self.run, clock=clock, interrupted=interrupted)


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
    if resume and force:
        raise UsageError("--resume continues a run and --force replaces it. Choose one.")
    if resume:
        return _resume(data, run, preset, {**(read_toml(file) if file else {}), **(given or {})})
    wanted = configuration(preset, file, given)
    place = data if data is not None else wanted.data.path or None
    corpus = open_corpus(find_corpus(place) or prepare([BUILT_IN])[0])
    cell = "-".join(map(cell_key, stack(wanted.cell.name)))
    name = run or f"{corpus.path.name}-{cell}"
    folder = checkpoint.new_run(checkpoint.run_path(name), force)
    setup = _training(for_corpus(wanted, corpus), corpus, folder)
    setup.force = force
    return setup


def configuration(preset: str | None, file: Path | None, given: Mapping[str, Any] | None) -> Config:
    """The complete configuration of a new run; UsageError unless a model can be built from it."""
    config = complete(resolve_config(preset or "small", file, given))
    if any(cell.endswith(".py") for cell in stack(config.cell.name)):
        _try_out(config)
    else:
        with torch.device("meta"):
            build(config, vocab_size=1)
    return config


def _try_out(config: Config) -> None:
    """One sequence and one step through a researcher's own cell, before a run is made of it."""
    try:
        model = build(config, vocab_size=1)
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
    data: str | None, run: str | None, preset: str | None, given: Mapping[str, Any]
) -> Training:
    if preset:
        raise UsageError(
            "--resume continues with the run's own configuration, so --preset has no effect. "
            "Leave it out; change single options with --set."
        )
    folder = checkpoint.find_run(run)
    saved, warnings = checkpoint.load(folder, "last")
    own = checkpoint.with_own_cell(saved.config, folder, given.get("cell.name"))
    corpus = recorded_corpus(own.data.path) if data is None else open_corpus(find_corpus(data))
    wanted = own.continued(given)
    if wanted.cell.name == own.cell.name:  # of another cell the options say nothing: refused below
        wanted = complete(wanted)
    config = for_corpus(wanted, corpus)
    refuse_other_architecture(own, config)
    setup = _training(config, corpus, folder)
    setup.learner.restore(saved)
    setup.resumed, setup.changed, setup.warnings = saved, changes(own, config), warnings
    return setup


def _training(config: Config, corpus: Corpus, folder: Path) -> Training:
    set_threads(config.runtime.threads)
    device = pick_device(config.runtime.device)
    dtype = pick_dtype(config.runtime.dtype, device.value)
    backend = ops.pick(config.runtime.backend)
    learner = Learner(config, corpus, device.value, dtype.value, backend.value)
    return Training(folder, learner, device, dtype, backend)


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


def for_corpus(config: Config, corpus: Corpus) -> Config:
    """The configuration with the corpus' place and identity in it."""
    data = replace(config.data, path=str(corpus.path), fingerprint=corpus.fingerprint)
    return replace(config, data=data)


def refuse_other_architecture(saved: Config, now: Config) -> None:
    """Raises UsageError when a resumed run would get another model or corpus."""
    for key, (old, new) in changes(saved, now).items():
        if key == "data.fingerprint":
            raise UsageError(
                f"The run was trained on {saved.data.path} as it was then, and {now.data.path} is "
                "another corpus. A run keeps its model and its corpus: train another one with "
                "--run NAME."
            )
        if key.split(".")[0] in ("model", "cell"):
            raise UsageError(
                f"The run was trained with {key} = {old}, and {new} is given now. A run keeps its "
                "model and its corpus: train another one with --run NAME."
            )


def train(
    learner: Learner,
    run: Path,
    *,
    clock: Callable[[], float] = time.perf_counter,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[Report]:
    """Train into the folder `run`, from where the learner stands; a report after every step.

    `clock` tells seconds; `interrupted` is asked after every step, and when it says yes the step
    is saved and training ends.  Raises Diverged after 10 steps in a row that are not finite, with
    the last good step still on disk.
    """
    config, progress = learner.config, learner.progress
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(run, error) from error
    checkpoint.cut_lines(run, progress.step)
    if progress.step == 0:
        learner.save(run, best=False)  # a run from its first moment: it can be killed and resumed
    while done(config, progress) < 1 and not progress.finished:
        began = clock()
        lr = learning_rate(config.optim, progress.step, done(config, progress))
        loss, norm = learner.learn(lr)
        progress.elapsed += clock() - began
        report = _finish_step(learner, run, loss, norm, lr, interrupted())
        if progress.skipped_in_a_row >= PATIENCE:
            raise Diverged(
                f"{PATIENCE} steps in a row, up to step {progress.step}, had a loss or gradient "
                "that is not finite. Train again with a lower --lr or a smaller optim.clip; the "
                "last saved step is intact."
            )
        yield report
        if report.stopped:
            return


def _finish_step(
    learner: Learner, run: Path, loss: float, norm: float, lr: float, interrupted: bool
) -> Report:
    """Validate, sample and save where the step is due for it, and write its line."""
    config, progress = learner.config.train, learner.progress
    over = done(learner.config, progress) >= 1
    stopped = INTERRUPTED if interrupted else None
    if over:
        stopped = "the time is up" if config.time_limit else "the last step is done"

    val, best = None, False
    if over or due(config.eval_every, progress.step):
        val = learner.validate()
        best = progress.note(val.bits_per_char, val.bits_per_byte)
        if config.early_stop and progress.evaluations_since_best >= config.early_stop:
            stopped = f"no better validation in {config.early_stop}"
    progress.finished = stopped not in (None, INTERRUPTED)

    report = Report(
        step=progress.step,
        chars=progress.chars,
        loss=loss,
        bits_per_char=loss / math.log(2) / learner.chars_per_symbol,
        lr=lr,
        grad_norm=norm,
        progress=min(1.0, done(learner.config, progress)),
        seconds=progress.elapsed,
        val=val,
        best=best,
        sample=learner.sample() if due(config.sample_every, progress.step) else None,
        stopped=stopped,
    )
    checkpoint.append_lines(run, report.metrics(), report.timing())
    if best or stopped or due(config.save_every, progress.step):
        learner.save(run, best)
    return report


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def is_finished(saved: Saved, config: Config) -> bool:
    """Nothing is left to train: the run ended, and `config` does not ask for more."""
    asked = any(key.startswith("train.") for key in changes(saved.config, config))
    return (saved.progress.finished and not asked) or done(config, saved.progress) >= 1


def done(config: Config, progress: Progress) -> float:
    """The share of the training that is behind: of the clock, or of the steps."""
    if config.train.time_limit:
        return progress.elapsed / config.train.time_limit
    return progress.step / config.train.steps


def peak_memory_bytes(device: str) -> int:
    """The most memory this process has held: on the GPU, or in RAM."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
