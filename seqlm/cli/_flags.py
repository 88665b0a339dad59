"""The flags that several commands share, in groups.

A group is a dataclass whose fields are flags.  A command takes a group as one parameter (`_app.py`
turns the fields into options of the command, and back).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seqlm.cells import names as cell_names
from seqlm.cli import _complete
from seqlm.cli._complete import Completer
from seqlm.config import Config, cell_files, gathered, parse_assignment, presets, seconds
from seqlm.errors import UsageError

if TYPE_CHECKING:
    from seqlm.api import Run
    from seqlm.runtime import Runtime
    from seqlm.ui import Screen

RUN, MODEL, TRAINING, COMPUTING = "Run", "Model", "Training", "Computing"  # panels of --help
OUTPUT = "Output and help"
CELLS = ", ".join(cell_names())


def flag(
    doc: str, panel: str, metavar: str, complete: Completer | None = None, name: str | None = None
) -> Any:
    """An option with a value, in a panel of --help; `name` if it is not the parameter's."""
    names = () if name is None else (name,)
    return typer.Option(
        *names, help=doc, rich_help_panel=panel, metavar=metavar, autocompletion=complete
    )


def choice(doc: str, panel: str, *names: str) -> Any:
    """An option whose value is one of the names."""
    return flag(doc, panel, "|".join(names), _complete.one_of(*names))


def switch(doc: str, panel: str, *names: str) -> Any:
    """An option without a value."""
    return typer.Option(*names, help=doc, rich_help_panel=panel)


Data = Annotated[
    str | None,
    flag("A prepared corpus: a path, or a name in data/.", RUN, "DIR", _complete.corpora),
]
TrainingData = Annotated[
    str | None,
    flag(
        "What to train on: a corpus, by its path or its name in data/, or a file or folder of "
        "text; the corpus prepared last by default.",
        RUN,
        "DIR|FILE",
        _complete.corpora,
    ),
]
Device = Annotated[str | None, choice("Where to compute.", COMPUTING, "auto", "cuda", "mps", "cpu")]
Threads = Annotated[
    int | None, flag("CPU threads; 0, the default, takes all cores.", COMPUTING, "N")
]
CellName = Annotated[
    str | None,
    flag(
        f"One of {CELLS}; several, separated by commas, take turns over the layers; or your own "
        "file, ./NAME.py.",
        MODEL,
        "NAME",
        _complete.cells,
    ),
]


def assignments(texts: Sequence[str] | None) -> dict[str, Any]:
    """{key: value} of every --set; UsageError for a key with two different values."""
    found: dict[str, Any] = {}
    for key, value in map(parse_assignment, texts or ()):
        if found.get(key, value) != value:
            raise UsageError(f"--set gives {key} twice: {found[key]} and {value}. Keep one.")
        found[key] = value
    return found


@dataclass(frozen=True)
class Reading:
    """The flags of a command that reads a run."""

    run: Annotated[
        str | None,
        flag(
            "The run to read: a path, or a name in checkpoints/; the newest by default.",
            RUN,
            "DIR",
            _complete.runs,
        ),
    ] = None
    step: Annotated[
        str, flag("Which saved step of the run to read.", RUN, "best|last|N", _complete.steps)
    ] = "best"
    cell: Annotated[
        str | None,
        flag("The file of the cell, for a run of your own cell.", RUN, "FILE.py", _complete.files),
    ] = None
    device: Device = None
    threads: Threads = None
    set: Annotated[
        list[str] | None,
        flag(
            "How to compute, such as runtime.backend=torch.",
            COMPUTING,
            "runtime.KEY=VALUE",
            _complete.runtime_settings,
        ),
    ] = None

    def runtime(self, dtype: bool = False) -> "Runtime":
        """Pick the runtime that --set, --device and --threads ask for, for this command alone.

        dtype: whether runtime.dtype means something to the command.  Raises UsageError for other
        keys: the rest of a run's configuration is fixed.
        """
        assigned = assignments(self.set)
        for key in assigned:
            if not key.startswith("runtime."):
                raise UsageError(
                    f"--set {key}: a run keeps its model and its data, so this command only takes "
                    "runtime.KEY=VALUE. Leave it out."
                )
        given = gathered(assigned, {"device": self.device, "threads": self.threads}, "--")
        if "runtime.dtype" in given and not dtype:
            raise UsageError(
                "--set runtime.dtype has no effect here: this command computes in float32. Leave "
                "it out."
            )
        wanted = Config().updated(given).runtime

        from seqlm.runtime import Runtime

        return Runtime.pick(wanted)

    def load(self, screen: "Screen") -> "Run":
        """The run; what is wrong with it is a warning on the screen."""
        runtime = self.runtime()

        from seqlm import api

        run = api.read(self.run, self.step, runtime, self.cell)
        for warning in run.warnings:
            screen.warn(warning)
        return run


