"""Compare cells under equal conditions: same text, batches, evaluation and number of parameters.

Each training is a run in its own process; trainings run one after the other.  The outcome of each
is saved next to its run, so that an interrupted comparison continues where it stopped.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from math import log
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median, stdev
from time import perf_counter
from typing import Any

import numpy as np
import torch

from seqlm import api, evaluate
from seqlm.cells import hashes
from seqlm.config import Config, cell_key, parse_assignment, read_toml
from seqlm.errors import InputError, SeqlmError, UsageError, unknown
from seqlm.files import make_folder, names_in
from seqlm.generate import stepper
from seqlm.lab.interval import LEAST, interval
from seqlm.lab.processes import spawn
from seqlm.manifest import conforms, read_json
from seqlm.model import LanguageModel, blueprint, parameter_count
from seqlm.passage import passage_of_split
from seqlm.runtime import keep_memory, peak_memory_bytes
from seqlm.store import runs
from seqlm.temporary import PREFIX, write_file
from seqlm.text.corpus import Corpus, open_corpus
from seqlm.training import launch

# the names in a folder of results: tables and pictures, runs, and what each run came to
OWN = re.compile(r"compare\.\w+|.+-s\d+(\.json)?")
MATCHES = ("params", "time", "steps")
SIZE_TOLERANCE = 0.2  # of the first entry's parameters; narrow models come no nearer
MAX_WIDTH = 8192
VALIDATIONS = 20  # in one training, where the number of steps is known
EVAL_EVERY = 50  # steps between validations under a time limit
BLOCK = 1000  # symbols in a block; the interval is that of differences of blocks
DECODED, TURNS = 100, 7  # characters in one timed call, and calls


@dataclass(frozen=True)
class Entry:
    """One cell or stack to compare, with its options."""

    label: str  # as the user wrote it
    config: Config  # complete; with the seed of the first training
    params: int

    @property
    def file_name(self) -> str:
        """The label as a file name that is not hidden: ./ema.py becomes ema.py."""
        return re.sub("[^A-Za-z0-9.=_-]+", "-", self.label).lstrip(".-")

    def trainings(self, out: Path, seeds: int) -> list[tuple[Config, Path]]:
        """The configuration and the run folder of each seed."""
        name, first = self.file_name, self.config.train
        seeded = [replace(first, seed=first.seed + i) for i in range(seeds)]
        return [(replace(self.config, train=t), out / f"{name}-s{t.seed}") for t in seeded]


@dataclass(frozen=True)
class Outcome:
    """The measurements of one training, as saved next to its run."""

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
class Row:
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
    accuracy: float  # share of the symbols that the model held likeliest
    chars_per_second: float
    decode_chars_per_second: float
    peak_memory_bytes: int
    state_bytes: int
    behind: float  # bits per character above the best row
    low: float | None  # 95 % interval of `behind`, for all rows together;
    high: float | None  # None when the split has too few blocks

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Status:
    """How far the comparison is."""

    label: str
    seed: int
    share: float  # of the present training
    trainings: float  # finished trainings, plus this share


def entries(
    names: Sequence[str],
    match: str,
    preset: str | None = None,
    file: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    vocab_size: int = 1,
) -> list[Entry]:
    """Parse what to compare.  A name is CELL, or CELL+CELL+CELL for a stack, then :OPTION=VALUE.

    The first entry has the configured width.  The others get the width whose number of parameters
    is nearest to the first's, unless match is "steps"; from width 100 on the difference is within
    1 %.  Raises UsageError when no width comes near.
    """
    if match not in MATCHES:
        raise unknown("match", match, MATCHES)
    if len(set(names)) < len(names) or not names:
        raise UsageError(f"--cells {','.join(names)}: name some cells, each of them once.")
    settings = dict(settings or {})
    chosen = {*settings, *(read_toml(file) if file else ())}
    stacks = [[cell_key(cell) for cell in name.split(":")[0].split("+")] for name in names]
    for key in settings:
        owner = _owner(key)
        if owner and not any(owner in cells for cells in stacks):
            raise UsageError(f"{key} is set, but {owner} is not compared.")
    entries: list[Entry] = []
    for name, cells in zip(names, stacks, strict=True):
        own = {key: value for key, value in settings.items() if _owner(key) in (None, *cells)}
        config = _configuration(name, match, preset, file, own)
        if "train.eval_every" not in chosen:
            every = max(1, config.train.steps // VALIDATIONS) if match != "time" else EVAL_EVERY
            config = replace(config, train=replace(config.train, eval_every=every))
        if entries and match != "steps":
            config = _with_equal_size(entries[0].config, config, name, vocab_size)
        entries.append(Entry(name, config, parameter_count(blueprint(config, vocab_size))))
    if len({entry.file_name for entry in entries}) < len(entries):
        raise UsageError(
            f"--cells {','.join(names)}: two of them need the same file names. Rename one."
        )
    return entries


def _configuration(
    name: str, match: str, preset: str | None, file: Path | None, settings: Mapping[str, Any]
) -> Config:
    """The complete configuration of one entry, before its width is matched."""
    cell, *options = name.split(":")
    own = dict(settings) | dict(parse_assignment(f"cell.{option}") for option in options)
    own["cell.name"] = cell.replace("+", ",")
    config, _ = launch.configuration(preset, file, own)
    if match == "time" and not config.train.time_limit:
        raise UsageError("--match time compares equal times. Give --time-limit.")
    if match != "time" and config.train.time_limit:
        raise UsageError(f"--match {match} compares equal steps. Give --steps.")
    return config


def _owner(key: str) -> str | None:
    """The cell that a setting belongs to, such as lem for cell.lem.dt; None if to all cells."""
    section, *rest = key.split(".")
    return rest[0] if section == "cell" and len(rest) > 1 else None


def _with_equal_size(first: Config, config: Config, name: str, vocab_size: int) -> Config:
    """The configuration, with the width whose number of parameters is nearest to the first's."""
    target = parameter_count(blueprint(first, vocab_size))

    def with_width(width: int) -> Config:
        return replace(config, model=replace(config.model, width=width))

    def count(width: int) -> int | None:
        try:
            return parameter_count(blueprint(with_width(width), vocab_size))
        except UsageError:  # a cell with heads refuses widths that they do not divide
            return None

    def nearest(widths: Iterable[int]) -> tuple[int, int]:
        """(difference of the parameters, width) for the first of `widths` that the cell allows."""
        allowed = ((abs(n - target), width) for width in widths if (n := count(width)) is not None)
        return next(allowed, (target, 0))

    low, high = 1, MAX_WIDTH
    while low < high:  # binary search for the narrowest model with at least `target` parameters
        middle = (low + high) // 2
        counts = (count(width) for width in range(middle, high))
        size = next((n for n in counts if n is not None), target)
        low, high = (middle + 1, high) if size < target else (low, middle)
    difference, width = min(nearest(range(low, MAX_WIDTH)), nearest(range(low - 1, 0, -1)))
    if difference > SIZE_TOLERANCE * target:
        raise UsageError(
            f"No width of {name} comes near the {target:,} parameters of the first cell. Choose "
            "another --width, or other options."
        )
    return with_width(width)


