"""Cells compared fairly: the same text, batches and evaluation, and as many parameters.

Every training is a run of its own in a process of its own, one at a time; what it came to is kept
beside it, so that a comparison that was interrupted goes on where it was.
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
from seqlm.manifest import read_json
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
AT_MOST = 0.2  # away from the parameters of the first, whose cells are a few units wide
WIDEST = 8192
VALIDATIONS, EVERY = 20, 50  # in a training of so many steps; steps between, under a time limit
BLOCK = 1000  # symbols in a block, for whose differences there is an interval
DECODED, TURNS = 100, 7


@dataclass(frozen=True)
class Entry:
    """What is compared: a cell or a stack, with options of its own."""

    label: str  # as it was asked for
    config: Config  # complete; its seed is that of the first training
    params: int

    @property
    def file_name(self) -> str:
        """The label as the beginning of a file's name, which is not hidden: ema.py of ./ema.py."""
        return re.sub("[^A-Za-z0-9.=_-]+", "-", self.label).lstrip(".-")

    def trainings(self, out: Path, seeds: int) -> list[tuple[Config, Path]]:
        """The configuration of every seed, and where its run goes."""
        name, first = self.file_name, self.config.train
        seeded = [replace(first, seed=first.seed + i) for i in range(seeds)]
        return [(replace(self.config, train=t), out / f"{name}-s{t.seed}") for t in seeded]


@dataclass(frozen=True)
class Outcome:
    """What one training came to."""

    known_by: dict[str, Any]
    params: int
    steps: int
    seconds: float
    chars: int
    memory: int  # bytes, at most
    state: int  # bytes, of one text
    decoded: float  # characters a second
    nats: list[float]  # of every block of the split
    accuracy: float
    evaluated: int  # code points of the split, or bytes where it is no text


@dataclass(frozen=True)
class Row:
    """What all trainings of an entry came to: means, and the spread over the seeds."""

    cell: str
    width: int
    layers: int
    params: int
    seeds: int
    steps: int
    seconds: float
    bits_per_char: float
    spread: float | None  # standard deviation; None of one seed
    nats_per_char: float
    accuracy: float  # share of the symbols that were the likeliest
    chars_per_second: float
    decode_chars_per_second: float
    peak_memory_bytes: int
    state_bytes: int
    behind: float  # bits per character more than the best
    low: float | None  # between which numbers that is, with 95 % confidence for all rows together;
    high: float | None  # None where the split has too few blocks

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Progress:
    label: str
    seed: int
    share: float  # of this training
    whole: float  # trainings that are done, and this share of one


