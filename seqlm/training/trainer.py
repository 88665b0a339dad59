"""One training step: forward, backward, optimizer, and the state carried to the next step."""

# B batch, T length, R rows of a micro-batch, S streams of this process

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm import graphs, ops
from seqlm.cells import State
from seqlm.cells._contract import chosen_rows
from seqlm.config import Config, OptimConfig
from seqlm.evaluation import evaluate
from seqlm.evaluation.evaluate import Score
from seqlm.evaluation.passage import passage_of_split
from seqlm.model import build
from seqlm.runtime import Runtime
from seqlm.seeds import derived_seed
from seqlm.store.checkpoint import Progress
from seqlm.text.corpus import Corpus
from seqlm.training import parallel
from seqlm.training.batches import IGNORED, Rows, batches_of
from seqlm.training.optimizer import make_optimizers

# float16 rounds small gradients to 0, so the loss is multiplied by a scale.  The scale is doubled
# every 2,000 steps, up to 2^24, and halved when a gradient overflows.
STEPS_TO_DOUBLE, LARGEST_SCALE = 2000, 2.0**24


class Trainer:
    """A model in training: its weights, optimizer, carried state and progress.

    config: a complete configuration, as from `launch.complete`.
    """

    def __init__(self, config: Config, corpus: Corpus, runtime: Runtime):
        torch.manual_seed(derived_seed(config.train.seed, "weights"))
        self.config, self.corpus = config, corpus
        self.runtime, self.device = runtime, runtime.device.value
        self.model = build(config, corpus.tokenizer.vocab_size).to(self.device)
        bfloat16 = runtime.dtype.value == "bfloat16"
        self.optimizers = make_optimizers(
            self.model, config, torch.bfloat16 if bfloat16 else torch.float32
        )
        self.recorded = runtime.graphs.value == "on"
        self.passes: graphs.Function = self._pass
        if self.recorded:
            self.passes = graphs.Recorded(self._pass, _fixed_gradients(self.model))
        self.progress = Progress()
        self.solves = ops.NewtonCounts()  # counts of Newton's method, for cells that use it
        self.val = passage_of_split(corpus, "val", corpus.tokenizer)
        self.processes = parallel.world()
        self.streams = parallel.local_streams(config.train.batch, config.train.accumulate)
        self.batches = batches_of(
            corpus, config.train, self.model.beginning, self.streams, ahead=self.device == "cuda"
        )
        self.state = self._fresh_state()  # of this process' streams, after the last step
        self.chars_per_symbol = corpus.chars_per_symbol("train")

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Run the block with this trainer's runtime, and count the solves of Newton's method."""
        with self.runtime.active(), ops.count_newton(self.solves):
            yield

    def step(self, share: float) -> tuple[float, float]:
        """Take one optimizer step with this share of the peak learning rates.

        Returns the loss (nats per symbol) and the gradient norm before clipping.

        A step with a loss or gradient that is not finite is skipped: weights and carried state stay
        as they were.  With float16, a finite loss with a gradient that is not finite means that the
        loss scale is too large; the scale is halved, and the step is no sign of divergence.
        """
        with self.computing():
            return self._step(share)

    def _step(self, share: float) -> tuple[float, float]:
        progress, parts = self.progress, self._parts()
        # sums over all processes, as are the loss and the gradients below, so that every process
        # takes the same decisions
        read, learned = parallel.total(
            sum(int(part.sizes.sum()) for part in parts),
            sum(int((part.targets != IGNORED).sum()) for part in parts),
        )
        self.model.train()
        self._clear_gradients()
        total, state = self._backward(parts, max(1, learned))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        parallel.sum_([*gradients, total])
        if self.scale != 1:
            for gradient in gradients:
                gradient.div_(self.scale)
        clip = self.config.optim.clip or math.inf
        size = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        # one transfer for both numbers, because it waits for the GPU; nothing else in a step does
        loss, norm = torch.stack([total, size]).tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = optimizer.defaults["lr"] * share
                optimizer.step()
            self.model.after_step()
            self.state = state
            progress.skipped_in_a_row = 0
        else:
            progress.skipped += 1
            overflow = math.isfinite(loss) and self.scale > 1
            progress.skipped_in_a_row += not overflow
            progress.loss_scale /= 2 if overflow else 1
            self._restart_streams(parts)
        progress.step += 1
        if self.runtime.dtype.value == "float16" and progress.step % STEPS_TO_DOUBLE == 0:
            progress.loss_scale = min(LARGEST_SCALE, 2 * progress.loss_scale)
        progress.chars += round(read * self.chars_per_symbol)
        return loss, norm

    def warm_up(self) -> None:
        """Compute one micro-batch and discard the results.

        This compiles code and takes memory before the clock of the training starts.
        """
        # a forward pass in training mode may change buffers, which therefore are restored
        buffers = {name: tensor.clone() for name, tensor in self.model.named_buffers()}
        self.model.train()
        with self.computing():
            self._backward(self._parts()[:1], 1)
            self._clear_gradients()
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
            with torch.inference_mode():
                self.model.eval().step(torch.zeros(1, dtype=torch.long, device=self.device))

    @property
    def scale(self) -> float:
        """The factor of the loss, a power of 2; 1 in all dtypes except float16."""
        return self.progress.loss_scale if self.runtime.dtype.value == "float16" else 1.0

    def _clear_gradients(self) -> None:
        # a CUDA graph adds gradients at fixed addresses, so their memory must stay the same
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not self.recorded)

    def _parts(self) -> list[Rows]:
        """The micro-batches of the next step; InputError for a symbol outside the vocabulary."""
        self.corpus.refuse_cut("train")
        parts = self.batches.at(self.progress.step)
        for part in parts:
            beginning = part.inputs == self.model.beginning
            self.corpus.refuse_unknown("train", part.targets)
            self.corpus.refuse_unknown("train", np.where(beginning, 0, part.inputs))
        return parts

    def _fresh_state(self) -> State:
        """The initial state of this process' streams: (S, ...) each."""
        return tuple(t.detach().clone() for t in self.model.initial_state(len(self.streams)))

    def _restart_streams(self, parts: list[Rows]) -> None:
        """After a skipped step, streams that began in it restart from the initial state.

        Their old state is that of an earlier document or epoch, with which the next step must not
        continue.
        """
        for part in parts:
            streams = torch.from_numpy(part.streams[part.fresh & part.kept]).to(self.device)
            for tensor, new in zip(self.state, self.model.initial_state(len(streams)), strict=True):
                tensor[streams] = new

    def _backward(self, parts: list[Rows], symbols: float) -> tuple[Tensor, State]:
        """Add the gradients of the step; returns the loss, and the streams' states after it.

        symbols: the number of learned symbols in all processes.  Loss and gradients are divided by
        it, so their sum over the processes is the mean of the whole step.
        """
        seed, step = self.config.train.seed, self.progress.step
        # documents: a stream without a kept row has read a whole document, and starts afresh
        total, after = torch.zeros((), device=self.device), self._fresh_state()
        count, scale = (torch.full((), x, device=self.device) for x in (symbols, self.scale))
        for turn, part in enumerate(parts):
            # dropout is seeded by the micro-batch's number in the whole step, so that N processes
            # drop what one process with N x train.accumulate would (for streams; documents are cut
            # into other micro-batches there)
            number = turn * self.processes + parallel.rank()
            # indices and not a mask, since the GPU would have to report how many rows a mask has
            kept_rows = np.flatnonzero(part.kept)
            arrays = part.inputs, part.targets, part.streams, part.fresh, kept_rows
            x, y, streams, fresh, kept = (_moved(array, self.device) for array in arrays)
            torch.manual_seed(derived_seed(seed, "dropout", step, number))
            loss, *end = self.passes(x, y, streams, fresh, count, scale, *self.state)
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
        """The forward and backward pass of a micro-batch: (loss, *state after it).

        x, y: (R, T) inputs and targets.  streams: (R,) the stream of each row.  fresh: (R,) whether
        the row starts from the initial state.  symbols: divides the loss.  scale: multiplies the
        gradients, which are added to the present ones.  before: the states of all streams, (S, ...)
        each.  All arguments are tensors, so that the pass can be recorded as a CUDA graph.
        """
        old = tuple(tensor[streams] for tensor in before)
        state = chosen_rows(fresh, self.model.initial_state(len(x)), old)
        with self.runtime.autocast():
            logits, end = self.model(x, state)
        logits, y = logits.float().flatten(0, 1), y.flatten()
        loss = F.cross_entropy(logits, y, ignore_index=IGNORED, reduction="sum") / symbols
        (loss * scale).backward()
        return loss.detach(), *(last.detach() for last in end)

    def validate(self) -> Score:
        """Score the val split in float32, by the protocol stripes or document by document."""
        self.model.eval()
        with self.computing():
            return evaluate.validate(self.model, self.val)


def _fixed_gradients(model: nn.Module) -> list[Tensor]:
    """Give every parameter a gradient, whose memory then stays the same."""
    gradients = []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    return gradients


def _moved(array: np.ndarray, device: str) -> Tensor:
    """The array as a tensor on the device.  The copy to a GPU runs beside other work."""
    tensor = torch.from_numpy(array)
    if device == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def schedule(config: OptimConfig, step: int, steps: float) -> float:
    """The share of the peak learning rate in step number `step`, from 0 on: a linear rise to 1,
    then the schedule.

    The rise takes config.warmup steps, but at most a tenth of the training.  The schedule begins
    after it, so that the rate reaches its peak.
    steps: the steps of the whole training, or an estimate where a time limit ends it.
    """
    warmup = math.floor(min(config.warmup, steps / 10))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / (steps - warmup))
    return 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
