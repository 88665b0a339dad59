"""The options that several commands share, in groups.

A group is a dataclass whose fields are options.  A command takes a group as one parameter:
`_app.command` makes an option of each field, and gives the command the filled dataclass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seqlm.cells import names as cell_names
from seqlm.cli import _complete
from seqlm.config import (
    FLAGS,
    Config,
    cell_files,
    merge_settings,
    parse_assignment,
    presets,
    rule,
    seconds,
)
from seqlm.errors import UsageError

if TYPE_CHECKING:
    from seqlm.run import Run
    from seqlm.runtime import Runtime
    from seqlm.ui import Screen

RUN, MODEL, TRAINING, COMPUTING = "Run", "Model", "Training", "Computing"  # panels of --help
OUTPUT = "Output and help"
PANELS = {"model": MODEL, "optim": TRAINING, "train": TRAINING, "runtime": COMPUTING}
CELLS = ", ".join(cell_names())
SETTING = ", such as runtime.backend=torch. List: seqlm train --print-config."  # of --set


def flag(doc: str, panel: str, metavar: str, *names: str) -> Any:
    """An option with a value, such as FILE or a|b|c; names: only where the parameter's differs."""
    complete = _complete.of_kind(metavar)
    return typer.Option(
        *names, help=doc, rich_help_panel=panel, metavar=metavar, autocompletion=complete
    )


def switch(doc: str, panel: str, *names: str) -> Any:
    """An option without a value."""
    return typer.Option(*names, help=doc, rich_help_panel=panel)


def argument(doc: str, metavar: str, complete: _complete.Completer | None = None) -> Any:
    """An argument.  complete: what the shell offers; default: what suits the metavar."""
    complete = complete or _complete.of_kind(metavar)
    return typer.Argument(metavar=metavar, help=doc, autocompletion=complete)


def setting(name: str, metavar: str = "N") -> Any:
    """The option of a setting in FLAGS; its help and its choices come from config.py."""
    known, panel = rule(FLAGS[name]).metadata, PANELS[FLAGS[name].partition(".")[0]]
    return flag(known["doc"], panel, "|".join(known["choices"]) or metavar)


Data = Annotated[
    str | None,
    flag("Prepared corpus: a path, or a name in data/. Default: the run's own.", RUN, "CORPUS"),
]
TrainingData = Annotated[
    str | None,
    flag(
        "Prepared corpus (a path, or a name in data/), or text to train on (a file or a folder). "
        "Default: the corpus prepared last.",
        RUN,
        "CORPUS|FILE",
    ),
]
CellName = Annotated[
    str | None,
    flag(
        f"The recurrent cell: {CELLS}; or your own file, ./NAME.py. With several cells, separated "
        "by commas, the layers take them in turn. Default: that of the preset.",
        MODEL,
        "CELL",
    ),
]


Dynamic = Annotated[
    bool,
    switch("Also learn from the text, each segment after it was scored.", RUN, "--dynamic"),
]
OnUnknown = Annotated[
    str, flag("Stop at an unknown character, or skip and count it.", RUN, "error|skip")
]
DynamicLr = Annotated[
    float | None, flag("With --dynamic: the learning rate. Default: 0.0002.", RUN, "RATE")
]


def learning_rate(dynamic: bool, lr: float | None) -> float | None:
    """The learning rate of the protocol dynamic; None without --dynamic."""
    if lr is not None and not dynamic:
        raise UsageError(f"--dynamic-lr {lr:g} has an effect only with --dynamic. Add --dynamic.")
    if not dynamic:
        return None

    from seqlm.evaluation.dynamic import LR

    return LR if lr is None else lr


def assignments(texts: Sequence[str] | None) -> dict[str, Any]:
    """{key: value} of every --set; UsageError for a key with two different values."""
    found: dict[str, Any] = {}
    for key, value in map(parse_assignment, texts or ()):
        if found.get(key, value) != value:
            raise UsageError(f"--set gives {key} twice: {found[key]} and {value}. Keep one.")
        found[key] = value
    return found


