"""seqlm check: tests that a run is sound."""

from seqlm.cli._app import command
from seqlm.cli._flags import Data, Reading, named_run
from seqlm.errors import InputError
from seqlm.ui import Screen


@command("check", "seqlm check", "seqlm check --run poems-lem --json")
def check(screen: Screen, reading: Reading, data: Data = None) -> None:
    """Check a run on this machine: its files, model and corpus, and that it resumes exactly."""
    runtime = reading.runtime(dtype=True)

    from seqlm.lab import check as lab
    from seqlm.store import runs

    folder = runs.find(reading.run)
    lab.refuse_in_training(folder)
    screen.detail(str(runtime))
    with screen.progress("checking") as bar:
        checks = lab.check(str(folder), reading.step, data=data, cell=reading.cell, runtime=runtime)
        found = lab.collect(checks, bar.update)
    failed = [one.name for one in found if one.status == lab.FAIL]
    result = {
        "run": str(folder),
        "device": runtime.device.value,
        "backend": runtime.backend.value,
        "passed": not failed,
        "result": lab.FAIL if failed else lab.PASS,
        "checks": [one.to_dict() for one in found],
    }
    screen.product(result, "result", [lab.HEADINGS, *(one.row() for one in found)])
    for one in found:
        if one.status in (lab.WARN, lab.NOT_RUN):
            screen.warn(f"{one.name}: {one.detail}.")
    if failed:
        raise InputError(
            f"{len(failed)} of {len(found)} checks failed: {', '.join(dict.fromkeys(failed))}. Do "
            "not trust the figures of this run until the cause is known."
        )
    screen.hint(f"seqlm eval {named_run(folder, reading.cell)}")
