"""seqlm report: one HTML page on a run."""

from pathlib import Path
from typing import Annotated

from seqlm.cli._app import command
from seqlm.cli._flags import Reading, flag, switch
from seqlm.errors import InputError, UsageError
from seqlm.ui import Screen

REPORT = "Report"  # a panel of --help


@command("report", "seqlm report", "seqlm report --run poems-lem --check --out poems.html")
def report(
    screen: Screen,
    reading: Reading,
    out: Annotated[
        Path | None, flag("Page to write. Default: NAME-OF-THE-RUN.html.", REPORT, "FILE")
    ] = None,
    check: Annotated[
        bool, switch("Also check the run, as seqlm check does.", REPORT, "--check")
    ] = False,
) -> None:
    """Write a page on a run: curves, samples, data, evaluation and settings, in one HTML file."""
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: the name must end in .html.")
    run = reading.load(screen)

    from seqlm.lab import check as lab
    from seqlm.lab.report import report as page
    from seqlm.temporary import write_file

    if check:
        lab.refuse_in_training(run.path)
    try:
        corpus = run.corpus()
    except InputError as error:
        screen.warn(str(error))
        corpus = None
    figures = checks = None
    if corpus is not None:
        with screen.progress("evaluating") as bar:
            figures = run.evaluate(data=corpus, tick=bar.update)
    if check:
        found = lab.check(str(run.path), reading.step, cell=reading.cell, runtime=run.runtime)
        with screen.progress("checking") as bar:
            checks = lab.collect(found, bar.update)
    out = out or Path(f"{run.path.resolve().name}.html")
    write_file(out, page(run, corpus, figures, checks))
    passed = None if checks is None else all(one.status != lab.FAIL for one in checks)
    result = {"run": str(run.path), "step": run.step, "out": str(out), "passed": passed}
    screen.product(result, "out", [[*result], [*result.values()]])