def place(name: str) -> Path:
    """Where the results go: a path as it is, a bare name under checkpoints/.

    Raises UsageError for a folder that has something in it, but nothing of a comparison.
    """
    folder = runs.place(name)
    there = [name for name in names_in(folder) if not name.startswith(PREFIX)]
    if there and not any(OWN.fullmatch(name) for name in there):
        some = ", ".join(sorted(there)[:3]) + (", ..." if len(there) > 3 else "")
        raise UsageError(
            f"--out {folder}: the folder holds {some} and no comparison. Name a new folder, or "
            "that of a comparison."
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
    rounds = zip(*(entry.trainings(out, seeds) for entry in entries), strict=True)
    order = [
        (entry, *training)
        for trainings in rounds
        for entry, training in zip(entries, trainings, strict=True)
    ]
    for done, (entry, config, folder) in enumerate(order):
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
    if saved.keys() != {field.name for field in fields(Outcome)}:
        raise InputError(f"{path} is damaged, or of another version of seqlm. Delete it.")
    if not _is_plausible(saved):
        raise InputError(f"{path} is damaged: it holds figures that no training has. Delete it.")
    outcome = Outcome(**saved)
    if outcome.identity != identity:
        raise _mismatch(path)
    return outcome


def _is_plausible(saved: dict[str, Any]) -> bool:
    """Whether the fields of an Outcome have their types, and numbers are finite and in range."""
    shape: dict[str, Any] = {"identity": {}}
    shape |= dict.fromkeys(("params", "steps", "chars", "evaluated"), int)
    shape |= dict.fromkeys(("peak_memory_bytes", "state_bytes"), int)
    shape |= dict.fromkeys(("seconds", "decode_chars_per_second", "accuracy"), int | float)
    nats = saved["nats"]
    return (
        conforms(saved, shape)  # which takes neither NaN nor infinity
        and isinstance(nats, list)
        and all(conforms(one, int | float) for one in nats)
        and saved["accuracy"] <= 1
        and min(saved["evaluated"], saved["seconds"], len(nats)) > 0
    )


def _mismatch(path: Path) -> UsageError:
    return UsageError(
        f"{path} is of another configuration, corpus or split. Choose another folder with --out, "
        "or delete it and its run."
    )


def _identity(config: Config, corpus: Corpus, split: str) -> dict[str, Any]:
    """Everything that determines the outcome of a training."""
    own = {"data.path": None, "data.fingerprint": corpus.fingerprint, "split": split}
    return json.loads(json.dumps({**config.flat(), **own, **hashes(config.cell.name)}))


def _train(corpus: Corpus, config: Config, folder: Path, split: str) -> Iterator[float]:
    """Train in another process; yields the share that is done, and saves the outcome.

    When the caller stops early, the connection closes, and the process saves its step and ends.
    """
    process, connection = spawn(
        _run_training, str(corpus.path), config, str(folder), split, daemon=False
    )
    try:
        while isinstance(answer := connection.recv(), float):
            yield answer
    except EOFError:
        answer = "its process ended without an answer; the memory may have run out."
    finally:
        connection.close()
        process.join()
    if not isinstance(answer, Outcome):
        kind = type(answer) if isinstance(answer, SeqlmError) else SeqlmError
        raise kind(f"{folder.name}: {answer}")
    write_file(_outcome_path(folder), json.dumps(asdict(answer)) + "\n")


def _run_training(
    connection: Connection, data: str, config: Config, folder: str, split: str
) -> None:
    """The process of a training: sends shares, and then an Outcome or an error."""
    try:
        keep_memory()
        resume, corpus = runs.is_run(Path(folder)), open_corpus(Path(data))
        identity = _identity(config, corpus, split)
        settings = {k: v for k, v in config.flat().items() if not k.startswith("data.")}
        setup = launch.start(data, run=folder, given=None if resume else settings, resume=resume)
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
    with runtime.active():
        rate, state_bytes = _decode(run.model)
        nats, accuracy, evaluated = _evaluate(run, split)
    return Outcome(
        identity=identity,
        params=parameter_count(run.model),
        steps=progress.step,
        seconds=progress.elapsed,
        chars=progress.chars,
        peak_memory_bytes=peak_memory_bytes(runtime.device.value),
        state_bytes=state_bytes,
        decode_chars_per_second=rate,
        nats=nats,
        accuracy=accuracy,
        evaluated=evaluated,
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


def _evaluate(run: api.Run, split: str) -> tuple[list[float], float, int]:
    """(nats of each block of the split, accuracy, number of characters), by protocol stream."""
    passage = passage_of_split(run.corpus(), split, run.tokenizer)
    size = max(1, min(BLOCK, len(passage.symbols) // LEAST))
    nats, correct = zip(*evaluate.blocks(run.model, passage, size), strict=True)
    return list(nats), sum(correct) / passage.tokens, passage.chars or passage.bytes


def results(
    corpus: Corpus, entries: Sequence[Entry], seeds: int, out: Path, split: str
) -> list[Row]:
    """The rows of a finished comparison, the best first."""
    outcomes = {
        entry.label: [
            outcome
            for config, folder in entry.trainings(out, seeds)
            if (outcome := _load_outcome(folder, _identity(config, corpus, split))) is not None
        ]
        for entry in entries
    }
    assert all(len(own) == seeds for own in outcomes.values()), "the comparison is not finished"
    if len({len(o.nats) for own in outcomes.values() for o in own}) > 1:
        raise InputError(f"The results in {out} are of different blocks of the split. Delete them.")
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
) -> Row:
    bits = [sum(o.nats) / log(2) / o.evaluated for o in outcomes]
    return Row(
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
