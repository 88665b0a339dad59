"""The configuration of a run: frozen dataclasses <-> TOML.

A file overrides the preset, and --set and flags override both.  This module does not import torch.
The options of a cell are plain values here; seqlm/cells knows and checks them.
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
# removed keys that old configurations contain, with the values that are safe to ignore; None: all
REMOVED: Mapping[str, tuple[Any, ...] | None] = {
    "runtime.compile": ("auto", "on", "off"),
    "cell.lem.heads": (1,),
    "train.sample_every": None,
}
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}  # seconds
FLAGS = {  # {flag of the command line: key of the configuration}
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
    number, unit = str(text), "s"
    if number[-1:] in UNITS:
        number, unit = number[:-1], number[-1]
    try:
        return float(number) * UNITS[unit]
    except ValueError:
        raise UsageError(
            f"{text!r} is not a duration. Write seconds, minutes or hours: 90s, 5m, 2h."
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
    """A field with its meaning and its limits: low <= value <= high, value > above."""
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
    tie: bool = knob(False, "Also use the embedding's weights in the output layer.")


@dataclass(frozen=True)
class CellConfig:
    """The cell of every layer.  Several names, separated by commas, are repeated over the layers.

    options: {option: value} for all cells, {cell: {option: value}} for one of them.
    """

    name: str = "mingru"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimConfig:
    lr: float = knob(3e-3, "Peak learning rate.", above=0)
    beta1: float = knob(0.9, "AdamW: decay of the mean of the gradients.", low=0, high=0.9999)
    beta2: float = knob(
        0.95, "AdamW: decay of the mean of the squared gradients.", low=0, high=0.99999
    )
    weight_decay: float = knob(0.1, "AdamW: weight decay of matrices.", low=0)
    schedule: str = knob(
        "cosine", "Learning rate after the warmup.", choices=("cosine", "constant")
    )
    warmup: int = knob(
        100,
        "Steps in which the learning rate rises from 0; at most a tenth of the training.",
        low=0,
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
    sample_chars: int = knob(
        200,
        "Characters of the text that the model writes at each validation; 0: none.",
        low=0,
        high=4096,  # so that the line in samples.jsonl stays below runs.LONGEST_LINE
    )
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
    graphs: str = knob("auto", "Record steps as CUDA graphs.", choices=("auto", "off"))


@dataclass(frozen=True)
class Config:
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    cell: CellConfig = CellConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    def flat(self) -> dict[str, Any]:
        """{key: value} with keys such as `train.steps`, `cell.option` and `cell.name.option`."""
        return _flatten(self.tree())

    def updated(self, values: Mapping[str, Any]) -> "Config":
        """A copy with the flat `values`; UsageError for an unknown key or a value out of range."""
        parts = {section.name: getattr(self, section.name) for section in fields(self)}
        # options of one cell, such as cell.lem.dt, come last, since cell.dt would remove them
        for key, value in sorted(values.items(), key=lambda pair: pair[0].count(".")):
            section, _, name = key.partition(".")
            if section == "cell" and name:
                parts["cell"] = _with_cell(parts["cell"], name, value)
                continue
            known = {f.name: f for f in fields(parts[section])} if section in parts else {}
            if name not in known:
                keys = [*self.flat(), "cell.<option>"]
                raise unknown("configuration key", key, keys, remedy="See --print-config")
            parts[section] = replace(parts[section], **{name: checked(key, value, known[name])})
        return replace(self, **parts)

    def continued(self, values: Mapping[str, Any]) -> "Config":
        """`updated`, where new steps replace the time limit, and a new time limit the steps."""
        steps, limit = values.get("train.steps"), values.get("train.time_limit")
        limit = limit and seconds(limit)
        if steps and limit:
            raise UsageError(
                "Both steps and a time limit are given. Choose --steps or --time-limit."
            )
        if steps:
            values = {**values, "train.time_limit": 0.0}
        elif limit:
            values = {**values, "train.steps": 0}
        return self.updated(values)

    def tree(self) -> dict[str, Any]:
        """The tables of the TOML file."""
        cell = {"name": self.cell.name, **self.cell.options}
        return {**asdict(replace(self, cell=CellConfig())), "cell": cell}

    def toml(self) -> str:
        return tomli_w.dumps(self.tree())


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'train': {'steps': 5}} -> {'train.steps': 5}."""
    rows: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + name
        rows |= _flatten(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
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
    else:  # an option of all cells replaces earlier values for single cells
        for owner, table in options.items():
            if isinstance(table, Mapping):
                options[owner] = {key: old for key, old in table.items() if key != option}
        options[option] = value
    return replace(cell, options=options)


def checked(key: str, value: Any, rule: Field[Any]) -> Any:
    """The value, converted to the field's type; UsageError if it is outside the field's limits."""
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
    """The value, if it has the type int, float, bool or str; a whole number may become a float."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < LARGEST else inf
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise UsageError(f"{key} is {value!r}; it must be {names[kind]}.")
    if isinstance(value, int | float) and not abs(value) < (LARGEST if kind is int else inf):
        raise UsageError(f"{key} is {value}; it must be a finite number.")
    return value


def parse_assignment(text: str) -> tuple[str, Any]:
    """'key=value' of --set; a value that is not valid TOML is taken as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {text}: write it as key=value, such as --set model.width=256.")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        return key, value


def merge_settings(
    assigned: Mapping[str, Any], flags: Mapping[str, Any], dashes: str = ""
) -> dict[str, Any]:
    """{key: value} of `assigned` (from --set) and `flags` together.

    flags: {name: value}; values of None and names that are not in FLAGS are ignored.  dashes: what
    the user types before a flag.  Raises UsageError for a flag's value out of range, and where the
    same setting has two different values.
    """
    if "data.fingerprint" in assigned:
        raise UsageError("data.fingerprint is computed from the corpus. Do not set it.")
    settings = dict(assigned)
    for name, value in flags.items():
        if value is None or name not in FLAGS:
            continue
        key, typed = FLAGS[name], dashes + (name.replace("_", "-") if dashes else name)
        value = _checked_key(key, value, typed)
        if key in assigned and _checked_key(key, assigned[key], key) != value:
            raise UsageError(f"{typed} is {value} and {key} is {assigned[key]}. Keep one of them.")
        settings[key] = value
    return settings


def _checked_key(key: str, value: Any, shown: str) -> Any:
    """`checked` for a key; a cell's name is checked later, with its options."""
    known = rule(key)
    return checked(shown, value, known) if known.metadata else value


def rule(key: str) -> Field[Any]:
    """The field of a key such as model.width, with its meaning and its limits."""
    section, _, name = key.partition(".")
    return next(f for f in fields(getattr(Config(), section)) if f.name == name)


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_toml(path: Path) -> dict[str, Any]:
    """{key: value} of a TOML file, without harmless keys that an older version wrote."""
    try:
        flat = _flatten(tomllib.loads(read_small(path).decode("utf-8")))
    except ValueError as error:  # not UTF-8, not TOML, or a number of thousands of digits
        raise InputError(f"{path} is not valid TOML: {error}. Correct the file.") from error
    except RecursionError:
        raise InputError(f"{path} is not valid: it is nested too deep. Correct the file.") from None
    return {key: value for key, value in flat.items() if not _is_removed(key, value)}


def _is_removed(key: str, value: Any) -> bool:
    return key in REMOVED and ((harmless := REMOVED[key]) is None or value in harmless)


def stack(name: str) -> list[str]:
    """The cells in a `cell.name`: 'mingru,mingru,lem' -> ['mingru', 'mingru', 'lem']."""
    return [part.strip() for part in name.split(",")]


def cell_files(name: str) -> list[str]:
    """The Python files with cells of the user's own in a `cell.name`."""
    return [cell for cell in stack(name) if cell.endswith(".py")]


def cell_key(name: str) -> str:
    """The name of a cell in keys such as `cell.lem.dt`; for a Python file it is the stem."""
    return Path(name).stem if name.endswith(".py") else name


def resolve(
    preset: str = "small",
    file: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    under: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration from a preset, then a file, then `settings` (from --set and flags).

    under: values that override the preset only.
    """
    if preset not in presets():
        raise unknown("preset", preset, presets())
    layers = [read_toml(PRESETS / f"{preset}.toml"), under or {}]
    layers += [read_toml(file) if file else {}, settings or {}]
    name = next(layer["cell.name"] for layer in reversed(layers) if "cell.name" in layer)
    layers[0] = _for_stack(layers[0], stack(name) if isinstance(name, str) else [])
    config = Config()
    for layer in layers:
        config = config.continued(layer)
    return config


def _for_stack(preset: Mapping[str, Any], cells: list[str]) -> dict[str, Any]:
    """The values of a preset that apply to a stack of cells.

    A preset has options for every cell; those of cells outside the stack are dropped.  Values under
    `when.CELL` override the others where all layers have that cell.
    """
    used = {cell_key(cell) for cell in cells}
    values: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    for key, value in preset.items():
        section, owner, *rest = key.split(".")
        if section == "when":
            overrides |= {".".join(rest): value} if used == {owner} else {}
        elif section != "cell" or not rest or owner in used:
            values[key] = value
    return values | overrides


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """{key: (old value, new value)} for every key that differs."""
    before, after = old.flat(), new.flat()
    keys = {**before, **after}
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}
