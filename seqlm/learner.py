"""What a step of training changes: weights, optimizer, carried state, and how far it has come."""

# B batch, T length

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm import checkpoint, evaluate, ops
from seqlm.cells import State
from seqlm.checkpoint import Progress, Saved
from seqlm.config import Config, OptimConfig
from seqlm.data import Batch, Batches, Corpus
from seqlm.evaluate import Score
from seqlm.generate import generate
from seqlm.model import LanguageModel, build
from seqlm.runtime import autocast, derived_seed

SAMPLE_CHARS = 200
STREAMS = ("batch", "length", "state", "seed")  # what decides which text a row of the batch reads


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
            self.optimizer.state[parameters[parameter]][key] = value.to(self.device)
        carried = saved.tensors("state")
        before, now = saved.config.train, self.config.train
        # other batches cut the text into other streams, which the old state says nothing about
        same_streams = all(getattr(before, key) == getattr(now, key) for key in STREAMS)
        if carried and same_streams:
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

    def validate(self) -> Score:
        """The val split by protocol stripes, in float32."""
        self.model.eval()
        counts = self.corpus.splits["val"]
        with ops.using(self.backend):
            nats = evaluate.stripes(self.model, self.corpus.symbols("val"))
        return Score(nats, counts["tokens"], counts["chars"], counts["bytes"])

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
