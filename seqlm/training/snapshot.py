"""Saving a trainer as a step, and restoring a trainer from a step."""

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
from seqlm.store.checkpoint import OTHER_STEP, Saved, Shape, shapes_of
from seqlm.training import parallel
from seqlm.training.optimizer import state_keys
from seqlm.training.trainer import Trainer

STREAMS = ("batch", "length", "state", "seed")  # settings that decide which text a stream reads


def save(trainer: Trainer, run: Path, best: bool) -> None:
    """Save a step.  All processes call this, and the writer writes."""
    saved = tensors(trainer)
    if parallel.is_writer():
        tokenizer, progress = trainer.corpus.tokenizer, trainer.progress
        runs.save(run, trainer.config, tokenizer, progress, environment(trainer), saved, best)


def tensors(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """All tensors of a saved step, with the carried state of the streams of all processes."""
    names: Mapping[Tensor, str] = {p: name for name, p in trainer.model.named_parameters()}
    moments = {
        f"{names[parameter]}.{key}": value
        for optimizer in trainer.optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    accumulate = trainer.config.train.accumulate
    carried = _numbered(tuple(parallel.all_streams(t, accumulate) for t in trainer.state))
    return {"model": trainer.model.state_dict(), "optimizer": moments, "state": carried}


def environment(trainer: Trainer) -> dict[str, str | int]:
    """What the results of a run depend on in their last bits, beside its configuration."""
    here = trainer.runtime.environment() | {"processes": trainer.processes}
    return here | cells.hashes(trainer.config.cell.name)


def restore(
    trainer: Trainer,
    saved: Saved,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
) -> None:
    """Continue from a saved step: its progress, and its tensors as `tensors_of` returns them."""
    trainer.progress = replace(saved.progress, finished=False)
    trainer.model.load_state_dict(weights)
    parameters = dict(trainer.model.named_parameters())
    states = {
        parameter: optimizer.state[parameter]
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, value in moments.items():
        parameter, _, key = name.rpartition(".")
        states[parameters[parameter]][key] = value.to(trainer.device)
    before, now = saved.config.train, trainer.config.train
    # with another batch or length, a stream continues at another place of the text, which the old
    # state knows nothing of: the streams then start from the initial state
    if all(getattr(before, key) == getattr(now, key) for key in STREAMS):
        local = (carried[name][trainer.streams] for name in sorted(carried))
        trainer.state = tuple(tensor.to(trainer.device) for tensor in local)


def init_from(trainer: Trainer, saved: Saved) -> int:
    """Copy the weights of another run's step; returns how many symbols both vocabularies have."""
    rows = trainer.corpus.tokenizer.rows_of(saved.tokenizer)
    trainer.model.init_from(saved.weights(trainer.config), rows)
    return len(rows)


def tensors_of(saved: Saved, model: LanguageModel) -> tuple[dict[str, Tensor], ...]:
    """The weights, the optimizers' state and the carried state of a saved step.

    model: the model that the step's configuration describes; it may be on the device "meta", which
    takes no memory.  Raises InputError if the tensors do not fit this model.
    """
    weights = saved.tensors("model", shapes_of(model.state_dict()))
    expected: dict[str, Shape] = {}
    keys = state_keys(model, saved.config)
    for name, weight in shapes_of(dict(model.named_parameters())).items():
        scalar = (), torch.float32
        expected |= {f"{name}.{k}": scalar if k == "step" else weight for k in keys[name]}
    moments = saved.tensors("optimizer", expected, partial=True)  # empty before the first step
    for name in [name.rpartition(".")[0] for name in moments]:
        if any(f"{name}.{key}" not in moments for key in keys[name]):
            raise InputError(f"The optimizer's state in {saved.folder} is incomplete. {OTHER_STEP}")
    row, batch = shapes_of(_numbered(model.initial_state(1))), saved.config.train.batch
    expected = {name: ((batch, *shape[1:]), dtype) for name, (shape, dtype) in row.items()}
    return weights, moments, saved.tensors("state", expected)


def _numbered(state: State) -> dict[str, Tensor]:
    """The tensors of a state, under names that sort in the state's order."""
    return {f"{i:06d}": tensor for i, tensor in enumerate(state)}
