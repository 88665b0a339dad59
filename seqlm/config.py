"""The configuration of a run: frozen dataclasses <-> TOML, and the order in which sources win.

preset < file < --set and flags.  Knows nothing of torch: what the options of a cell are is the
cell's own business (seqlm/cells), so they travel here as plain values.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from math import inf
from pathlib import Path
from typing import Any, cast

import tomli_w

from seqlm.errors import InputError, UsageError, unknown
from seqlm.files import read_small

PRESETS = Path(__file__).parent / "presets"
LARGEST = 2**63
# keys that configurations of older versions have, with the values that change nothing today
REMOVED = {"runtime.compile": ("auto", "on", "off"), "cell.lem.heads": (1,)}
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
FLAGS = {  # the options that have a name of their own on the command line, and their keys
    "cell": "cell.name",
    "width": "model.width",
    "layers": "model.layers",
    "dropout": "model.dropout",
    "lr": "optim.lr",
    "batch": "train.batch",
    "length": "train.length",
    "steps": "train.steps",
    "time_limit": "train.time_limit",
    "state": "train.state",
    "seed": "train.seed",
    "init_from": "train.init_from",
    "device": "runtime.device",
    "dtype": "runtime.dtype",
    "threads": "runtime.threads",
}


def seconds(text: str | float) -> float:
    """'90', '90s', '5m' or '2h' in seconds."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        return float(text) if abs(text) < LARGEST else inf
    if not isinstance(text, str):
        raise UsageError(f"{text!r} is not a duration. Write 90s, 5m or 2h.")
    number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS else (text, "s")
    try:
        return float(number) * UNITS[unit]
    except ValueError:
        raise UsageError(
            f"'{text}' is not a duration. Write seconds, minutes or hours: 90s, 5m, 2h."
        ) from None


def knob(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Sequence[str] = (),
    parse: Callable[[Any], Any] | None = None,
) -> Any:
    """A field with its meaning and its legal values: low <= value <= high, value > above."""
    metadata = dict(doc=doc, low=low, high=high, above=above, choices=choices, parse=parse)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataConfig:
    path: str = knob("", "Folder of the prepared corpus.")
    fingerprint: str = knob("", "Hash of the corpus' manifest, which shows its changes.")


@dataclass(frozen=True)
class ModelConfig:
    width: int = knob(256, "Width of the layers: the size of each vector.", low=1, high=65536)
    layers: int = knob(4, "Number of layers.", low=1, high=1024)
    mlp: float = knob(
        4.0, "Hidden width of the MLP, as a multiple of the width; 0: no MLP.", low=0, high=64
    )
    activation: str = knob("gelu", "Activation function of the MLP.", choices=("gelu", "swiglu"))
    conv: int = knob(0, "Length of the causal convolution, in symbols; 0: none.", low=0, high=4096)
    dropout: float = knob(0.0, "Dropout probability.", low=0, high=0.95)
    tie: bool = knob(False, "Use the embedding's weights in the output layer, too.")


@dataclass(frozen=True)
class CellConfig:
    """The cell, or several, separated by commas, which take turns over the layers.

    options: as in the TOML table: {option: value} for every cell of the stack, {cell: {option:
    value}} for one of them.
    """

    name: str = "mingru"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimConfig:
    lr: float = knob(3e-3, "Peak learning rate.", above=0)
    beta1: float = knob(0.9, "AdamW: decay of the mean of the gradients.", low=0, high=0.9999)
    beta2: float = knob(0.95, "AdamW: decay of the mean of their squares.", low=0, high=0.99999)
    weight_decay: float = knob(0.1, "AdamW: weight decay, of matrices only.", low=0)
    schedule: str = knob(
        "cosine", "Learning rate after the warmup.", choices=("cosine", "constant")
    )
    warmup: int = knob(
        100, "Steps in which the learning rate rises from 0; at most a tenth of all.", low=0
    )
    clip: float = knob(1.0, "Largest norm of the gradients; 0: no limit.", low=0)


@dataclass(frozen=True)
class TrainConfig:
    seed: int = knob(
        0, "Random seed of the initial weights, the batches and dropout.", low=0, high=2**31 - 1
    )
    batch: int = knob(16, "Sequences in a training step, over all processes.", low=1)
    length: int = knob(256, "Length of the training sequences, in symbols.", low=1)
    accumulate: int = knob(1, "Parts that a step is computed in, to save memory.", low=1)
    steps: int = knob(1000, "Number of training steps; 0: until the time limit.", low=0)
    time_limit: float = knob(
        0.0, "Training time, such as 90s, 5m or 2h; 0: until the last step.", low=0, parse=seconds
    )
    state: str = knob(
        "carry",
        "Initial state of a sequence: the last state of the sequence before it (carry), or a fresh "
        "state (reset).",
        choices=("carry", "reset"),
    )
    eval_every: int = knob(250, "Steps between validations; 0: only at the end.", low=0)
    save_every: int = knob(250, "Steps between saves; 0: only at the end.", low=0)
    sample_every: int = knob(0, "Steps between samples of text; 0: none.", low=0)
    early_stop: int = knob(
        0, "Validations without a new best before training stops; 0: never.", low=0
    )
    keep: int = knob(2, "Newest saved steps to keep, besides the best.", low=2)
    init_from: str = knob("", "Run whose best weights are the initial weights.")