@dataclass(frozen=True)
class Setup:
    """The flags of a command that makes a model and trains it, if only to time it."""

    width: Annotated[int | None, flag("Numbers in the vector of a character.", MODEL, "N")] = None
    layers: Annotated[int | None, flag("Layers of the model.", MODEL, "N")] = None
    batch: Annotated[int | None, flag("Sequences in a step.", TRAINING, "N")] = None
    length: Annotated[int | None, flag("Characters in a sequence.", TRAINING, "N")] = None
    device: Device = None
    dtype: Annotated[
        str | None,
        choice(
            "Number type of the matrix products.",
            COMPUTING,
            *("auto", "float32", "bfloat16", "float16"),
        ),
    ] = None
    threads: Threads = None
    set: Annotated[
        list[str] | None,
        flag(
            "Any setting that seqlm train --print-config shows.",
            TRAINING,
            "KEY=VALUE",
            _complete.settings,
        ),
    ] = None

    def given(self, **others: Any) -> dict[str, Any]:
        """{key: value} of --set, of these flags, and of `others` by the names of their flags."""
        return gathered(assignments(self.set), {**vars(self), **others}, "--")


@dataclass(frozen=True)
class Learning(Setup):
    """The flags of a command that trains models to keep."""

    preset: Annotated[
        str | None,
        flag(
            f"A set of defaults: {', '.join(presets())}; small by default.",
            MODEL,
            "NAME",
            _complete.presets,
        ),
    ] = None
    config: Annotated[
        Path | None,
        flag("Settings from a TOML file; they win over --preset.", MODEL, "FILE", _complete.files),
    ] = None
    dropout: Annotated[
        float | None, flag("Share of activations set to 0 in training.", MODEL, "P")
    ] = None
    steps: Annotated[int | None, flag("Train for so many steps.", TRAINING, "N")] = None
    time_limit: Annotated[
        str | None, flag("Train for so long: 90s, 5m or 2h.", TRAINING, "TIME")
    ] = None
    lr: Annotated[float | None, flag("Largest learning rate.", TRAINING, "RATE")] = None
    state: Annotated[
        str | None,
        choice(
            "Start each sequence from the state that the one before it left, or from a fresh one.",
            TRAINING,
            *("carry", "reset"),
        ),
    ] = None
    seed: Annotated[
        int | None, flag("Seed of the first weights, the batches and dropout.", TRAINING, "N")
    ] = None

    def given(self, **others: Any) -> dict[str, Any]:
        if self.time_limit is not None and not seconds(self.time_limit):
            raise UsageError(
                f"--time-limit {self.time_limit} leaves no time to train. Write 90s, 5m or 2h, or "
                "leave it out and give --steps."
            )
        return super().given(**others)


def named_run(run: Path, cell: str | None) -> str:
    """The flags by which a hint names a run: --run, and --cell for a run of your own cell."""
    if cell is None or not cell_files(cell):
        return f"--run {quote(str(run))}"
    return f"--run {quote(str(run))} --cell {quote(cell)}"
