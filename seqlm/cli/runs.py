"""seqlm runs: a list of the runs."""

from typing import Any

from seqlm.cli._app import command
from seqlm.errors import InputError
from seqlm.ui import Screen


@command("runs", "seqlm runs", "seqlm runs --json")
def runs(screen: Screen) -> None:
    """List the runs in checkpoints/ with their best validation results."""
    from seqlm.store import runs as all_runs

    found: list[dict[str, Any]] = []
    for path in all_runs.existing():
        try:
            saved, warnings = all_runs.load(path, "last")
        except InputError as error:
            screen.warn(str(error))
            continue
        screen.warn(*warnings)
        progress = saved.progress
        found.append(
            {
                "run": str(path),
                "cell": saved.config.cell.name,
                "data": saved.config.data.path,
                "steps": progress.step,
                "finished": progress.finished,
                "best_step": progress.best_step,
                "val_bits_per_char": progress.best_bits_per_char,
            }
        )
    best = "val bits-per-char (quick estimate)"
    rows = [["run", "cell", "data", "steps", "finished", "best step", best]]
    rows += [list(row.values()) for row in found]
    names = "\n".join(row["run"] for row in found)
    screen.product({"runs": found, "names": names}, "names", rows)
    if not found:
        screen.hint("seqlm train")