@dataclass(frozen=True)
class RuntimeConfig:
    device: str = knob("auto", "Device to compute on.", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = knob(
        "auto",
        "Data type of the matrix products.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    backend: str = knob(
        "auto",
        "Implementation of the scans.",
        choices=("auto", "cpu", "triton", "torch", "reference"),
    )
    threads: int = knob(0, "Number of CPU threads; 0: all cores.", low=0)
    graphs: str = knob("auto", "Steps as CUDA graphs, on a GPU.", choices=("auto", "off"))


@dataclass(frozen=True)
class Config:
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    cell: CellConfig = CellConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    def flat(self) -> dict[str, Any]:
        """Every value under its `section.name` key; cell options as `cell.[name.]option`."""
        rows: dict[str, Any] = {}
        for section in fields(self):
            part = getattr(self, section.name)
            tree = {"name": part.name, **part.options} if section.name == "cell" else asdict(part)
            rows |= _flatten(tree, section.name)
        return rows

    def updated(self, values: Mapping[str, Any]) -> "Config":
        """A copy with the flat `values` put in; unknown keys and values out of range are errors."""
        parts = {section.name: getattr(self, section.name) for section in fields(self)}
        # an option of one cell, cell.lem.dt, wins over that of all, cell.dt, given with it
        for key, value in sorted(values.items(), key=lambda pair: pair[0].count(".")):
            section, _, name = key.partition(".")
            if section == "cell" and name:
                parts["cell"] = _with_cell(parts["cell"], name, value)
                continue
            known = {f.name: f for f in fields(parts[section])} if section in parts else {}
            if name not in known:
                raise unknown("configuration key", key, self._keys(), remedy="See --print-config")
            parts[section] = replace(parts[section], **{name: checked(key, value, known[name])})
        return replace(self, **parts)

    def continued(self, values: Mapping[str, Any]) -> "Config":
        """`updated`, where a new length of training takes the place of the old."""
        return self.updated(_length_of_training(values))

    def _keys(self) -> list[str]:
        return [*self.flat(), "cell.<option>"]

    def tree(self) -> dict[str, Any]:
        """The tables of the TOML file."""
        tree: dict[str, Any] = {}
        for section in fields(self):
            part = getattr(self, section.name)
            if section.name == "cell":
                tree["cell"] = {"name": part.name, **part.options}
            else:
                tree[section.name] = asdict(part)
        return tree

    def toml(self) -> str:
        return tomli_w.dumps(self.tree())


def _flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}.{name}"
        rows |= _flatten(value, key) if isinstance(value, Mapping) else {key: value}
    return rows


def _with_cell(cell: CellConfig, name: str, value: Any) -> CellConfig:
    if name == "name":
        if not isinstance(value, str) or not value:
            raise UsageError(f"cell.name is {value!r}; it must name a cell. See: seqlm cells.")
        return replace(cell, name=value)
    options = dict(cell.options)
    owner, _, option = name.rpartition(".")
    if owner:
        if not isinstance(options.get(owner, {}), Mapping):
            raise UsageError(f"cell.{owner} is both a value and a table. Keep one of the two.")
        options[owner] = {**options.get(owner, {}), option: value}
    else:  # of all cells: it takes the place of what was said of one before
        for owner, own in options.items():
            if isinstance(own, Mapping):
                options[owner] = {key: old for key, old in own.items() if key != option}
        options[option] = value
    return replace(cell, options=options)


def checked(key: str, value: Any, rule: Field[Any]) -> Any:
    """`value` as the field's type, within its limits; UsageError says what is legal."""
    limits = rule.metadata
    if limits["parse"]:
        value = limits["parse"](value)
    value = as_type(key, value, cast(type, rule.type))
    if limits["choices"] and value not in limits["choices"]:
        raise UsageError(f"{key} is '{value}'; it must be one of: {', '.join(limits['choices'])}.")
    low, high, above = limits["low"], limits["high"], limits["above"]
    if low is not None and not value >= low:
        raise UsageError(f"{key} is {value}; it must be at least {low}.")
    if above is not None and not value > above:
        raise UsageError(f"{key} is {value}; it must be greater than {above}.")
    if high is not None and not value <= high:
        raise UsageError(f"{key} is {value}; it must be at most {high}.")
    return value


def as_type(key: str, value: Any, kind: type) -> Any:
    """`value` if it is of the type int, float, bool or str; whole numbers pass as float."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < LARGEST else inf
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise UsageError(f"{key} is {value!r}; it must be {names[kind]}.")
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and not abs(value) < (LARGEST if kind is int else inf)
    ):
        raise UsageError(f"{key} is {value}; it must be a finite number.")
    return value


def parse_assignment(text: str) -> tuple[str, Any]:
    """'key=value' of --set: the value as TOML would read it, else as bare text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {text}: write it as key=value, such as --set model.width=256.")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        return key, value


