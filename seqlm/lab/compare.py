"""Train and measure the entries of a comparison under equal conditions.

Text, batches and evaluation are the same for all.  Each training is a run in its own process;
trainings run one after the other.  The outcome of each is saved beside its run, so that an
interrupted comparison continues where it stopped.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import chain
from math import isfinite, log
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median, stdev
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from seqlm import api
from seqlm.cells import hashes
from seqlm.config import Config
from seqlm.errors import Diverged, InputError, SeqlmError, UsageError
from seqlm.evaluation import evaluate
from seqlm.evaluation.passage import passage_of_split
from seqlm.files import make_folder, names_in
from seqlm.generation.generate import stepper
from seqlm.lab.entries import Entry
from seqlm.lab.interval import LEAST, interval
from seqlm.lab.processes import spawn
from seqlm.manifest import conforms, read_json
from seqlm.model import LanguageModel, parameter_count
from seqlm.runtime import keep_memory, peak_memory_bytes
from seqlm.store import runs
from seqlm.temporary import PREFIX, sweep, write_file
from seqlm.text.corpus import Corpus, open_corpus
from seqlm.training import launch

# the names in a folder of results: tables and plots, runs, and the outcome of each run
OWN = re.compile(r"compare\.\w+|.+-s\d+(\.json)?")
BLOCK = 1000  # symbols in a block; the interval is computed from differences of blocks
DECODED, TURNS = 100, 7  # characters in one timed call, and timed calls


@dataclass(frozen=True)
class Outcome:
    """The measurements of one training, as saved beside its run."""

    identity: dict[str, Any]  # from _identity
    params: int
    steps: int
    seconds: float
    chars: int  # read in training
    peak_memory_bytes: int
    state_bytes: int  # for one text
    decode_chars_per_second: float
    nats: list[float]  # for each block of the split
    accuracy: float
    evaluated: int  # code points in the split; bytes, where the split is not text


@dataclass(frozen=True)
class EntryFigures:
    """The measurements of one entry: means and spread over its seeds."""

    cell: str
    width: int
    layers: int
    params: int
    seeds: int
    steps: int
    seconds: float
    bits_per_char: float
    spread: float | None  # standard deviation; None for one seed
    nats_per_char: float
    accuracy: float  # share of the symbols to which the model gave the highest probability
    chars_per_second: float
    decode_chars_per_second: float
    peak_memory_bytes: int
    state_bytes: int
    behind: float  # bits per character above the best row
    low: float | None  # 95 % interval of `behind`, for all rows together; None for the best
    high: float | None  # row, and where the split has too few blocks


class Status(NamedTuple):
    """The progress of the comparison."""

    label: str
    seed: int
    share: float  # of the current training
    trainings: float  # finished trainings, plus this share


def place(name: str) -> Path:
    """The folder for the results: a path as it is, a bare name under checkpoints/.

    Raises UsageError for a folder with other files and no results of a comparison.
    """
    folder = runs.place(name)
    there = [name for name in names_in(folder) if not name.startswith(PREFIX)]
    if there and not any(OWN.fullmatch(name) for name in there):
        some = ", ".join(sorted(there)[:3]) + (", ..." if len(there) > 3 else "")
        raise UsageError(
            f"--out {folder}: the folder has {some}, but no comparison. Give a new folder, or the "
            "folder of a comparison."
        )
    return folder


def compare(
    corpus: Corpus, entries: Sequence[Entry], seeds: int, out: Path, split: str
) -> Iterator[Status]:
    """Train each entry with each seed, and save the outcomes under `out`.

    Trainings that are finished are not repeated, and begun ones are resumed.  Raises UsageError
    when `out` has a training with the same name and another configuration, corpus or split.
    """
    make_folder(out)
    sweep(out)
    trainings = [[(e, *training) for training in e.trainings(out, seeds)] for e in entries]
    # the first seed of every entry, then the second, so that an early stop leaves whole rounds
    rounds = chain.from_iterable(zip(*trainings, strict=True))
    for done, (entry, config, folder) in enumerate(rounds):
        seed = config.train.seed
        if _load_outcome(folder, _identity(config, corpus, split)) is None:
            for share in _train(corpus, config, folder, split):
                yield Status(entry.label, seed, share, done + share)
        yield Status(entry.label, seed, 1.0, done + 1.0)


def _outcome_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".json")


def _load_outcome(folder: Path, identity: dict[str, Any]) -> Outcome | None:
    """The saved outcome of a run; None if the run or its outcome is missing."""
    path = _outcome_path(folder)
    if not path.is_file() or not runs.is_run(folder):
        return None
    saved = read_json(path)
    if not _is_plausible(saved):
        raise InputError(f"{path} is damaged, or of another version of seqlm. Delete it.")
    outcome = Outcome(**saved)
    if outcome.identity != identity:
        raise _mismatch(path)
    return outcome


def _is_plausible(saved: dict[str, Any]) -> bool:
    """Whether the object has the fields of an Outcome, with finite numbers in their ranges."""
    kinds: dict[Any, Any] = {dict[str, Any]: {}, int: int, float: int | float, list[float]: list}
    shape = {field.name: kinds[field.type] for field in fields(Outcome)}
    return (
        saved.keys() == shape.keys()
        and conforms(saved, shape)  # refuses NaN and infinity, too
        and all(conforms(nats, int | float) for nats in saved["nats"])
        and saved["accuracy"] <= 1
        and min(saved["evaluated"], saved["seconds"], len(saved["nats"])) > 0
    )


def _mismatch(path: Path) -> UsageError:
    return UsageError(
        f"{path} has another configuration, corpus or split. Choose another folder with --out, or "
        "delete the file and its run."
    )


def _identity(config: Config, corpus: Corpus, split: str) -> dict[str, Any]:
    """Everything that determines the outcome of a training."""
    own = {"data.path": None, "data.fingerprint": corpus.fingerprint, "split": split}
    return json.loads(json.dumps({**config.flat(), **own, **hashes(config.cell.name)}))


def _train(corpus: Corpus, config: Config, folder: Path, split: str) -> Iterator[float]:
    """Train in another process: yields the share that is done, and saves the outcome.

    If the caller stops early, the connection closes, and the process saves its step and ends.
    """
    process, connection = spawn(
        _run_training, str(corpus.path), config, str(folder), split, daemon=False
    )
    try:
        while isinstance(answer := connection.recv(), float):
            yield answer
    except EOFError:
        answer = "Its process ended without an answer; the memory may be full. Lower --batch."
    finally:
        connection.close()
        process.join()
    if not isinstance(answer, Outcome):
        kind = type(answer) if isinstance(answer, SeqlmError) else SeqlmError
        raise kind(f"{folder.name}: {answer}")
    write_file(_outcome_path(folder), json.dumps(asdict(answer), allow_nan=False) + "\n")


def _run_training(
    connection: Connection, data: str, config: Config, folder: str, split: str
) -> None:
    """The process of a training: sends shares, and then an Outcome or an error."""
    try:
        keep_memory()
        resume, corpus = runs.is_run(Path(folder)), open_corpus(Path(data))
        identity = _identity(config, corpus, split)
        if resume:  # with the cell, because a run does not name the user's own file by itself
            settings = {"cell.name": config.cell.name}
        else:
            settings = {k: v for k, v in config.flat().items() if not k.startswith("data.")}
        setup = launch.start(data, run=folder, settings=settings, resume=resume)
        if _identity(setup.config, corpus, split) != identity:
            raise _mismatch(Path(folder))
        # nothing is ever sent to this process, so poll() is true only when the other end is closed
        for report in setup.reports(interrupted=connection.poll):
            with suppress(BrokenPipeError):
                connection.send(report.progress)
        if not connection.poll():
            connection.send(_measure(setup, identity, Path(folder), split))
    except (BrokenPipeError, EOFError):
        return  # the comparison was stopped
    except SeqlmError as error:
        connection.send(error)


def _measure(setup: launch.Training, identity: dict[str, Any], folder: Path, split: str) -> Outcome:
    """The outcome of a finished training: its best step is evaluated and timed."""
    progress, runtime = setup.trainer.progress, setup.runtime
    run = api.read(folder, "best", runtime, setup.config.cell.name)
    passage = passage_of_split(run.corpus(), split, run.tokenizer)
    size = max(1, min(BLOCK, len(passage.symbols) // LEAST))
    with runtime.active():
        rate, state_bytes = _decode(run.model)
        nats, correct = zip(*evaluate.blocks(run.model, passage, size), strict=True)
    if not isfinite(sum(nats)):
        raise Diverged(
            "The figure of its best step is not a finite number. Lower its learning rate, as in "
            "CELL:optim.lr=0.01, or leave it out."
        )
    return Outcome(
        identity=identity,
        params=parameter_count(run.model),
        steps=progress.step,
        seconds=progress.elapsed,
        chars=progress.chars,
        peak_memory_bytes=peak_memory_bytes(runtime.device.value),
        state_bytes=state_bytes,
        decode_chars_per_second=rate,
        nats=list(nats),
        accuracy=sum(correct) / passage.tokens,
        evaluated=passage.chars or passage.bytes,
    )


@torch.inference_mode()
def _decode(model: LanguageModel) -> tuple[float, int]:
    """Characters per second when generating one at a time, and the bytes of the state."""
    token = torch.zeros(1, dtype=torch.long, device=model.embedding.weight.device)
    step = stepper(model)
    _, *state = step(token, *model.initial_state(1))
    seconds = []
    for _ in range(TURNS):
        began = perf_counter()
        for _ in range(DECODED):
            logits, *state = step(token, *state)
            token = logits.argmax(-1)
        token.item()  # waits until the GPU is done
        seconds.append(perf_counter() - began)
    return DECODED / median(seconds), sum(s.numel() * s.element_size() for s in state)


def results(
    corpus: Corpus, entries: Sequence[Entry], seeds: int, out: Path, split: str
) -> list[EntryFigures]:
    """The rows of a finished comparison, the best first."""
    outcomes: dict[str, list[Outcome]] = {entry.label: [] for entry in entries}
    for entry in entries:
        for config, folder in entry.trainings(out, seeds):
            outcome = _load_outcome(folder, _identity(config, corpus, split))
            assert outcome is not None, "the comparison is not finished"
            outcomes[entry.label].append(outcome)
    if len({len(o.nats) for own in outcomes.values() for o in own}) > 1:
        raise InputError(f"The results in {out} do not use the same blocks. Delete them.")
    nats = {label: np.mean([o.nats for o in own], axis=0) for label, own in outcomes.items()}
    best = min(nats, key=lambda label: nats[label].sum())
    rows = []
    for entry in entries:
        own = outcomes[entry.label]
        difference = (nats[entry.label] - nats[best]) / log(2) / own[0].evaluated
        has_interval = entry.label != best and len(difference) >= LEAST
        low, high = interval(difference, len(entries)) if has_interval else (None, None)
        rows.append(_row(entry, own, float(difference.sum()), low, high))
    return sorted(rows, key=lambda row: row.bits_per_char)


def _row(
    entry: Entry, outcomes: list[Outcome], behind: float, low: float | None, high: float | None
) -> EntryFigures:
    bits = [sum(o.nats) / log(2) / o.evaluated for o in outcomes]
    return EntryFigures(
        cell=entry.label,
        width=entry.config.model.width,
        layers=entry.config.model.layers,
        params=outcomes[0].params,
        seeds=len(outcomes),
        steps=round(fmean(o.steps for o in outcomes)),
        seconds=fmean(o.seconds for o in outcomes),
        bits_per_char=fmean(bits),
        spread=stdev(bits) if len(outcomes) > 1 else None,
        nats_per_char=fmean(bits) * log(2),
        accuracy=fmean(o.accuracy for o in outcomes),
        chars_per_second=fmean(o.chars / o.seconds for o in outcomes),
        decode_chars_per_second=fmean(o.decode_chars_per_second for o in outcomes),
        peak_memory_bytes=max(o.peak_memory_bytes for o in outcomes),
        state_bytes=outcomes[0].state_bytes,
        behind=behind,
        low=low,
        high=high,
    )
