"""What `seqlm compare` compares: cells and stacks, with models of equal size."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seqlm.config import Config, cell_key, parse_assignment, read_toml
from seqlm.errors import UsageError, unknown
from seqlm.model import blueprint, parameter_count
from seqlm.training import launch

MATCHES = ("params", "time", "steps")
SIZE_TOLERANCE = 0.2  # of the first entry's parameters; the sizes of narrow models lie far apart
MAX_WIDTH = 8192
OWN = ("model", "optim")  # sections whose settings an entry may have for itself
SHARED = ("data", "train", "runtime")  # sections whose settings are the same for all entries
VALIDATIONS = 20  # in a training with a given number of steps
EVAL_EVERY = 50  # steps between validations under a time limit


@dataclass(frozen=True)
class Entry:
    """One cell or stack to compare, with its options."""

    label: str  # as the user wrote it
    config: Config  # complete; has the seed of the first training
    params: int

    @property
    def file_name(self) -> str:
        """The label as the name of a file that is not hidden: ./ema.py becomes ema.py."""
        return re.sub("[^A-Za-z0-9.=_-]+", "-", self.label).lstrip(".-")

    def trainings(self, out: Path, seeds: int) -> list[tuple[Config, Path]]:
        """The configuration and the run folder of each seed."""
        name, first = self.file_name, self.config.train
        seeded = [replace(first, seed=first.seed + i) for i in range(seeds)]
        return [(replace(self.config, train=t), out / f"{name}-s{t.seed}") for t in seeded]


def entries(
    names: Sequence[str],
    match: str,
    preset: str | None = None,
    file: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    vocab_size: int = 1,
) -> list[Entry]:
    """Parse what to compare.  A name is CELL, or CELL+CELL+CELL for a stack, then :KEY=VALUE.

    KEY is an option of the cell, or a setting of the model or the optimizer, such as model.conv.
    The first entry has the configured width.  The others get the width whose number of parameters
    is nearest to the first's, unless match is "steps"; from width 100 on the difference is within
    1 %.  Raises UsageError when no width comes near.
    """
    if match not in MATCHES:
        raise unknown("match", match, MATCHES)
    if len(set(names)) < len(names) or not names:
        raise UsageError(f"--cells {','.join(names)}: give at least one cell, and each only once.")
    settings = dict(settings or {})
    chosen = {*settings, *(read_toml(file) if file else ())}
    stacks = [[cell_key(cell) for cell in name.split(":")[0].split("+")] for name in names]
    for key in settings:
        owner = _owner(key)
        if owner and not any(owner in cells for cells in stacks):
            raise UsageError(f"{key} is set, but {owner} is not compared. Add it to --cells.")
    found: list[Entry] = []
    for name, cells in zip(names, stacks, strict=True):
        own = {key: value for key, value in settings.items() if _owner(key) in (None, *cells)}
        config = _configuration(name, match, preset, file, own)
        if "train.eval_every" not in chosen:
            every = max(1, config.train.steps // VALIDATIONS) if match != "time" else EVAL_EVERY
            config = replace(config, train=replace(config.train, eval_every=every))
        if found and match != "steps":
            config = _with_equal_size(found[0].params, config, name, vocab_size)
        found.append(Entry(name, config, parameter_count(blueprint(config, vocab_size))))
    if len({entry.file_name for entry in found}) < len(found):
        raise UsageError(
            f"--cells {','.join(names)}: two cells would have the same file names. Rename one."
        )
    return found


def _configuration(
    name: str, match: str, preset: str | None, file: Path | None, settings: Mapping[str, Any]
) -> Config:
    """The complete configuration of one entry, before its width is matched."""
    cell, *options = name.split(":")
    own = dict(settings) | dict(_own_setting(name, option, match) for option in options)
    own["cell.name"] = cell.replace("+", ",")
    config, _ = launch.configuration(preset, file, own)
    if match == "time" and not config.train.time_limit:
        raise UsageError("--match time compares equal times. Give --time-limit.")
    if match != "time" and config.train.time_limit:
        raise UsageError(f"--match {match} compares equal steps. Give --steps, not a time limit.")
    return config


def _own_setting(name: str, option: str, match: str) -> tuple[str, Any]:
    """A key and its value, from model.conv=4, optim.lr=0.01, or an option of the cell.

    Raises UsageError for a setting that is the same for all entries.
    """
    key, _, value = option.partition("=")
    section = key.split(".")[0] if "." in key else ""
    if section in SHARED:
        raise UsageError(
            f"{name}: {key} cannot differ between the entries, because all have the same text, "
            f"batches and computation. Set it for all: --set {key}={value}."
        )
    if key == "model.width" and match != "steps":
        raise UsageError(
            f"{name}: the width follows from the number of parameters. Give the width of the first "
            "entry with --width, or choose --match steps."
        )
    return parse_assignment(option if section in OWN else f"cell.{option}")


def _owner(key: str) -> str | None:
    """The cell that a setting belongs to, such as lem for cell.lem.dt; None if to all cells."""
    section, *rest = key.split(".")
    return rest[0] if section == "cell" and len(rest) > 1 else None


def _with_equal_size(target: int, config: Config, name: str, vocab_size: int) -> Config:
    """The configuration, with the width whose number of parameters is nearest to `target`."""

    def with_width(width: int) -> Config:
        return replace(config, model=replace(config.model, width=width))

    def sizes(widths: Iterable[int]) -> Iterator[tuple[int, int]]:
        """(parameters, width) for each width that the cell allows."""
        for width in widths:
            with suppress(UsageError):  # a cell with heads refuses widths that they do not divide
                yield parameter_count(blueprint(with_width(width), vocab_size)), width

    def at_least(width: int) -> int:
        """The parameters of the narrowest allowed model from this width on."""
        return next(sizes(range(width, MAX_WIDTH)), (target, width))[0]

    # the number of parameters grows with the width, so bisection finds where it reaches the target
    reached = 1 + bisect_left(range(1, MAX_WIDTH), target, key=at_least)
    below, above = sizes(range(reached - 1, 0, -1)), sizes(range(reached, MAX_WIDTH))
    nearest = [size for size in (next(below, None), next(above, None)) if size is not None]
    params, width = min(nearest, key=lambda size: abs(size[0] - target), default=(0, 0))
    if abs(params - target) > SIZE_TOLERANCE * target:
        raise UsageError(
            f"No width of {name} gives about {target:,} parameters, as the first cell has. Choose "
            "another --width, or other options."
        )
    return with_width(width)