def gathered(
    assigned: Mapping[str, Any], flags: Mapping[str, Any], dashes: str = ""
) -> dict[str, Any]:
    """{key: value} of settings given by key, as by --set, and by the names in FLAGS.

    A flag that is None was not given; one that is not in FLAGS is no setting.  Raises UsageError
    for a flag's value out of range, and where a setting is given twice with different values; both
    name the flag as it was typed, with `dashes` before it.
    """
    if "data.fingerprint" in assigned:
        raise UsageError("data.fingerprint is computed from the corpus. Do not set it.")
    given = dict(assigned)
    for name, value in flags.items():
        if value is None or name not in FLAGS:
            continue
        key, typed = FLAGS[name], dashes + (name.replace("_", "-") if dashes else name)
        value = _legal(key, value, typed)
        if key in assigned and _legal(key, assigned[key], key) != value:
            raise UsageError(f"{typed} is {value} and {key} is {assigned[key]}. Keep one of them.")
        given[key] = value
    return given


def _legal(key: str, value: Any, shown: str) -> Any:
    """The value of a key, checked; a cell's name is checked later, with its options."""
    known = rule(key)
    return checked(shown, value, known) if known.metadata else value


def rule(key: str) -> Field[Any]:
    """The field of a key such as model.width, with its meaning and its legal values."""
    section, _, name = key.partition(".")
    return next(one for one in fields(getattr(Config(), section)) if one.name == name)


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_toml(path: Path) -> dict[str, Any]:
    """The flat `section.name` values of a TOML file, without keys that an older version wrote."""
    try:
        tree = tomllib.loads(read_small(path).decode("utf-8"))
        rows = [_rows(name, part) for name, part in tree.items()]
    except ValueError as error:  # not UTF-8, not TOML, or a number of thousands of digits
        raise InputError(f"{path} is not valid TOML: {error}. Correct the file.") from error
    except RecursionError:
        raise InputError(f"{path} is not valid: it is nested too deep. Correct the file.") from None
    flat = {key: value for part in rows for key, value in part.items()}
    return {key: value for key, value in flat.items() if value not in REMOVED.get(key, ())}


def _rows(name: str, part: Any) -> dict[str, Any]:
    return _flatten(part, name) if isinstance(part, Mapping) else {name: part}


def stack(name: str) -> list[str]:
    """The cells a `cell.name` lists: 'mingru,mingru,lem' -> ['mingru', 'mingru', 'lem']."""
    return [part.strip() for part in name.split(",")]


def cell_files(name: str) -> list[str]:
    """The researcher's own files among the cells that a `cell.name` lists."""
    return [cell for cell in stack(name) if cell.endswith(".py")]


def cell_key(name: str) -> str:
    """The key that the options of a cell stand under: a file's is its stem."""
    return Path(name).stem if name.endswith(".py") else name


def resolve(
    preset: str = "small",
    file: Path | None = None,
    given: Mapping[str, Any] | None = None,
    under: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration that a preset, a file and `given` (--set and flags) make together.

    under: values that win over the preset alone.
    """
    if preset not in presets():
        raise unknown("preset", preset, presets())
    layers = [read_toml(PRESETS / f"{preset}.toml"), under or {}]
    layers += [read_toml(file) if file else {}, given or {}]
    name = next(layer["cell.name"] for layer in reversed(layers) if "cell.name" in layer)
    layers[0] = _of_stack(layers[0], stack(name) if isinstance(name, str) else [])
    config = Config()
    for layer in layers:
        config = config.continued(layer)
    return config


def _of_stack(preset: Mapping[str, Any], cells: list[str]) -> dict[str, Any]:
    """What a preset says to a stack of cells.

    It has options for every cell, and those of others fall away; what stands under `when.CELL`
    takes the place of the rest where the stack is of that cell alone.
    """
    used = {cell_key(cell) for cell in cells}
    values: dict[str, Any] = {}
    instead: dict[str, Any] = {}
    for key, value in preset.items():
        section, owner, *rest = key.split(".")
        if section == "when":
            instead |= {".".join(rest): value} if used == {owner} else {}
        elif section != "cell" or not rest or owner in used:
            values[key] = value
    return values | instead


def _length_of_training(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Steps and time limit replace each other: the source that speaks last decides."""
    steps, limit = layer.get("train.steps"), layer.get("train.time_limit")
    if steps and limit and seconds(limit):
        raise UsageError("Both steps and a time limit are given. Choose --steps or --time-limit.")
    if steps:
        return {**layer, "train.time_limit": 0.0}
    if limit and seconds(limit):
        return {**layer, "train.steps": 0}
    return dict(layer)


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """{key: (old value, new value)} for every key that differs."""
    before, after = old.flat(), new.flat()
    keys = {**before, **after}
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}
