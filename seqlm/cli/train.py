"""seqlm train: a corpus -> a run."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seqlm.cli._app import command
from seqlm.cli._flags import (
    RUN,
    CellName,
    TrainingData,
    TrainingOptions,
    argument,
    flag,
    named_run,
    setting,
    switch,
)
from seqlm.config import Config
from seqlm.errors import UsageError
from seqlm.files import to_json
from seqlm.ui import ProgressBar, Screen, Sparkline, duration, pairs, plain, visible

if TYPE_CHECKING:
    from seqlm.training.launch import Training
    from seqlm.training.loop import Report


@command(
    "train",
    "seqlm train poems.txt",
    "seqlm train tinyshakespeare --cell lem --time-limit 5m",
    "seqlm train --resume --run poems-lem",
    "torchrun --nproc-per-node 2 -m -- seqlm train --data poems",
)
def train(
    screen: Screen,
    training: TrainingOptions,
    sources: Annotated[
        list[str] | None,
        argument(
            "Corpus; or text: files, folders, globs, -. Default: the corpus prepared last.",
            "SOURCE",
        ),
    ] = None,
    data: TrainingData = None,
    run: Annotated[
        str | None,
        flag("Run to write. Default: CORPUS-CELL; with --resume, the newest run.", RUN, "RUN"),
    ] = None,
    resume: Annotated[
        bool, switch("Continue a run from its last saved step.", RUN, "--resume")
    ] = False,
    force: Annotated[bool, switch("Replace a run that exists.", RUN, "--force")] = False,
    init_from: Annotated[str | None, setting("init_from", "RUN")] = None,
    note: Annotated[
        str | None, flag("Note on the run, which seqlm runs shows.", RUN, "TEXT")
    ] = None,
    tensorboard: Annotated[
        bool, switch("Also write the figures for TensorBoard.", RUN, "--tensorboard")
    ] = False,
    print_config: Annotated[
        bool, switch("Print the complete configuration and exit.", RUN, "--print-config")
    ] = False,
    cell: CellName = None,
) -> None:
    """Train a model, and save its best step and the newest ones as a run."""
    given = training.given(cell=cell, init_from=init_from)
    preset, config = training.preset, training.config

    if sources and data is not None:
        raise UsageError(f"Both {sources[0]} and --data {data} are given. Keep one of them.")
    sources = sources or ([] if data is None else [data])

    from seqlm.extras import extra
    from seqlm.store import book, runs
    from seqlm.training import launch, loop, parallel

    if resume and run is None and len(sources) == 1 and runs.named(sources[0]):
        run, sources = sources[0], []
    if tensorboard:
        extra("tensorboard", "tensorboard")
    if note is not None:
        book.checked_note(note)  # before the text is prepared, which may take long
    with parallel.joined():
        writer = parallel.is_writer()
        if not writer:
            screen.mute(left=parallel.rank() == 1)
        if print_config and not resume:
            named = {"data.path": sources[0]} if len(sources) == 1 else {}
            _print_config(screen, launch.configuration(preset, config, {**named, **given})[0])
            return
        options: dict[str, Any] = dict(
            run=run, preset=preset, config=config, resume=resume, force=force
        )
        try:
            with screen.progress("preparing") as bar:
                setup = launch.start(sources, settings=given, on_progress=bar.update, **options)
        except KeyboardInterrupt:
            screen.note("Interrupted before training began. No step was saved.")
            raise typer.Exit(130) from None
        if print_config:
            _print_config(screen, setup.config)
            return
        setup.note = note
        if setup.finished and note is not None:
            book.write_note(setup.run, note)
        _announce(screen, setup)
        last = None if setup.finished else _train(screen, setup, writer and tensorboard)
        interrupted = False
        if last is not None and last.stopped == loop.INTERRUPTED:
            interrupted = True
            shown = named_run(setup.run, setup.config.cell.name)
            screen.note(f"Saved step {last.step}. To continue: seqlm train --resume {shown}")
        elif writer:
            _conclude(screen, setup, last)
    if interrupted:
        raise typer.Exit(130)


def _print_config(screen: Screen, config: Config) -> None:
    screen.write(to_json(config.tree()) if screen.json else visible(config.toml()))


def _announce(screen: Screen, setup: "Training") -> None:
    screen.warn(*setup.warnings)
    screen.note(*setup.notes)
    from seqlm.model import parameter_count

    config, corpus = setup.config, setup.trainer.corpus
    screen.note(
        f"{setup.run}: {config.cell.name}, {parameter_count(setup.trainer.model):,} parameters, "
        f"on {corpus.label} ({corpus.splits['train']['tokens']:,} symbols)"
    )
    screen.note(str(setup.runtime))
    if busy := setup.runtime.busy():
        screen.note(busy)
    processes, own = setup.trainer.processes, len(setup.trainer.streams)
    if processes > 1:
        screen.note(f"{processes} processes, with {own} sequences of each batch per process")
    screen.detail(config.toml())
    if setup.resumed is not None:
        screen.note(f"Resuming from step {setup.resumed.step}.")
        for key, (old, new) in setup.changed.items():
            screen.note(f"  changed: {key} = {new} (was {old})")


def _train(screen: Screen, setup: "Training", tensorboard: bool) -> "Report":
    """Train, and show the reports as they come; returns the last report."""
    from seqlm.lab.events import Events
    from seqlm.runtime import keep_memory
    from seqlm.text.tokenizer import validation_protocol

    keep_memory()
    begun, before = setup.trainer.progress.elapsed, setup.trainer.progress.chars
    text = setup.trainer.corpus.splits["val"]["chars"] is not None
    tokenizer = setup.trainer.corpus.tokenizer
    protocol = validation_protocol(tokenizer.documents, tokenizer.mark)
    unit, bpc = ("char", "bpc") if text else ("byte", "bpb")
    curve = Sparkline()
    with (
        Events(setup) if tensorboard else nullcontext() as events,
        screen.board("training") as bar,
        _stop_signals(screen, bar) as stop,
    ):
        for report in setup.reports(interrupted=lambda: stop["asked"]):
            if events is not None:
                events.write(report)
            rate = (report.chars - before) / (report.seconds - begun)
            left = report.seconds * (1 / report.progress - 1) if report.progress else 0
            curve.add(report.bits_per_char)
            bar.rows["step"] = [f"{report.step:,}", f"{duration(left)} left"]
            bar.rows[f"bits/{unit}"] = [plain(report.bits_per_char), curve]
            bar.rows["speed"] = [f"{rate:,.0f} characters/s"]
            bar.update(
                report.progress,
                f"step {report.step:,} {bpc} {plain(report.bits_per_char)} {rate:,.0f} chars/s "
                f"{duration(left)} left",
            )
            if report.val is not None:
                bar.clear()
                value = report.val.bits_per_char if text else report.val.bits_per_byte
                best = ", the best so far" if report.best else ""
                bar.rows["validation"] = [plain(value), f"step {report.step:,}{best}"]
                right = f", {report.val.accuracy:.1%} right" if tokenizer.mark else ""
                screen.note(
                    f"step {report.step:,}: val bits-per-{unit} "
                    f"{plain(value)} ({protocol}{right}){best}; {rate:,.0f} characters/s"
                )
            if report.sample is not None:
                bar.rows["sample"] = ["\n".join(filter(str.strip, report.sample.splitlines()))]
                screen.detail(report.sample)
    return report


@contextmanager
def _stop_signals(screen: Screen, bar: ProgressBar) -> Iterator[dict[str, bool]]:
    """The first SIGINT, SIGTERM or SIGHUP stops training after its step; the second ends it at
    once."""
    stop = {"asked": False}

    def say() -> None:
        with suppress(OSError):  # the terminal is closed
            bar.close()
            screen.note("Finishing the step and saving. Interrupt again to stop at once.")

    # a thread waits if the signal has interrupted another note, which a handler cannot do
    speaker = Thread(target=say)

    def ask(number: int, frame: object) -> None:
        if stop["asked"]:
            return
        stop["asked"] = True
        for either in old:
            signal.signal(either, signal.SIG_DFL)
        speaker.start()

    wanted = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
        wanted.append(signal.SIGHUP)
    old = {number: signal.signal(number, ask) for number in wanted}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        if stop["asked"]:
            speaker.join()


def _conclude(screen: Screen, setup: "Training", last: "Report | None") -> None:
    """Evaluate the best step on the whole val split, and show the result."""
    from seqlm import api
    from seqlm.runtime import peak_memory_bytes
    from seqlm.text.card import implausible

    if last is None:
        screen.note(f"{setup.run} is finished: nothing is left to train.")
    else:
        screen.note(f"Stopped: {last.stopped}. Evaluating the best step on the whole val split.")
    name = setup.config.cell.name
    run = api.read(setup.run, "best", setup.runtime, name)
    screen.warn(*run.warnings)
    with screen.progress("evaluating") as bar:
        # the open corpus, because another one may have taken its place on disk
        figures = run.evaluate(data=setup.trainer.corpus, tick=bar.update)
    bits = figures["bits_per_byte" if figures["bits_per_char"] is None else "bits_per_char"]
    card = setup.trainer.corpus.manifest["card"]
    if setup.trainer.val.answers is None and implausible(bits, card):
        screen.warn(
            f"{bits:.4f} is far below the {card['xz_bits_per_char']:.4f} of xz -9 on this text. "
            "The model may see the symbols that it predicts. Run: seqlm check"
        )
    fell_back = _fell_back(screen, setup)
    progress = setup.trainer.progress
    start = setup.resumed.progress if setup.resumed else None
    chars = progress.chars - (start.chars if start else 0)
    seconds = progress.elapsed - (start.elapsed if start else 0)
    result = {
        "run": str(setup.run),
        "cell": name,
        "params": figures["params"],
        "steps": progress.step,
        "seconds": seconds,
        "chars_per_second": chars / seconds if seconds else None,
        "val_bits_per_char": figures["bits_per_char"],
        "val_bits_per_byte": figures["bits_per_byte"],
        "val_nats_per_char": figures["nats_per_char"],
        "val_accuracy": figures["accuracy"],
        "protocol": figures["protocol"],
        "best_step": run.step,
        "skipped_steps": progress.skipped,
        "newton_fell_back": fell_back,
        "peak_memory_bytes": peak_memory_bytes(setup.runtime.device.value),
        "device": setup.runtime.device.value,
        "dtype": setup.runtime.dtype.value,
        "backend": setup.runtime.backend.value,
        "graphs": setup.runtime.graphs.value,
        "processes": setup.trainer.processes,
    }
    key = "val_bits_per_byte" if figures["bits_per_char"] is None else "val_bits_per_char"
    shown = _shown(result)
    screen.product(result, key, pairs(shown, list(shown)))
    hint = named_run(setup.run, name)
    screen.hint(f"seqlm eval {hint}   or   seqlm generate {hint}")


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    """The figures for people: without those that are not there or as usual, and memory in MB."""
    usual = {"skipped_steps": 0, "newton_fell_back": 0, "graphs": "off", "processes": 1}
    shown = {k: v for k, v in result.items() if v is not None and v != usual.get(k)}
    if (memory := shown.pop("peak_memory_bytes", None)) is not None:
        shown["peak_memory_MB"] = round(memory / 1e6)
    return shown


def _fell_back(screen: Screen, setup: "Training") -> float | None:
    """The share of units for which Newton's method did not converge, with a warning if it is not
    0; None if no cell uses Newton's method."""
    solves, options = setup.trainer.solves, setup.config.cell.options
    if not solves.calls:
        return None
    share = solves.fell_back / solves.lanes
    if share:
        solved = (cell for cell, own in options.items() if own.get("solver") in ("auto", "newton"))
        instead = " ".join(f"--set cell.{cell}.solver=sequential" for cell in solved)
        screen.warn(
            f"Newton's method did not converge for {share:.2%} of the units. They were solved step "
            f"by step, which is exact but slower. To turn the method off: {instead}"
        )
    return share
