"""seqlm as a library: `load` and `train` return a Run.

The commands of the command line call these functions.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import TqdmWarning

from seqlm import cells
from seqlm.config import FLAGS, RuntimeConfig, cell_files, merge_settings
from seqlm.errors import InputError, UsageError, unknown
from seqlm.model import build, round_matrices
from seqlm.run import Run
from seqlm.runtime import Runtime
from seqlm.store import runs
from seqlm.training import launch

__all__ = ["Run", "load", "read", "train"]
WEIGHTS = ("float32", "bfloat16")  # dtypes that `load` can round a model's matrices to


def load(
    path: str | Path | None = None,
    step: str | int = "best",
    *,
    device: str = "cpu",
    cell: str | None = None,
    threads: int = 0,
    backend: str = "auto",
    graphs: str = "auto",
    dtype: str = "float32",
) -> Run:
    """Load a run at a saved step.  path: its folder, or its name in checkpoints/; None: the newest.

    device, threads, backend, graphs: the runtime of this Run, as in the settings runtime.*; it may
    differ from the runtime of the training.
    dtype: "bfloat16" rounds the model's matrices to 8 bits of precision.  Generation on a CPU then
    reads half as many bytes for each character.
    cell: the path of the user's own cell file, if the run was trained with one.  It has to be given
    again, because seqlm never executes a file only because a run names it.
    Raises InputError if the run is missing or damaged, and warns if it skips a damaged step, or
    if the run has only step 0, the model before training.

    On a machine with other work, set GOMP_SPINCOUNT=1000 in the environment before torch is
    imported, or use threads=1.  Otherwise idle threads of torch occupy cores that others need.
    """
    wanted = RuntimeConfig(device=device, threads=threads, backend=backend, graphs=graphs)
    run = read(path, step, Runtime.pick(wanted), cell, dtype)
    refuse_cell_without_effect(cell, run)
    _warn(run.warnings)
    return run


def refuse_cell_without_effect(cell: str | None, *runs: Run) -> None:
    """Raises UsageError for the file of a cell if all runs were trained with cells of seqlm."""
    recorded = [run.config.cell.name for run in runs]
    if cell is not None and cell != recorded[0] and not any(map(cell_files, recorded)):
        raise UsageError(
            f"--cell {cell}: {runs[0].path} was trained with {recorded[0]}, a cell of seqlm, and "
            "needs no file. Remove --cell."
        )


def read(
    path: str | Path | None,
    step: str | int,
    runtime: Runtime,
    cell: str | None = None,
    dtype: str = "float32",
) -> Run:
    """`load` with a Runtime.  A run of a cell of seqlm ignores `cell`."""
    if dtype not in WEIGHTS:
        raise unknown("dtype of weights", dtype, WEIGHTS)
    folder = runs.find(None if path is None else str(path))
    saved, messages = runs.load(folder, str(step), "model")
    if not saved.step and str(step) != "0":
        initial = "step 0, the model before training"
        if messages:
            raise InputError(f"{messages[0]} Only {initial}, is left. To read it: --step 0")
        messages = [f"{folder} has only {initial}: its weights are the initial ones."]
    config = runs.with_cell_file(saved.config, folder, cell)
    for name, now in cells.hashes(config.cell.name).items():
        if saved.environment.get(name) != now:
            messages.append(f"The file of {name} has changed since the training.")
    # before the model is built, so that a forged configuration cannot take memory
    weights = saved.weights(config)
    model = build(config, saved.tokenizer.vocab_size)
    model.load_state_dict(weights)
    if dtype != "float32":
        round_matrices(model, getattr(torch, dtype))
    model.to(runtime.device.value).eval()
    return Run(folder, saved.step, config, model, saved.tokenizer, runtime, messages, dtype=dtype)


def train(
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    set: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    **flags: Any,
) -> Run:
    """Train a model, and return its best step.  The options have the names of `seqlm train`'s.

    data: a prepared corpus (its path, or its name in data/), the name of a known corpus, or files
    or folders of text, which are prepared into data/ first.
    flags: cell, width, layers, batch, length, lr, dropout, steps, time_limit, state, seed,
    init_from, device, dtype, threads.
    set: {"section.name": value}.  progress: draw a progress bar, in a notebook by its own means.
    On a machine with other work, set GOMP_SPINCOUNT as described in `load`.
    """
    for name in flags:
        if name not in FLAGS:
            raise unknown("option of train", name, FLAGS)
    settings = merge_settings(set or {}, flags)
    sources = [data] if isinstance(data, str | Path) else data or []
    setup = launch.start(
        [str(source) for source in sources],
        run=None if run is None else str(run),
        preset=preset,
        config=config,
        settings=settings,
        resume=resume,
        force=force,
    )
    _warn(setup.warnings)
    with warnings.catch_warnings():
        # a notebook without ipywidgets gets the bar of a terminal
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.auto import tqdm
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=1.0, bar_format=layout, dynamic_ncols=True, disable=not progress) as bar:
        for report in setup.reports():
            bar.set_description_str(f"step {report.step:,} loss {report.loss:.4f}", refresh=False)
            bar.update(report.progress - bar.n)
    best = read(setup.run, "best", setup.runtime, setup.config.cell.name)
    _warn(best.warnings)
    return best


def _warn(texts: Sequence[str]) -> None:
    """Raise messages of the commands as Python warnings, at the line that called seqlm."""
    for text in texts:
        warnings.warn(text, stacklevel=3)
