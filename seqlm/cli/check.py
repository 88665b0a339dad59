"""seqlm check: tests that a run is sound."""

from seqlm.cli._app import command
from seqlm.cli._flags import Data, Reading, named_run
from seqlm.errors import InputError, UsageError
from seqlm.files import is_locked
from seqlm.ui import Screen


@command("check", "seqlm check", "seqlm check --run poems-lem --json")
def check(screen: Screen, reading: Reading, data: Data = None) -> None:
    """Check a run on this machine: its files, model and corpus, and that it resumes exactly."""
    runtime = reading.runtime(dtype=True)

    from seqlm.lab import check as lab
    from seqlm.store import runs

    folder = runs.find(reading.run)
    if is_locked(folder):
        raise UsageError(f"{folder} is being trained. Check it after the training has stopped.")
    found: list[lab.Check] = []
    screen.detail(str(runtime))
    with screen.progress("checking") as bar:
        checks = lab.check(str(folder), reading.step, data=data, cell=reading.cell, runtime=runtime)
        for one in checks:
            found.append(one)
            bar.update((lab.IN_ORDER.index(one.name) + 1) / len(lab.IN_ORDER), one.name)
    failed = [one.name for one in found if one.status == lab.FAIL]
    result = {
        "run": str(folder),
        "device": runtime.device.value,
        "backend": runtime.backend.value,
        "passed": not failed,
        "result": lab.FAIL if failed else lab.PASS,
        "checks": [one.to_dict() for one in found],
    }
    rows: list[list[str | None]] = [
        ["check", "result", "dtype", "deviation", "tolerance", "details"]
    ]
    rows += [
        [one.name, one.status, one.dtype, _small(one.deviation), _small(one.tolerance), one.detail]
        for one in found
    ]
    screen.product(result, "result", rows)
    for one in found:
        if one.status in (lab.WARN, lab.NOT_RUN):
            screen.warn(f"{one.name}: {one.detail}.")
    if failed:
        raise InputError(
            f"{len(failed)} of {len(found)} checks failed: {', '.join(dict.fromkeys(failed))}. Do "
            "not trust the figures of this run until the cause is known."
        )
    screen.hint(f"seqlm eval {named_run(folder, reading.cell)}")


def _small(number: float | None) -> str | None:
    return None if number is None else f"{number:.1e}" if number else "0"
