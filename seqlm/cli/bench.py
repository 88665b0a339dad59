"""seqlm bench: the speed of seqlm on this machine, beside other libraries."""

from dataclasses import asdict
from typing import Annotated, Any

from seqlm.cli._app import command
from seqlm.cli._flags import TRAINING, CellName, Setup, flag
from seqlm.errors import UsageError
from seqlm.ui import Screen

TIMED = ("train.batch", "train.length", "train.accumulate", "train.state")
SHAPE = {"train.length": 512, "model.conv": 0}  # overrides the preset small


@command("bench", "seqlm bench", "seqlm bench --cell lem", "seqlm bench --lengths 256,1024,4096")
def bench(
    screen: Screen,
    setup: Setup,
    cell: CellName = None,
    lengths: Annotated[
        str | None,
        flag("Time only a training step, at each of these lengths (symbols).", TRAINING, "N,N,..."),
    ] = None,
) -> None:
    """Measure the speed of seqlm on this machine, beside PyTorch's layers and other libraries.

    The model is that of the preset small without its convolution; sequences have 512 symbols.
    """
    given = SHAPE | setup.given(cell=cell)
    for key in given:
        if key.startswith(("data.", "optim.", "train.")) and key not in TIMED:
            raise UsageError(f"--set {key} has no effect on the times that bench measures.")
    wanted = _lengths(lengths)

    from seqlm.lab import bench as lab
    from seqlm.lab.contenders import TRAINING as TRAINING_STEP
    from seqlm.runtime import Runtime
    from seqlm.training import launch

    config, _ = launch.configuration(None, None, given)
    runtime = Runtime.pick(config.runtime)
    if runtime.device.value == "mps":
        raise UsageError("bench measures CPU and CUDA devices only. Give --device cpu.")
    groups = [] if wanted else lab.matching_groups(config)
    for name in lab.missing(config, groups or [TRAINING_STEP]):
        screen.note(f"{name} is not installed. To measure it, too: pip install -e '.[bench]'")
    if busy := runtime.busy():
        screen.note(busy)
    parts = len(groups) + len(wanted)
    found: list[lab.Row] = []
    with screen.progress("timing") as bar:
        for done, rows in enumerate(lab.bench(config, wanted, groups, screen.warn), start=1):
            found += rows
            bar.update(done / parts, rows[0].group)
    backend, machine = runtime.backend, runtime.environment()
    result = {
        "chars_per_second": found[0].characters_per_second,
        "cell": config.cell.name,
        "width": config.model.width,
        "layers": config.model.layers,
        "turns": lab.TURNS,
        **{key: machine[key] for key in ("processor", "threads", "backend", "torch")},
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
        f"{config.cell.name}, width {config.model.width}, {config.model.layers} layers; "
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"backend {backend.value} ({backend.reason}); medians of {lab.TURNS} turns; "
        "relative time: seqlm = 1"
    )
    screen.product(result, "chars_per_second", table)


def _lengths(text: str | None) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        lengths = [0]
    if any(length < 1 for length in lengths):
        raise UsageError(f"--lengths {text}: give whole numbers above 0, such as 256,1024,4096.")
    return lengths
