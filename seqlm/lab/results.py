"""Results that were measured, with what is needed to measure them again."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date as Date
from pathlib import Path
from shlex import quote
from statistics import mean, stdev
from typing import Any

from seqlm.config import as_typed, merge_settings
from seqlm.errors import InputError, unknown
from seqlm.progress import OnProgress, silent

FILE = Path(__file__).with_name("results.toml")
HEADINGS = (
    *("result", "text", "cell", "parameters", "training", "bits per char", "seeds"),
    *("published", "date"),
)
WITHIN = 2  # standard deviations between the mean of the seeds and a figure that agrees with it


@dataclass(frozen=True)
class SeedTraining:
    """One training of a result."""

    seed: int
    bits_per_char: float
    steps: int | None = None
    chars: int | None = None  # that training read


@dataclass(frozen=True)
class Published:
    """A figure of others, which was measured in another way."""

    bits_per_char: float
    source: str


@dataclass(frozen=True)
class Result:
    """A model's bits per character, the mean over one or more seeds."""

    name: str
    corpus: str
    split: str
    protocol: str
    flags: Mapping[str, Any]  # of `seqlm train`, without dashes
    params: int
    machine: str
    date: Date
    runs: Sequence[SeedTraining]
    set: Mapping[str, Any] = field(default_factory=dict)  # --set KEY=VALUE
    published: Published | None = None
    split_sha256: str | None = None  # None: it was not recorded

    @property
    def cell(self) -> str:
        return str(self.flags["cell"])

    @property
    def bits_per_char(self) -> float:
        return mean(run.bits_per_char for run in self.runs)

    @property
    def spread(self) -> float | None:
        """The standard deviation over the seeds; None for one seed."""
        return stdev(run.bits_per_char for run in self.runs) if len(self.runs) > 1 else None

    @property
    def command(self) -> str:
        """The training with the first seed."""
        flags = {**self.flags, "seed": self.runs[0].seed}
        parts = [f"--{name.replace('_', '-')} {quote(as_typed(x))}" for name, x in flags.items()]
        parts += [f"--set {quote(f'{key}={as_typed(x)}')}" for key, x in self.set.items()]
        return " ".join(["seqlm train --data", quote(self.corpus), *parts])

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "corpus": self.corpus,
            "split": self.split,
            "split_sha256": self.split_sha256,
            "protocol": self.protocol,
            "cell": self.cell,
            "command": self.command,
            "params": self.params,
            "bits_per_char": self.bits_per_char,
            "spread": self.spread,
            "runs": [vars(run) for run in self.runs],
            "machine": self.machine,
            "date": self.date.isoformat(),
            "published": None if self.published is None else vars(self.published),
        }


@dataclass(frozen=True)
class Again:
    """What training a result again has given."""

    run: str  # folder of the run
    seed: int
    bits_per_char: float
    difference: float  # from the mean of the result, in bits per character
    within: bool | None  # whether it is at most WITHIN standard deviations; None without a spread
    steps: int
    chars: int
    chars_before: int | None  # that the result's training with this seed read
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def row(result: Result) -> list[str]:
    """A result under HEADINGS."""
    published, spread = result.published, result.spread
    bits = f"{result.bits_per_char:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
    others = "-" if published is None else f"{published.bits_per_char:.3f}"
    text = f"{result.corpus}, {result.split}"
    limit = str(result.flags.get("time_limit") or f"{result.flags.get('steps', '-')} steps")
    seeds = str(len(result.runs))
    return [
        *(result.name, text, result.cell, f"{result.params:,}", limit, bits, seeds),
        *(others, result.date.isoformat()),
    ]


def read(file: Path = FILE) -> dict[str, Result]:
    """{name: result} of all results in a file."""
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    return {name: _result(name, table) for name, table in tables.items()}


def named(name: str) -> Result:
    """One result; UsageError for an unknown name."""
    known = read()
    if name not in known:
        raise unknown("result", name, known)
    return known[name]


def again(result: Result, run: str, tick: OnProgress = silent) -> Again:
    """Train the result with its first seed into a new run, and evaluate it as the result was.

    Raises InputError if the corpus has another text, UsageError if the run exists.
    """
    from seqlm import api
    from seqlm.runtime import keep_memory
    from seqlm.training import launch

    first = result.runs[0]
    settings = merge_settings(result.set, {**result.flags, "seed": first.seed})
    setup = launch.start([result.corpus], run=run, settings=settings, on_progress=tick)
    corpus = setup.trainer.corpus
    if result.split_sha256 not in (None, corpus.splits[result.split]["sha256"]):
        raise InputError(
            f"{corpus.path} has another {result.split} split than {result.name} was measured on. "
            f"Move it away, and prepare the known corpus: seqlm prepare {result.corpus}"
        )
    keep_memory()
    for report in setup.reports():
        tick(report.progress, f"step {report.step:,} {report.bits_per_char:.4f}")
    trained = api.read(setup.run, "best", setup.runtime, result.cell)
    figures = trained.evaluate(data=corpus, split=result.split, protocol=result.protocol, tick=tick)
    progress, bits = setup.trainer.progress, figures["bits_per_char"]
    difference = bits - result.bits_per_char
    return Again(
        run=str(setup.run),
        seed=first.seed,
        bits_per_char=bits,
        difference=difference,
        within=None if result.spread is None else abs(difference) <= WITHIN * result.spread,
        steps=progress.step,
        chars=progress.chars,
        chars_before=first.chars,
        seconds=progress.elapsed,
    )


def _result(name: str, table: Mapping[str, Any]) -> Result:
    published = table.get("published")
    given = {
        "runs": [SeedTraining(**run) for run in table["runs"]],
        "published": None if published is None else Published(**published),
    }
    return Result(name=name, **{**table, **given})