def entries(
    names: Sequence[str],
    match: str,
    preset: str | None = None,
    file: Path | None = None,
    given: Mapping[str, Any] | None = None,
    vocab_size: int = 1,
) -> list[Entry]:
    """What to compare, each as CELL, or CELL+CELL+CELL for a stack, and then :OPTION=VALUE.

    The first has the width that the configuration gives it, and the others, unless steps are
    matched, the one that comes nearest to its parameters: within 1 % where a width of one more adds
    no more than 2 %, as from 100 on.  Raises UsageError where none comes near.
    """
    if match not in MATCHES:
        raise unknown("match", match, MATCHES)
    if len(set(names)) < len(names) or not names:
        raise UsageError(f"--cells {','.join(names)}: name some cells, each of them once.")
    given, found = dict(given or {}), []
    chosen = {*given, *(read_toml(file) if file else ())}
    stacks = [[cell_key(cell) for cell in name.split(":")[0].split("+")] for name in names]
    for key in given:
        owner = _owner(key)
        if owner and not any(owner in cells for cells in stacks):
            raise UsageError(f"{key} is set, but {owner} is not compared.")
    for name, cells in zip(names, stacks, strict=True):
        cell, *options = name.split(":")
        own = {key: value for key, value in given.items() if _owner(key) in (None, *cells)}
        own |= dict(parse_assignment(f"cell.{option}") for option in options)
        own["cell.name"] = cell.replace("+", ",")
        config, _ = launch.configuration(preset, file, own)
        if match == "time" and not config.train.time_limit:
            raise UsageError("--match time compares equal times. Give --time-limit.")
        if match != "time" and config.train.time_limit:
            raise UsageError(f"--match {match} compares equal steps. Give --steps.")
        if "train.eval_every" not in chosen:
            every = max(1, config.train.steps // VALIDATIONS) if match != "time" else EVERY
            config = replace(config, train=replace(config.train, eval_every=every))
        if found and match != "steps":
            config = _as_large(found[0].config, config, name, vocab_size)
        found.append(Entry(name, config, parameter_count(blueprint(config, vocab_size))))
    if len({entry.file_name for entry in found}) < len(found):
        raise UsageError(
            f"--cells {','.join(names)}: two of them need the same file names. Rename one."
        )
    return found


def _owner(key: str) -> str | None:
    """The cell that an option belongs to, as lem in cell.lem.dt; None where it is of all."""
    section, *rest = key.split(".")
    return rest[0] if section == "cell" and len(rest) > 1 else None


def _as_large(first: Config, config: Config, name: str, vocab_size: int) -> Config:
    """The configuration with the width whose parameters come nearest to the first's."""
    wanted = parameter_count(blueprint(first, vocab_size))

    def sized(width: int) -> Config:
        return replace(config, model=replace(config.model, width=width))

    def count(width: int) -> int | None:
        try:
            return parameter_count(blueprint(sized(width), vocab_size))
        except UsageError:  # a width that does not divide into its heads
            return None

    def nearest(widths: Iterable[int]) -> tuple[int, int]:
        """How far the first width that can be is from the wanted, and that width."""
        found = ((abs(n - wanted), width) for width in widths if (n := count(width)) is not None)
        return next(found, (wanted, 0))

    low, high = 1, WIDEST
    while low < high:  # the narrowest that has as many
        middle = (low + high) // 2
        near = (count(width) for width in range(middle, high))
        have = next((n for n in near if n is not None), wanted)
        low, high = (middle + 1, high) if have < wanted else (low, middle)
    away, best = min(nearest(range(low, WIDEST)), nearest(range(low - 1, 0, -1)))
    if away > AT_MOST * wanted:
        raise UsageError(
            f"No width of {name} comes near the {wanted:,} parameters of the first cell. Choose "
            "another --width, or other options."
        )
    return sized(best)


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
    corpus: Corpus, found: Sequence[Entry], seeds: int, out: Path, split: str
) -> Iterator[Progress]:
    """Train every entry with every seed, and keep what it came to under `out`.

    What is there already of the same configuration, corpus and split is not trained again, and what
    was begun goes on.  Raises UsageError where another is there.
    """
    make_folder(out)
    turns = zip(*(entry.trainings(out, seeds) for entry in found), strict=True)
    order = [(entry, *one) for turn in turns for entry, one in zip(found, turn, strict=True)]
    for done, (entry, config, folder) in enumerate(order):
        seed, known_by = config.train.seed, _known_by(config, corpus, split)
        if _kept(folder, known_by) is None:
            for share in _trained(corpus, config, folder, split):
                yield Progress(entry.label, seed, share, done + share)
        yield Progress(entry.label, seed, 1.0, done + 1.0)


def _kept(folder: Path, known_by: dict[str, Any]) -> Outcome | None:
    path = folder.with_name(folder.name + ".json")
    if not path.is_file() or not runs.is_run(folder):
        return None
    found = read_json(path)
    if found.keys() != {field.name for field in fields(Outcome)}:
        raise InputError(f"{path} is damaged, or of another version of seqlm. Delete it.")
    outcome = Outcome(**found)
    if outcome.known_by != known_by:
        raise _another(path)
    return outcome


def _another(path: Path) -> UsageError:
    return UsageError(
        f"{path} is of another configuration, corpus or split. Compare into another place with "
        "--out, or delete it and its run."
    )


def _known_by(config: Config, corpus: Corpus, split: str) -> dict[str, Any]:
    """All that decides what a training comes to."""
    own = {"data.path": None, "data.fingerprint": corpus.fingerprint, "split": split}
    return json.loads(json.dumps({**config.flat(), **own, **hashes(config.cell.name)}))


def _trained(corpus: Corpus, config: Config, folder: Path, split: str) -> Iterator[float]:
    """Train in a process of its own; the share that is done."""
    # told by the closed connection that it is to end, it saves its step first
    process, ours = spawn(_work, str(corpus.path), config, str(folder), split, daemon=False)
    try:
        while isinstance(word := ours.recv(), float):
            yield word
    except EOFError:
        word = "its process ended without a word; was there enough memory?"
    finally:
        ours.close()
        process.join()
    if not isinstance(word, Outcome):
        kind = type(word) if isinstance(word, SeqlmError) else SeqlmError
        raise kind(f"{folder.name}: {word}")
    write_file(folder.with_name(folder.name + ".json"), json.dumps(asdict(word)) + "\n")


