"""What a step of training changes: weights, optimizer, carried state, and how far it has come."""

# B batch, T length

import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm import cells, evaluate, graphs, ops
from seqlm.cells import State
from seqlm.config import Config, OptimConfig
from seqlm.errors import InputError
from seqlm.evaluate import Score
from seqlm.generate import generate
from seqlm.model import LanguageModel, build
from seqlm.passage import passage_of_split
from seqlm.runtime import Runtime
from seqlm.seeds import derived_seed
from seqlm.store import runs
from seqlm.store.checkpoint import ANOTHER, Progress, Saved, shapes_of
from seqlm.text.corpus import Corpus
from seqlm.training import parallel
from seqlm.training.batches import IGNORED, Ahead, Batches, DocumentBatches, Rows

SAMPLE_CHARS = 200
DOUBLED, LARGEST_SCALE = 2000, 2.0**24  # steps after which float16's scale is, up to what
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of every parameter, beside its step
STREAMS = ("batch", "length", "state", "seed")  # what decides which text a row of the batch reads


def _computing(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method under the learner's runtime, with Newton's method counted."""

    @wraps(method)
    def compute(self: "Learner", *arguments: Any) -> Any:
        with self.runtime.active(), ops.watched(self.solves):
            return method(self, *arguments)

    return compute


class Learner:
    """All that a step of training changes; `config` is complete."""

    def __init__(self, config: Config, corpus: Corpus, runtime: Runtime):
        torch.manual_seed(derived_seed(config.train.seed, "weights"))
        self.config, self.corpus = config, corpus
        self.runtime, self.device = runtime, runtime.device.value
        self.model = build(config, corpus.tokenizer.vocab_size).to(self.device)
        self.optimizer = make_optimizer(self.model, config.optim)
        self.passes, self.recorded = self._pass, runtime.graphs.value == "on"
        if self.recorded:
            self.passes = graphs.Recorded(self._pass, _places_of_gradients(self.model))
        self.progress = Progress()
        self.solves = ops.Solves()  # what Newton's method did, where a cell uses it
        self.val = passage_of_split(corpus, "val", corpus.tokenizer)
        symbols, ends = corpus.symbols("train"), corpus.ends("train")
        beginning = self.model.beginning
        self.processes = parallel.world()
        self.streams = parallel.dealt(config.train.batch, config.train.accumulate)
        if ends is None:
            self.batches = Batches(symbols, config.train, beginning, self.streams)
        else:
            answers, own = corpus.answers("train"), self.streams
            self.batches = DocumentBatches(symbols, ends, config.train, beginning, answers, own)
        if self.device == "cuda":
            self.batches = Ahead(self.batches)
        self.state = self._no_state()  # of this process' streams, carried from step to step
        counts = corpus.splits["train"]
        self.chars_per_symbol = (counts["chars"] or counts["tokens"]) / counts["tokens"]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a saved step holds; the state is that of all streams, from all processes."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        moments = {
            f"{names[parameter]}.{key}": value
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
        }
        accumulate = self.config.train.accumulate
        carried = _numbered(tuple(parallel.gathered(t, accumulate) for t in self.state))
        return {"model": self.model.state_dict(), "optimizer": moments, "state": carried}

    @property
    def environment(self) -> dict[str, str | int]:
        here = self.runtime.environment() | {"processes": self.processes}
        return here | cells.hashes(self.config.cell.name)

    def save(self, run: Path, best: bool) -> None:
        """All processes come here, and the writer saves."""
        tokenizer, tensors = self.corpus.tokenizer, self.tensors()
        if parallel.is_writer():
            runs.save(run, self.config, tokenizer, self.progress, self.environment, tensors, best)

    def restore(self, saved: Saved) -> None:
        """Take up weights, optimizer, carried state and progress of a saved step.

        Raises InputError where its tensors are not those of this model and optimizer.
        """
        self.progress = replace(saved.progress, finished=False)
        weights, moments, carried = tensors_of(saved, self.model)
        self.model.load_state_dict(weights)
        parameters = dict(self.model.named_parameters())
        for name, value in moments.items():
            parameter, _, key = name.rpartition(".")
            self.optimizer.state[parameters[parameter]][key] = value.to(self.device)
        before, now = saved.config.train, self.config.train
        # other batches cut the text into other streams, which the old state says nothing about
        if all(getattr(before, key) == getattr(now, key) for key in STREAMS):
            own = (carried[name][self.streams] for name in sorted(carried))
            self.state = tuple(tensor.to(self.device) for tensor in own)

    def adopt(self, saved: Saved) -> int:
        """Begin with the weights of another run's step; how many symbols keep their rows."""
        rows = self.corpus.tokenizer.rows_of(saved.tokenizer)
        self.model.adopt(saved.weights(self.config), rows)
        return len(rows)

    @_computing
    def learn(self, lr: float) -> tuple[float, float]:
        """One optimizer step; (loss in nats per symbol, gradient norm before clipping).

        All is decided on the sums over the processes, so that they agree.  A step whose loss or
        gradient is not finite changes nothing but the counts of such steps, and float16's scale: as
        long as that can be lowered, such a gradient does not count towards a divergence.
        """
        progress, parts = self.progress, self._parts()
        read = sum(int(part.sizes.sum()) for part in parts)
        learned = sum(int((part.targets != IGNORED).sum()) for part in parts)
        read, learned = parallel.total(read, learned)
        self.model.train()
        self._clear_gradients()
        loss, state = self._backward(parts, max(1, learned))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        parallel.sum_([*gradients, loss])
        if self.scale != 1:
            for gradient in gradients:
                gradient.div_(self.scale)
        clip = self.config.optim.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        loss, norm = torch.stack([loss, norm]).tolist()  # the one time that a GPU is waited for
        if math.isfinite(loss) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.state = state
            progress.skipped_in_a_row = 0
        else:
            progress.skipped += 1
            overflown = math.isfinite(loss) and self.scale > 1
            progress.skipped_in_a_row += not overflown
            progress.loss_scale /= 2 if overflown else 1
            self._begin_afresh(parts)
        progress.step += 1
        if self.runtime.dtype.value == "float16" and progress.step % DOUBLED == 0:
            progress.loss_scale = min(LARGEST_SCALE, 2 * progress.loss_scale)
        progress.chars += round(read * self.chars_per_symbol)
        return loss, norm

    @_computing
    def warm_up(self) -> None:
        """A step that changes nothing, before a clock runs: code is compiled and memory taken."""
        buffers = {name: tensor.clone() for name, tensor in self.model.named_buffers()}
        self.model.train()
        self._backward(self._parts()[:1], 1)
        self._clear_gradients()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        with torch.inference_mode():
            self.model.eval().step(torch.zeros(1, dtype=torch.long, device=self.device))

    @property
    def scale(self) -> float:
        """What gradients are multiplied by on their way back, a power of 2; 1 but for float16."""
        return self.progress.loss_scale if self.runtime.dtype.value == "float16" else 1.0

    def _clear_gradients(self) -> None:
        # a recording adds gradients to where they were
        self.optimizer.zero_grad(set_to_none=not self.recorded)

    def _parts(self) -> list[Rows]:
        """The micro-batches of the step that comes next."""
        parts = self.batches.at(self.progress.step)
        for part in parts:
            beginning = part.inputs == self.model.beginning
            self.corpus.refuse_unknown("train", part.targets)
            self.corpus.refuse_unknown("train", np.where(beginning, 0, part.inputs))
        return parts

    def _no_state(self) -> State:
        """The state of streams that read nothing yet."""
        return tuple(t.detach().clone() for t in self.model.initial_state(len(self.streams)))

    def _begin_afresh(self, parts: list[Rows]) -> None:
        """The state of streams that began in a step which is skipped: what follows it goes on from
        none, and not from what came before."""
        for part in parts:
            streams = torch.from_numpy(part.streams[part.fresh & part.kept]).to(self.device)
            for tensor, new in zip(self.state, self.model.initial_state(len(streams)), strict=True):
                tensor[streams] = new

    def _backward(self, parts: list[Rows], symbols: float) -> tuple[Tensor, State]:
        """This process' share of the mean loss over all symbols, and of its gradients; the states
        of its streams after.

        Dropout's masks are those of the micro-batch's number: as one process draws them that has
        N times train.accumulate, but for documents, which make other micro-batches there.
        """
        seed, step, total = self.config.train.seed, self.progress.step, 0.0
        after = self._no_state()
        symbols, scale = (torch.full((), x, device=self.device) for x in (symbols, self.scale))
        for turn, part in enumerate(parts):
            number = turn * self.processes + parallel.rank()
            # places, as a GPU would be waited for to count a mask
            given = part.inputs, part.targets, part.streams, part.fresh, np.flatnonzero(part.kept)
            x, y, streams, fresh, kept = (_moved(array, self.device) for array in given)
            torch.manual_seed(derived_seed(seed, "dropout", step, number))
            loss, *end = self.passes(x, y, streams, fresh, symbols, scale, *self.state)
            total = total + loss
            for tensor, last in zip(after, end, strict=True):
                tensor[streams[kept]] = last[kept]
        return total, after

    def _pass(
        self,
        x: Tensor,
        y: Tensor,
        streams: Tensor,
        fresh: Tensor,
        symbols: Tensor,
        scale: Tensor,
        *before: Tensor,
    ) -> tuple[Tensor, ...]:
        """The loss of a micro-batch over so many symbols, and the state after; gradients are added
        to those there, multiplied by `scale`.  before: the state of all streams."""
        state = tuple(
            torch.where(_rows(fresh, new), new, old[streams])
            for new, old in zip(self.model.initial_state(len(x)), before, strict=True)
        )
        with self.runtime.autocast():
            logits, end = self.model(x, state)
        logits, y = logits.float().flatten(0, 1), y.flatten()
        loss = F.cross_entropy(logits, y, ignore_index=IGNORED, reduction="sum") / symbols
        (loss * scale).backward()
        return loss.detach(), *(last.detach() for last in end)

    @_computing
    def validate(self) -> Score:
        """The val split in float32, by protocol stripes, or its documents one by one."""
        self.model.eval()
        return evaluate.validate(self.model, self.val)

    @_computing
    def sample(self) -> str:
        self.model.eval()
        seed = derived_seed(self.config.train.seed, "sample", self.progress.step)
        pieces = generate(self.model, self.corpus.tokenizer, chars=SAMPLE_CHARS, seed=seed)
        return "".join(pieces)


def tensors_of(saved: Saved, model: LanguageModel) -> tuple[dict[str, Tensor], ...]:
    """The weights, the optimizer's moments and the carried state of a saved step.

    model: as the step's configuration describes it, on any device, so without memory too.  Raises
    InputError where the tensors are not those of that model.
    """
    weights = saved.tensors("model", shapes_of(model.state_dict()))
    expected = {}
    for name, (shape, dtype) in shapes_of(dict(model.named_parameters())).items():
        expected |= {f"{name}.{key}": (shape, dtype) for key in MOMENTS}
        expected[f"{name}.step"] = ((), torch.float32)
    moments = saved.tensors("optimizer", expected, partial=True)  # none before the first step
    for name in [name.rpartition(".")[0] for name in moments]:
        if any(f"{name}.{key}" not in moments for key in (*MOMENTS, "step")):
            raise InputError(f"The optimizer's state in {saved.folder} is incomplete. {ANOTHER}")
    one, batch = shapes_of(_numbered(model.initial_state(1))), saved.config.train.batch
    expected = {name: ((batch, *shape[1:]), dtype) for name, (shape, dtype) in one.items()}
    return weights, moments, saved.tensors("state", expected)


def _places_of_gradients(model: nn.Module) -> list[Tensor]:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in model.parameters()]


def _moved(array: np.ndarray, device: str) -> Tensor:
    """The array as a tensor on the device; a GPU takes it on its own while more work is given."""
    tensor = torch.from_numpy(array)
    if device == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _numbered(state: State) -> dict[str, Tensor]:
    """The tensors of a state by names that sort as they stand in it."""
    return {f"{i:06d}": tensor for i, tensor in enumerate(state)}


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of rows (R,) in the shape that goes with a tensor (R, ...)."""
    return mask.view(-1, *[1] * (like.ndim - 1))


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


def learning_rate(config: OptimConfig, step: int, steps: float) -> float:
    """The rate of the step after `step` steps: a linear rise to config.lr, then the schedule.

    The rise takes config.warmup steps, or a tenth of the training where that is fewer.  The cosine
    begins behind it, so the largest rate is config.lr.
    steps: of the whole training; as many as are expected where the clock decides.
    """
    warmup = math.floor(min(config.warmup, steps / 10))
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (steps - warmup))))
