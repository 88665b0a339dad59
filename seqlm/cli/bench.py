"""seqlm bench: seqlm on this machine, beside other libraries."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from seqlm.cli._app import command
from seqlm.cli._flags import RUN, TRAINING, CellName, TrainingOptions, argument, flag
from seqlm.errors import UsageError, unknown
from seqlm.ui import Screen

if TYPE_CHECKING:
    from seqlm.config import Config
    from seqlm.runtime import Runtime

SPEED, LEARNING = "speed", "learning"
TIMED = ("optim.", "train.batch", "train.length", "train.accumulate", "train.state")
USED = {  # the settings that are used, of the sections data, optim and train
    SPEED: TIMED,
    LEARNING: (*TIMED, "train.seed", "train.time_limit"),
}
# overrides the preset small
SHAPE = {"cell.name": "mingru", "train.batch": 16, "train.length": 512, "model.conv": 0}
# the columns that a narrow terminal does without, the first one first
SPARED = (
    *("dtype", "length", "batch", "GB/s", "memory, MB", "parameters", "ms"),
    *("evaluation", "optimizer", "characters"),  # of --group learning
)


@command(
    "bench",
    "seqlm bench",
    "seqlm bench --cell lem",
    "seqlm bench --lengths 256,1024,4096",
    "seqlm bench --group learning tinyshakespeare --time-limit 5m",
)
def bench(
    screen: Screen,
    training: TrainingOptions,
    sources: Annotated[
        list[str] | None,
        argument(
            "With --group learning: corpus; or text. Default: the corpus prepared last.", "SOURCE"
        ),
    ] = None,
    cell: CellName = None,
    group: Annotated[
        str,
        flag(
            "What to measure: the speed; or how good models are after equal times of training, "
            "which takes several times --time-limit (default 5m).",
            RUN,
            f"{SPEED}|{LEARNING}",
        ),
    ] = SPEED,
    lengths: Annotated[
        str | None,
        flag("Time only a training step, at each of these lengths (symbols).", TRAINING, "N,N,..."),
    ] = None,
) -> None:
    """Measure seqlm on this machine, beside PyTorch's layers and other libraries.

    The speed is that of minGRU in the preset small without its convolution, on batches of 16 x 512
    symbols; --cell, --preset or --config chooses another model. --group learning trains the model
    that seqlm train would.
    """
    if group not in USED:
        raise unknown("group", group, USED)
    given = training.given(cell=cell)
    for key in given:
        if key.startswith(("data.", "optim.", "train.")) and not key.startswith(USED[group]):
            raise UsageError(f"{key} has no effect on what bench --group {group} measures.")
    if group == SPEED and sources:
        raise UsageError(f"{sources[0]}: only bench --group {LEARNING} reads a corpus.")
    if group == LEARNING and lengths:
        raise UsageError(f"--lengths has no effect with --group {LEARNING}. Give --length.")
    wanted = _lengths(lengths)
    if group == SPEED and training.preset is None and training.config is None:
        given = SHAPE | given

    from seqlm.runtime import Runtime
    from seqlm.training import launch

    config, _ = launch.configuration(training.preset, training.config, given)
    runtime = Runtime.pick(config.runtime)
    if runtime.device.value == "mps":
        raise UsageError("bench measures CPU and CUDA devices only. Give --device cpu.")
    if group == SPEED:
        _speed(screen, config, runtime, wanted)
    else:
        _learning(screen, config, runtime, sources or [])


def _speed(screen: Screen, config: "Config", runtime: "Runtime", wanted: list[int]) -> None:
    from seqlm.lab import bench as lab
    from seqlm.lab.contenders import GROUPS
    from seqlm.lab.contenders import TRAINING as TRAINING_STEP

    groups = [] if wanted else lab.matching_groups(config)
    contenders = [one for group in groups or [TRAINING_STEP] for one in GROUPS[group]]
    _remark(screen, runtime, lab.missing(config, contenders))
    parts = len(groups) + len(wanted)
    found: list[lab.Timing] = []
    with screen.progress("timing") as bar:
        for done, rows in enumerate(lab.bench(config, wanted, groups, screen.warn), start=1):
            found += rows
            bar.update(done / parts, rows[0].group)
    result = {
        "chars_per_second": found[0].characters_per_second,
        **_setting(config, runtime),
        "turns": lab.TURNS,
        "rows": [asdict(row) for row in found],
    }
    table: list[list[Any]] = [["benchmark", "contender", "dtype", "parameters", "batch", "length"]]
    moving = any(row.bytes_per_second for row in found)
    table[0] += ["ms", "characters/s", *["GB/s"] * moving, "relative time", "memory, MB"]
    for row in found:
        rate = None if row.characters_per_second is None else round(row.characters_per_second)
        moved = None if row.bytes_per_second is None else round(row.bytes_per_second / 1e9)
        shape = row.dtype, row.parameters, row.batch, row.length
        numbers = f"{row.seconds * 1e3:.4g}", rate, *[moved] * moving, f"{row.relative_time:.2f}"
        table.append([row.group, row.contender, *shape, *numbers, round(row.memory_bytes / 1e6)])
    screen.note(
        f"{_described(config, runtime)}; medians of {lab.TURNS} turns; relative time: seqlm = 1"
    )
    screen.product(result, "chars_per_second", table, SPARED)


def _learning(screen: Screen, config: "Config", runtime: "Runtime", sources: list[str]) -> None:
    from seqlm.lab import bench as lab
    from seqlm.lab import learning
    from seqlm.text.corpus import open_corpus
    from seqlm.text.ready import ready
    from seqlm.training import launch

    if not config.train.time_limit:
        config = config.continued({"train.time_limit": learning.TIME_LIMIT})
    with screen.progress("preparing") as bar:
        prepared = ready(sources, bar.update)
    screen.note(*prepared.notes)
    screen.warn(*prepared.warnings)
    corpus = open_corpus(prepared.folder)
    _remark(screen, runtime, lab.missing(config, learning.CONTENDERS))
    with screen.progress("training") as bar:
        rows = learning.measure(launch.for_corpus(config, corpus), corpus, screen.warn, bar.update)
    result = {
        "val_nats_per_char": rows[0].val_nats_per_char,
        "data": str(corpus.path),
        **_setting(config, runtime),
        "time_limit": config.train.time_limit,
        "batch": config.train.batch,
        "length": config.train.length,
        "dropout": config.model.dropout,
        "rows": [asdict(row) for row in rows],
    }
    table: list[list[Any]] = [["contender", "optimizer", "parameters", "characters"]]
    table[0] += ["val nats/character", "evaluation"]
    table[0] += [f"seconds to {threshold}" for threshold in rows[0].reached]
    for row in rows:
        reached = [None if at is None else round(at, 1) for at in row.reached.values()]
        nats = None if row.val_nats_per_char is None else f"{row.val_nats_per_char:.4f}"
        size = row.parameters, row.chars
        table.append([row.contender, row.recipe, *size, nats, row.protocol, *reached])
    screen.note(
        f"{corpus.label}, {config.train.time_limit:g} s of training each, batches of "
        f"{config.train.batch} x {config.train.length}, dropout {config.model.dropout:g}; "
        f"{_described(config, runtime)}"
    )
    screen.product(result, "val_nats_per_char", table, SPARED)


def _remark(screen: Screen, runtime: "Runtime", missing: list[str]) -> None:
    for name in missing:
        screen.note(f"{name} is not installed. To measure it, too: pip install -e '.[bench]'")
    if busy := runtime.busy():
        screen.note(busy)


def _setting(config: "Config", runtime: "Runtime") -> dict[str, Any]:
    """The fields of the model and of the machine."""
    model, machine = config.model, runtime.environment()
    facts = {key: machine[key] for key in ("processor", "threads", "backend", "torch")}
    return {"cell": config.cell.name, "width": model.width, "layers": model.layers, **facts}


def _described(config: "Config", runtime: "Runtime") -> str:
    facts, backend = _setting(config, runtime), runtime.backend
    return (
        f"{facts['cell']}, width {facts['width']}, {facts['layers']} layers; "
        f"{facts['processor']}, {facts['threads']} threads, torch {facts['torch']}, "
        f"backend {backend.value} ({backend.reason})"
    )


def _lengths(text: str | None) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        lengths = [0]
    if any(length < 1 for length in lengths):
        raise UsageError(f"--lengths {text}: give whole numbers above 0, such as 256,1024,4096.")
    return lengths
