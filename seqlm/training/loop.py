"""The training loop: a generator that trains, saves, and yields a report after every step."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqlm.config import Config
from seqlm.errors import Diverged, SeqlmError
from seqlm.evaluation.evaluate import NATS_PER_BIT, Score
from seqlm.generation.generate import Sampling, generate
from seqlm.seeds import derived_seed
from seqlm.store import history, runs
from seqlm.store.checkpoint import Progress, step_number
from seqlm.training import parallel, snapshot
from seqlm.training.trainer import Trainer, schedule

SAMPLE_TEMPERATURE = 0.8  # below 1, so that a sample shows what the model is sure of
PATIENCE = 10  # steps in a row without a finite loss and gradient: training has diverged
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Report:
    """The result of one step.  The fields after `seconds` are set only when they apply."""

    step: int
    chars: int  # trained on so far
    loss: float  # nats per symbol
    bits_per_char: float  # the same loss; per byte where the corpus is not text
    lr: float
    grad_norm: float  # before clipping
    progress: float  # share of the whole training that is done, 0 to 1
    seconds: float  # of training so far
    val: Score | None = None  # by the protocol stripes
    best: bool = False  # whether `val` is the best so far
    sample: str | None = None  # a text of the model, at a validation
    stopped: str | None = None  # why training ends with this step

    def metrics(self) -> dict[str, Any]:
        """The line of metrics.jsonl, with null for a number that is not finite."""
        row: dict[str, float | None] = {
            "loss": self.loss,
            "lr": self.lr,
            "grad_norm": self.grad_norm,
        }
        if self.val is not None:
            row["val_bits_per_char"] = self.val.bits_per_char
            row["val_bits_per_byte"] = self.val.bits_per_byte
            row["val_accuracy"] = self.val.accuracy
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in row.items()}
        return {"step": self.step, "chars": self.chars, **finite}

    def timing(self) -> dict[str, Any]:
        """The line of timing.jsonl."""
        return {"step": self.step, "chars": self.chars, "seconds": round(self.seconds, 6)}


def train(
    trainer: Trainer,
    run: Path,
    *,
    clock: Callable[[], float] = time.perf_counter,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[Report]:
    """Train from the trainer's present step on, and yield a report after every step.

    run: a folder in `runs.opened`.  clock: returns seconds.  interrupted: is called after every
    step; when it returns True, the step is saved and training ends.
    With several processes, the slowest clock counts, an interruption of one process stops all, and
    only the writer validates and writes.
    Raises Diverged after 10 steps in a row whose loss or gradient is not finite; the last good step
    is still on disk.
    """
    config, progress = trainer.config, trainer.progress
    if parallel.is_writer():
        runs.rewind(run, progress)
    # step 0 is saved, so that a run that is killed early can be resumed
    if parallel.from_writer(not runs.steps(run)):
        snapshot.save(trainer, run, best=False)
    while share_done(config, progress) < 1 and not progress.finished:
        began = clock()
        share = schedule(config.optim, progress.step, expected_steps(config, progress))
        loss, norm = trainer.step(share)
        elapsed = progress.elapsed + (clock() - began)
        progress.elapsed, stop = parallel.largest(elapsed, interrupted())
        report = _finish_step(trainer, run, loss, norm, share * config.optim.lr, bool(stop))
        if progress.skipped_in_a_row >= PATIENCE:
            raise Diverged(
                f"{PATIENCE} steps in a row, up to step {progress.step}, had a loss or gradient "
                "that is not finite. Train again with a lower --lr or a smaller optim.clip; "
                f"{_last_saved(run)}"
            )
        if report.stopped not in (None, INTERRUPTED) and not progress.best_step:
            raise Diverged(
                f"No validation, up to the last one at step {progress.step}, was a finite number. "
                "Train again with a lower --lr or a smaller optim.clip."
            )
        yield report
        if report.stopped:
            return


def _finish_step(
    trainer: Trainer, run: Path, loss: float, norm: float, lr: float, interrupted: bool
) -> Report:
    """Validate, sample and save if this step is due for it, and write its metrics."""
    config, progress = trainer.config.train, trainer.progress
    over = share_done(trainer.config, progress) >= 1
    stopped = INTERRUPTED if interrupted else None
    if over:
        stopped = "the time is up" if config.time_limit else "the last step is done"

    val, best, writer = None, False, parallel.is_writer()
    if over or due(config.eval_every, progress.step):
        val = trainer.validate() if writer else None
        # every process records the validation, so that all of them stop at the same step
        per_char, per_byte = (val.bits_per_char, val.bits_per_byte) if val else (None, 0.0)
        best = progress.note(per_char, parallel.from_writer(per_byte))
        if config.early_stop and progress.evaluations_since_best >= config.early_stop:
            stopped = f"no better validation in {config.early_stop}"
    progress.finished = stopped not in (None, INTERRUPTED)

    sample = _sample(trainer) if val and math.isfinite(val.bits_per_byte) else None
    report = Report(
        step=progress.step,
        chars=progress.chars,
        loss=loss,
        bits_per_char=loss / NATS_PER_BIT / trainer.chars_per_symbol,
        lr=lr,
        grad_norm=norm,
        progress=min(1.0, share_done(trainer.config, progress)),
        seconds=progress.elapsed,
        val=val,
        best=best,
        sample=sample["text"] if sample else None,
        stopped=stopped,
    )
    if writer:
        lines = {history.METRICS: report.metrics(), history.TIMING: report.timing()}
        history.append(run, lines | ({history.SAMPLES: sample} if sample else {}))
    # not after a skipped step: its weights may be bad, and older good steps would be deleted
    if best or stopped or (due(config.save_every, progress.step) and not progress.skipped_in_a_row):
        snapshot.save(trainer, run, best)
        # a finite validation shows that this run does not diverge, so the old one can go
        if writer and (progress.best_step or stopped == INTERRUPTED):
            runs.drop_replaced(run)
    return report


def _last_saved(run: Path) -> str:
    last = runs.target(run / runs.LAST)
    if step := last and step_number(last.name):
        return f"the last saved step, {step}, is intact."
    return "the only saved step is 0, the model before training."


def _sample(trainer: Trainer) -> dict[str, Any] | None:
    """The line of samples.jsonl: what `seqlm generate` writes with this step and this seed.

    The random numbers come from a generator of the sample's own, so training does not change.
    """
    config, step = trainer.config.train, trainer.progress.step
    if not config.sample_chars:
        return None
    seed = derived_seed(config.seed, "sample", step)
    sampling = Sampling(SAMPLE_TEMPERATURE)
    trainer.model.eval()
    with trainer.computing():
        try:
            pieces = generate(
                trainer.model,
                trainer.corpus.tokenizer,
                chars=config.sample_chars,
                seed=seed,
                sampling=sampling,
            )
            text = "".join(pieces)
        except SeqlmError:  # a logit is not finite: the model can be validated, but not sampled yet
            return None
    return {"step": step, "temperature": sampling.temperature, "seed": seed, "text": text}


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def share_done(config: Config, progress: Progress) -> float:
    """The share of the time limit that has passed, or of the steps that are done."""
    if config.train.time_limit:
        return progress.elapsed / config.train.time_limit
    return progress.step / config.train.steps


def expected_steps(config: Config, progress: Progress) -> float:
    """The steps of the whole training; under a time limit, an estimate from the speed so far."""
    if not config.train.time_limit:
        return config.train.steps
    return progress.step / share_done(config, progress) if progress.step else math.inf
