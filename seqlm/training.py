"""Training as a generator of reports, one a step: the command line draws them, tests read them."""

# B batch, T length

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm import cells, checkpoint, evaluate, ops
from seqlm.cells import State
from seqlm.checkpoint import Progress, Saved
from seqlm.config import Config, OptimConfig, changes
from seqlm.data import Batch, Batches, Corpus
from seqlm.errors import Diverged, UsageError
from seqlm.generate import generate
from seqlm.model import LanguageModel, build
from seqlm.runtime import autocast, derived_seed

PATIENCE = 10  # steps in a row that may fail to be finite
SAMPLE_CHARS = 200
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Report:
    """What one step came to; the fields after `seconds` only where something happened."""

    step: int
    chars: int  # trained on so far
    loss: float  # nats per symbol; nan in a step that was skipped
    lr: float
    grad_norm: float  # before clipping
    progress: float  # of the whole training, 0 to 1
    seconds: float  # of training so far
    val_bits_per_char: float | None = None  # protocol stripes
    best: bool = False  # the best validation so far
    sample: str | None = None
    stopped: str | None = None  # why training ends with this step

    def metrics(self) -> dict[str, Any]:
        """The line of metrics.jsonl; null stands for a number that is not finite."""
        row = {"loss": self.loss, "lr": self.lr, "grad_norm": self.grad_norm}
        if self.val_bits_per_char is not None:
            row["val_bits_per_char"] = self.val_bits_per_char
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        return {"step": self.step, "chars": self.chars, **finite}

    def timing(self) -> dict[str, Any]:
        """The line of timing.jsonl."""
        return {"step": self.step, "chars": self.chars, "seconds": round(self.seconds, 6)}


class Learner:
    """All that a step of training changes; `config` is complete."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        device: str = "cpu",
        dtype: str = "float32",
        backend: str = "torch",
    ):
        torch.manual_seed(derived_seed(config.train.seed, "weights"))
        self.config, self.corpus = config, corpus
        self.device, self.dtype, self.backend = device, dtype, backend
        self.model = build(config, corpus.tokenizer.vocab_size).to(device)
        self.optimizer = make_optimizer(self.model, config.optim)
        self.state: State | None = None  # carried from step to step
        self.progress = Progress()
        train = config.train
        self.batches = Batches(
            corpus.symbols("train"),
            train.batch,
            train.length,
            train.state,
            train.seed,
            self.model.beginning,
        )
        counts = corpus.splits["train"]
        self.chars_per_symbol = (counts["chars"] or counts["tokens"]) / counts["tokens"]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        moments = {
            f"{names[parameter]}.{key}": value
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
        }
        carried = {f"{i:03d}": tensor for i, tensor in enumerate(self.state or ())}
        return {"model": self.model.state_dict(), "optimizer": moments, "state": carried}

    def save(self, run: Path, best: bool) -> None:
        tensors = self.tensors()
        checkpoint.save(run, self.config, self.corpus.tokenizer, self.progress, tensors, best)

    def restore(self, saved: Saved) -> None:
        """Take up weights, optimizer, carried state and progress of a saved step."""
        self.progress = replace(saved.progress, finished=False)
        self.model.load_state_dict(saved.tensors("model"))
        parameters = dict(self.model.named_parameters())
        for name, value in saved.tensors("optimizer").items():
            parameter, _, key = name.rpartition(".")
            # the count of steps stays on the CPU, where the optimizer keeps it
            device = "cpu" if key == "step" and self.device == "cpu" else self.device
            self.optimizer.state[parameters[parameter]][key] = value.to(device)
        carried = saved.tensors("state")
        if carried:
            self.state = tuple(carried[name].to(self.device) for name in sorted(carried))

    def learn(self, lr: float) -> tuple[float, float]:
        """One optimizer step; (loss in nats per symbol, gradient norm before clipping).

        A step whose loss or gradient is not finite changes nothing but the counts of such steps.
        """
        progress, batch = self.progress, self.batches.at(self.progress.step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss, state = self._backward(batch)
        clip = self.config.optim.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip).item()
        if math.isfinite(loss) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.state = state
            progress.skipped_in_a_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
        progress.step += 1
        progress.chars += round(batch.targets.size * self.chars_per_symbol)
        return loss, norm

    def _backward(self, batch: Batch) -> tuple[float, State]:
        """Gradients of the mean loss, over the micro-batches; the loss and the state after it."""
        train = self.config.train
        rows = train.batch // train.accumulate
        inputs = torch.from_numpy(batch.inputs).to(self.device).split(rows)
        targets = torch.from_numpy(batch.targets).to(self.device).split(rows)
        if batch.fresh or self.state is None:
            states = [self.model.initial_state(len(x)) for x in inputs]
        else:
            parts = [tensor.split(rows) for tensor in self.state]
            states = list(zip(*parts, strict=True))
        total, ends = 0.0, []
        for i, (x, y, state) in enumerate(zip(inputs, targets, states, strict=True)):
            torch.manual_seed(derived_seed(train.seed, "dropout", self.progress.step, i))
            with ops.using(self.backend), autocast(self.device, self.dtype):
                logits, end = self.model(x, state)
            loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten()) / train.accumulate
            loss.backward()
            total += loss.item()
            ends.append(tuple(tensor.detach() for tensor in end))
        return total, tuple(torch.cat(tensors) for tensors in zip(*ends, strict=True))

    def validate(self) -> float:
        """Bits per character of the val split (per byte where it is not text), by stripes."""
        self.model.eval()
        counts = self.corpus.splits["val"]
        with ops.using(self.backend):
            nats = evaluate.stripes(self.model, self.corpus.symbols("val"))
        return nats / math.log(2) / (counts["chars"] or counts["bytes"])

    def sample(self) -> str:
        self.model.eval()
        seed = derived_seed(self.config.train.seed, "sample", self.progress.step)
        with ops.using(self.backend):
            pieces = generate(self.model, self.corpus.tokenizer, chars=SAMPLE_CHARS, seed=seed)
            return "".join(pieces)


def make_optimizer(model: LanguageModel, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW that decays matrices, but not norms and biases."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)


def learning_rate(config: OptimConfig, step: int, progress: float) -> float:
    """The rate after `step` steps: a linear warmup, and a cosine that is 0 at progress 1."""
    rate = config.lr * min(1.0, (step + 1) / (config.warmup + 1))
    if config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return rate


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
        if key.split(".")[0] in ("model", "cell") or key == "data.fingerprint":
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
    run.mkdir(parents=True, exist_ok=True)
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

    value, best = None, False
    if over or due(config.eval_every, progress.step):
        value = learner.validate()
        best = progress.note(value)
        if config.early_stop and progress.evaluations_since_best >= config.early_stop:
            stopped = f"no better validation in {config.early_stop}"
    progress.finished = stopped not in (None, INTERRUPTED)

    report = Report(
        step=progress.step,
        chars=progress.chars,
        loss=loss,
        lr=lr,
        grad_norm=norm,
        progress=min(1.0, done(learner.config, progress)),
        seconds=progress.elapsed,
        val_bits_per_char=value,
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
    unchanged = not changes(saved.config, config)
    return (saved.progress.finished and unchanged) or done(config, saved.progress) >= 1


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