def temperatures(text: str) -> tuple[float, ...]:
    """The value of --temperature: one number, or several separated by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--temperature {text}: it must be a number from 0 (greedy) to 100, or several, "
            "separated by commas."
        ) from None


@dataclass(frozen=True)
class Reading:
    """The options of a command that reads a run."""

    run: Annotated[
        str | None,
        flag("Run to read: a path, or a name in checkpoints/. Default: the newest.", RUN, "RUN"),
    ] = None
    step: Annotated[str, flag("Saved step to read.", RUN, "best|last|N")] = "best"
    cell: Annotated[str | None, flag("File of the cell, if it is your own.", RUN, "FILE")] = None
    device: Annotated[str | None, setting("device")] = None
    threads: Annotated[int | None, setting("threads")] = None
    set: Annotated[
        list[str] | None,
        flag(f"A runtime setting{SETTING}", COMPUTING, "runtime.KEY=VALUE"),
    ] = None

    def runtime(self, dtype: bool = False) -> "Runtime":
        """Pick the runtime for --set, --device and --threads, for this command only.

        dtype: whether runtime.dtype has an effect in this command.  Raises UsageError for every
        key that is not a runtime key, because the rest of a run's configuration is fixed.
        """
        assigned = assignments(self.set)
        for key in assigned:
            if not key.startswith("runtime."):
                raise UsageError(
                    f"--set {key}: the model and the data of a run are fixed, so this command only "
                    "takes runtime.KEY=VALUE. Remove it."
                )
        given = merge_settings(assigned, {"device": self.device, "threads": self.threads}, "--")
        if "runtime.dtype" in given and not dtype:
            raise UsageError(
                "--set runtime.dtype has no effect here: this command computes in float32. Remove "
                "it."
            )
        wanted = Config().updated(given).runtime

        from seqlm.runtime import Runtime

        return Runtime.pick(wanted)

    def load(self, screen: "Screen") -> "Run":
        """Load the run, and show its warnings on the screen."""
        return self.load_all(screen, (), "")[0]

    def load_all(self, screen: "Screen", others: Sequence[str], option: str) -> list["Run"]:
        """Load the run, and then the best steps of others, which an option names.

        --cell counts for those that were trained with a file.
        """
        runtime = self.runtime()

        from seqlm import api
        from seqlm.store import runs

        steps = [(self.run, self.step)]
        steps += [(str(runs.find(other, option)), "best") for other in others]
        found = [api.read(run, step, runtime, self.cell, self.weights()) for run, step in steps]
        api.refuse_cell_without_effect(self.cell, *found)
        for run in found:
            screen.warn(*run.warnings)
        return found

    def weights(self) -> str:
        """The dtype that the matrices are rounded to."""
        return "float32"


@dataclass(frozen=True)
class Rounding(Reading):
    """The options of a command that reads a run, and may round its weights."""

    dtype: Annotated[
        str,
        flag(
            "bfloat16: round the matrices; generation on a CPU is then faster.",
            COMPUTING,
            "float32|bfloat16",
        ),
    ] = "float32"

    def weights(self) -> str:
        return self.dtype


@dataclass(frozen=True)
class Setup:
    """The options of a command that builds and trains a model, if only to time it."""

    width: Annotated[int | None, setting("width")] = None
    layers: Annotated[int | None, setting("layers")] = None
    batch: Annotated[int | None, setting("batch")] = None
    length: Annotated[int | None, setting("length")] = None
    device: Annotated[str | None, setting("device")] = None
    dtype: Annotated[str | None, setting("dtype")] = None
    threads: Annotated[int | None, setting("threads")] = None
    set: Annotated[list[str] | None, flag(f"A setting{SETTING}", TRAINING, "KEY=VALUE")] = None

    def given(self, **others: Any) -> dict[str, Any]:
        """{key: value} of --set, of these options, and of `others` by option names."""
        return merge_settings(assignments(self.set), {**vars(self), **others}, "--")


@dataclass(frozen=True)
class TrainingOptions(Setup):
    """The options of a command that trains models and keeps them."""

    preset: Annotated[
        str | None, flag(f"Preset: {', '.join(presets())}. Default: small.", MODEL, "PRESET")
    ] = None
    config: Annotated[
        Path | None, flag("TOML file with settings; overrides --preset.", MODEL, "FILE")
    ] = None
    dropout: Annotated[float | None, setting("dropout", "P")] = None
    steps: Annotated[int | None, setting("steps")] = None
    time_limit: Annotated[str | None, setting("time_limit", "TIME")] = None
    lr: Annotated[float | None, setting("lr", "RATE")] = None
    state: Annotated[str | None, setting("state")] = None
    seed: Annotated[int | None, setting("seed")] = None

    def given(self, **others: Any) -> dict[str, Any]:
        if self.time_limit is not None and not seconds(self.time_limit):
            raise UsageError(
                f"--time-limit {self.time_limit} leaves no time to train. Give 90s, 5m or 2h, or "
                "remove it and give --steps."
            )
        return super().given(**others)


def named_run(run: Path, cell: str | None) -> str:
    """The options that name a run in a hint; a cell file has to be named, too."""
    own = f" --cell {quote(cell)}" if cell and cell_files(cell) else ""
    return f"--run {quote(str(run))}{own}"
