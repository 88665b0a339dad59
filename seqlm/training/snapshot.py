"""What a saved step holds of a trainer, and a trainer that goes on from a saved step."""

# S streams of this process

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from seqlm import cells
from seqlm.cells import State
from seqlm.errors import InputError
from seqlm.model import LanguageModel
from seqlm.store import runs
from seqlm.store.checkpoint import ANOTHER, Saved, Shape, shapes_of
from seqlm.training import parallel
from seqlm.training.trainer import Learner

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, beside its count of steps
STREAMS = ("batch", "length", "state", "seed")  # settings that decide which text a stream reads


def save(learner: Learner, run: Path, best: bool) -> None:
    """Save a step.  All processes call this, and the writer writes."""
    saved = tensors(learner)
    if parallel.is_writer():
        tokenizer, progress = learner.corpus.tokenizer, learner.progress
        runs.save(run, learner.config, tokenizer, progress, environment(learner), saved, best)


def tensors(learner: Learner) -> dict[str, dict[str, Tensor]]:
    """All tensors of a saved step; the carried state is that of all processes' streams."""
    names: Mapping[Tensor, str] = {p: name for name, p in learner.model.named_parameters()}
    moments = {
        f"{names[parameter]}.{key}": value
        for parameter, values in learner.optimizer.state.items()
        for key, value in values.items()
    }
    accumulate = learner.config.train.accumulate
    carried = _numbered(tuple(parallel.gathered(t, accumulate) for t in learner.state))
    return {"model": learner.model.state_dict(), "optimizer": moments, "state": carried}


def environment(learner: Learner) -> dict[str, str | int]:
    """What the bits of a run depend on, beside its configuration: machine, versions, processes."""
    here = learner.runtime.environment() | {"processes": learner.processes}
    return here | cells.hashes(learner.config.cell.name)


def restore(
    learner: Learner,
    saved: Saved,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
) -> None:
    """Give the trainer the progress of a saved step, and its `tensors_of`."""
    learner.progress = replace(saved.progress, finished=False)
    learner.model.load_state_dict(weights)
    parameters = dict(learner.model.named_parameters())
    for name, value in moments.items():
        parameter, _, key = name.rpartition(".")
        learner.optimizer.state[parameters[parameter]][key] = value.to(learner.device)
    before, now = saved.config.train, learner.config.train
    # with another batch or length the streams read other text: the old state does not belong to it
    if all(getattr(before, key) == getattr(now, key) for key in STREAMS):
        own = (carried[name][learner.streams] for name in sorted(carried))
        learner.state = tuple(tensor.to(learner.device) for tensor in own)


def adopt(learner: Learner, saved: Saved) -> int:
    """Start from the weights of another run's step; returns how many symbols keep their rows."""
    rows = learner.corpus.tokenizer.rows_of(saved.tokenizer)
    learner.model.adopt(saved.weights(learner.config), rows)
    return len(rows)


def tensors_of(saved: Saved, model: LanguageModel) -> tuple[dict[str, Tensor], ...]:
    """The weights, the optimizer's moments and the carried state of a saved step.

    model: the model that the step's configuration describes, on any device ("meta" takes no
    memory).  Raises InputError where the tensors are not those of that model.
    """
    weights = saved.tensors("model", shapes_of(model.state_dict()))
    expected: dict[str, Shape] = {}
    for name, (shape, dtype) in shapes_of(dict(model.named_parameters())).items():
        expected |= {f"{name}.{key}": (shape, dtype) for key in MOMENTS}
        expected[f"{name}.step"] = ((), torch.float32)
    moments = saved.tensors("optimizer", expected, partial=True)  # empty before the first step
    for name in [name.rpartition(".")[0] for name in moments]:
        if any(f"{name}.{key}" not in moments for key in (*MOMENTS, "step")):
            raise InputError(f"The optimizer's state in {saved.folder} is incomplete. {ANOTHER}")
    one, batch = shapes_of(_numbered(model.initial_state(1))), saved.config.train.batch
    expected = {name: ((batch, *shape[1:]), dtype) for name, (shape, dtype) in one.items()}
    return weights, moments, saved.tensors("state", expected)


def _numbered(state: State) -> dict[str, Tensor]:
    """The tensors of a state, under names that sort in the state's order."""
    return {f"{i:06d}": tensor for i, tensor in enumerate(state)}