def _work(told: Connection, data: str, config: Config, folder: str, split: str) -> None:
    """The process of a training: shares of it, then its Outcome, or an error."""
    try:
        keep_memory()
        resume, corpus = runs.is_run(Path(folder)), open_corpus(Path(data))
        known_by = _known_by(config, corpus, split)
        given = {k: v for k, v in config.flat().items() if not k.startswith("data.")}
        setup = launch.start(data, run=folder, given=None if resume else given, resume=resume)
        if _known_by(setup.config, corpus, split) != known_by:
            raise _another(Path(folder))
        # what it hears is that the one who asked has gone
        for report in setup.reports(interrupted=told.poll):
            with suppress(BrokenPipeError):
                told.send(report.progress)
        if told.poll():
            return
        progress = setup.learner.progress
        run = api.read(folder, "best", setup.runtime, config.cell.name)
        with setup.runtime.active():
            decoded, state = _decoding(run.model)
            nats, accuracy, characters = _blocks(run, split)
        told.send(
            Outcome(
                known_by=known_by,
                params=parameter_count(run.model),
                steps=progress.step,
                seconds=progress.elapsed,
                chars=progress.chars,
                memory=peak_memory_bytes(setup.runtime.device.value),
                state=state,
                decoded=decoded,
                nats=nats,
                accuracy=accuracy,
                evaluated=characters,
            )
        )
    except (BrokenPipeError, EOFError):
        return  # the one who asked has gone
    except SeqlmError as error:
        told.send(error)


@torch.inference_mode()
def _decoding(model: LanguageModel) -> tuple[float, int]:
    """Characters a second, one at a time, and the bytes of the state."""
    token = torch.zeros(1, dtype=torch.long, device=model.embedding.weight.device)
    step = stepper(model)
    _, *state = step(token, *model.initial_state(1))
    seconds = []
    for _ in range(TURNS):
        began = perf_counter()
        for _ in range(DECODED):
            logits, *state = step(token, *state)
            token = logits.argmax(-1)
        token.item()  # which waits for a GPU
        seconds.append(perf_counter() - began)
    return DECODED / median(seconds), sum(s.numel() * s.element_size() for s in state)


def _blocks(run: api.Run, split: str) -> tuple[list[float], float, int]:
    """Nats of every block of the split, by protocol stream, its accuracy and its characters."""
    passage = passage_of_split(run.corpus(), split, run.tokenizer)
    size = max(1, min(BLOCK, len(passage.symbols) // LEAST))
    nats, correct = zip(*evaluate.blocks(run.model, passage, size), strict=True)
    return list(nats), sum(correct) / passage.tokens, passage.chars or passage.bytes


def results(corpus: Corpus, found: Sequence[Entry], seeds: int, out: Path, split: str) -> list[Row]:
    """The rows of a comparison that is complete, the best first."""
    outcomes = {
        entry.label: [
            _kept(folder, _known_by(config, corpus, split))
            for config, folder in entry.trainings(out, seeds)
        ]
        for entry in found
    }
    blocks = {label: np.mean([o.nats for o in own], axis=0) for label, own in outcomes.items()}
    best = min(blocks, key=lambda label: blocks[label].sum())
    rows = []
    for entry in found:
        own, model = outcomes[entry.label], entry.config.model
        bits = [sum(o.nats) / log(2) / o.evaluated for o in own]
        difference = (blocks[entry.label] - blocks[best]) / log(2) / own[0].evaluated
        told = entry.label != best and len(difference) >= LEAST
        low, high = interval(difference, len(found)) if told else (None, None)
        rows.append(
            Row(
                cell=entry.label,
                width=model.width,
                layers=model.layers,
                params=own[0].params,
                seeds=seeds,
                steps=round(fmean(o.steps for o in own)),
                seconds=fmean(o.seconds for o in own),
                bits_per_char=fmean(bits),
                spread=stdev(bits) if seeds > 1 else None,
                nats_per_char=fmean(bits) * log(2),
                accuracy=fmean(o.accuracy for o in own),
                chars_per_second=fmean(o.chars / o.seconds for o in own),
                decode_chars_per_second=fmean(o.decoded for o in own),
                peak_memory_bytes=max(o.memory for o in own),
                state_bytes=own[0].state,
                behind=float(difference.sum()),
                low=low,
                high=high,
            )
        )
    return sorted(rows, key=lambda row: row.bits_per_char)
