"""A run on disk: its saved steps, pointers to the best and the last one, and its metrics.

    checkpoints/<run>/  config.toml  best  last  step-00001000/  ...
                        metrics.jsonl  timing.jsonl  samples.jsonl  note.txt

`best` and `last` are files that hold the name of a step.

    checkpoints/<run>/.replaced/   the old run, until the new one has saved a step that learned
                      .replacing/  the old run, while its files are moved there or back

A run that --force replaces is not deleted at once: training may diverge, or be killed.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from seqlm.config import Config, cell_files, cell_key, stack
from seqlm.errors import InputError, UsageError, did_you_mean, nearest
from seqlm.files import (
    LOCK,
    cannot_write,
    in_use,
    is_locked,
    is_utf8,
    locked,
    make_folder,
    names_in,
    read_small,
    refuse_link,
    refuse_pickle,
    sync,
)
from seqlm.store import checkpoint, history
from seqlm.store.checkpoint import CONFIG, Progress, Saved
from seqlm.temporary import PREFIX, bring_all_back, remove_folder, sweep, write_file
from seqlm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

RUNS = Path("checkpoints")
BEST, LAST = "best", "last"
NOTE = "note.txt"
RUN_FILES = (CONFIG, *history.FILES, NOTE, BEST, LAST)  # the files of a run, beside its steps
EVENTS = "tensorboard"  # folder of train --tensorboard
REPLACED, REPLACING = ".replaced", ".replacing"


def find(name: str | None, option: str = "--run") -> Path:
    """The run at a path, or of a name under checkpoints/; None stands for the newest run."""
    if name is None:
        newest = max(existing(), key=_saved_at, default=None)
        if newest is None:
            raise InputError(f"There is no run in {RUNS}/ yet. Train one: seqlm train")
        return newest
    if not name:
        raise UsageError(f"{option} is empty. Give a value, or remove the option.")
    if path := named(name):
        return path
    refuse_pickle(name)
    from seqlm.text.corpus import is_corpus

    if is_corpus(Path(name)):
        trained = [run.name for run in existing() if Path(_corpus_of(run)) == Path(name)]
        example = f", such as {trained[-1]}" if trained else ""
        raise InputError(
            f"{option} {name}: {name} is a corpus, not a run. Name a run that was trained on it"
            f"{example}. List yours: seqlm runs"
        )
    near = did_you_mean(nearest(name, (run.name for run in existing()), most=3))
    raise InputError(
        f"{option} {name}: neither {name} nor {RUNS / name} is a run. {near}List yours: seqlm runs"
    )


def _corpus_of(run: Path) -> str:
    """The path of the corpus of a run; '' if it cannot be read."""
    try:
        return checkpoint.glance(steps(run)[-1]).data
    except InputError:
        return ""


def named(name: str) -> Path | None:
    """The run at a path, or of a name under checkpoints/; None if there is none."""
    for path in (Path(name), RUNS / name):
        settle(path)
        if is_run(path):
            return path
    return None


def is_run(path: Path) -> bool:
    """Whether the path is a folder with a saved step in it."""
    return os.path.isdir(path) and bool(steps(path))


def existing() -> Iterator[Path]:
    """The runs under checkpoints/, and folders that cannot be read, because they may be runs."""
    for path in sorted(RUNS / name for name in names_in(RUNS) if not name.startswith(".")):
        try:
            settle(path)
            if is_run(path):
                yield path
        except InputError:
            yield path


def _saved_at(run: Path) -> int:
    """The time of the newest step, in ns; 0 where steps were just deleted or cannot be read."""
    times = [0]
    with suppress(InputError):
        for folder in steps(run):
            with suppress(FileNotFoundError):
                times.append(folder.stat().st_mtime_ns)
    return max(times)


def place(name: str) -> Path:
    """The folder of a new run: a path stays as it is, and a bare name goes under checkpoints/."""
    if not is_utf8(name):
        raise UsageError(f"--run {name}: the name is not UTF-8. Choose another name.")
    return Path(name) if Path(name).name != name else RUNS / name


def new(path: Path, force: bool) -> Path:
    """The path, if a new run may be written there.

    Raises UsageError where something exists, unless it is a run and `force` is given, and where
    another process writes it.
    """
    settle(path)
    if not os.path.lexists(path) or _only_leftovers(path):
        return path
    if is_locked(path):  # it may have no step yet, and be no run so far
        raise in_use(path)
    # with metrics it is a run whose steps the user deleted
    if not is_run(path) and not (path / history.METRICS).is_file():
        raise UsageError(f"{path} exists and is not a run. Choose another place with --run NAME.")
    if not force:
        raise UsageError(
            f"{path} exists. Continue it with --resume, replace it with --force, or choose another "
            "name with --run NAME."
        )
    return path


def _only_leftovers(path: Path) -> bool:
    """Whether a training was killed in the folder before it saved a first step."""
    if not path.is_dir() or is_run(path):
        return False
    return all(p.name.startswith(PREFIX) or p.name == LOCK for p in path.iterdir())


@contextmanager
def opened(run: Path) -> Iterator[None]:
    """Make the run's folder if it is missing, lock it, and undo what a killed process began."""
    make_folder(run)
    with locked(run):
        sweep(run, alone=True)
        keep_one(run)
        for name in RUN_FILES:
            refuse_link(run / name)
        yield


def set_aside(run: Path) -> None:
    """Move the steps and files of the run, and nothing else, to the folder .replaced inside it.

    They stay there until `drop_replaced` deletes them or `bring_back` restores them.
    """
    contents = _contents(run)
    if not contents:
        return
    try:
        (run / REPLACING).mkdir()
        for path in contents:
            path.rename(run / REPLACING / path.name)
        (run / REPLACING).rename(run / REPLACED)
        sync(run)
    except OSError as error:
        raise cannot_write(run / REPLACING, error) from error


def drop_replaced(run: Path) -> None:
    """Delete the run that was set aside, if there is one."""
    if (run / REPLACED).is_dir():
        remove_folder(run / REPLACED)


def bring_back(run: Path) -> bool:
    """Restore the run that was set aside, and delete the new one; False if none was set aside.

    A later call completes one that was killed, since files in .replacing are never deleted.
    """
    replaced, replacing = run / REPLACED, run / REPLACING
    for path in (replaced, replacing):
        if path.is_symlink():  # in a stranger's folder it could lead to another run
            raise InputError(f"{path} is a link, which seqlm never makes. Remove it.")
    was_set_aside = replaced.is_dir() or replacing.is_dir()
    try:
        if replaced.is_dir():
            _delete(_contents(run))
            replaced.rename(replacing)
        if replacing.is_dir():
            for path in _contents(replacing):
                path.rename(run / path.name)
            sync(run)
            replacing.rmdir()
    except OSError as error:
        raise cannot_write(run, error) from error
    return was_set_aside


def remove(run: Path) -> list[str]:
    """Delete a run; returns the names of files that are not of the run, which stay in its folder.

    Raises UsageError while a process trains the run, and for a link to a run.
    """
    if run.is_symlink():
        raise UsageError(f"{run} is a link. Remove the run by its own path, {run.resolve()}.")
    if is_locked(run):
        raise UsageError(f"{run} is being trained. Wait for the training, or stop it first.")
    with opened(run):
        contents = _contents(run)
        others = {*names_in(run)} - {path.name for path in contents} - {LOCK}
        try:
            _delete(contents if others else [run])
        except OSError as error:
            raise cannot_write(run, error) from error
    return sorted(others)


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
        else:
            path.unlink()


def settle(run: Path) -> None:
    """`keep_one` after a training that was killed; does nothing while a process trains the run."""
    places = run / REPLACED, run / REPLACING
    # os.path returns False if Path raises: for a name that is too long, or an unreadable folder
    if not any(os.path.isdir(path) and not os.path.islink(path) for path in places):
        return
    with suppress(UsageError), locked(run) as certain:  # UsageError: a process trains the run
        if certain:
            keep_one(run)


def keep_one(run: Path) -> None:
    """Keep either the new run or the one that was set aside, and delete the other.

    The new run is kept if it has saved a step that learned.  Only for the process that has locked
    the run.
    """
    last = target(run / LAST)
    learned = last is not None and checkpoint.step_number(last.name) and last.is_dir()
    # while .replacing exists, the files beside it may be those of the old run
    if learned and not (run / REPLACING).is_dir():
        drop_replaced(run)
    else:
        bring_back(run)


def _contents(run: Path) -> list[Path]:
    """The steps and files that a training wrote into the run."""
    files = [run / name for name in (*RUN_FILES, EVENTS)]
    return [*steps(run), *(path for path in files if os.path.lexists(path))]


def steps(run: Path) -> list[Path]:
    """The folders of the run's saved steps, oldest first."""
    numbered = ((checkpoint.step_number(name), run / name) for name in names_in(run))
    folders = sorted((n, path) for n, path in numbered if n is not None and os.path.isdir(path))
    return [path for _, path in folders]


def save(
    run: Path,
    config: Config,
    tokenizer: Tokenizer,
    progress: Progress,
    environment: Mapping[str, str | int],
    tensors: Mapping[str, Mapping[str, "Tensor"]],
    best: bool,
) -> None:
    """Save a step, let `last` and perhaps `best` point to it, then delete old steps."""
    folder = checkpoint.save(run, config, tokenizer, progress, environment, tensors)
    for name in history.FILES:
        if (run / name).is_file():
            sync(run / name)  # so that a power cut loses no line up to a saved step
    write_file(run / CONFIG, config.toml())
    # `last` is written last: after a kill in between, training repeats up to this step
    for which in (BEST, LAST) if best else (LAST,):
        point(run, which, folder)
    # a step with a larger number is damaged or was discarded by `rewind`: it is not the newest
    folders = steps(run)
    for old in folders[: folders.index(folder) + 1][: -config.train.keep]:
        if checkpoint.step_number(old.name) != progress.best_step:
            remove_folder(old)


def rewind(run: Path, progress: Progress) -> None:
    """Undo all that came after a step: cut the metrics, and set the pointers as they were then."""
    history.cut(run, progress.step)
    for which, step in ((BEST, progress.best_step), (LAST, progress.step)):
        folder = run / checkpoint.folder_name(step)
        if folder.is_dir() and (which == LAST or step):
            point(run, which, folder)
        else:
            (run / which).unlink(missing_ok=True)


def point(run: Path, which: str, folder: Path) -> None:
    """Write the name of a step into the file `best` or `last`."""
    write_file(run / which, f"{folder.name}\n")


def load(run: Path, which: str = BEST, *kinds: str) -> tuple[Saved, list[str]]:
    """The step that --step names, 'best', 'last' or a number; and warnings about damaged steps.

    kinds: those of 'model', 'optimizer' and 'state' that the caller will use; only their files are
    read and verified.
    Where the best or last step is damaged, the newest step that is whole takes its place.  A
    damaged step that was named by its number is an InputError.
    """
    bring_all_back(run)
    if which not in (BEST, LAST):
        return _verified(_numbered(run, which), kinds), []
    # before its first validation a run has no best step, and its last one is taken
    pointer = run / (which if os.path.lexists(run / which) else LAST)
    named = target(pointer)
    warnings = [] if named else [f"{pointer} names no step of the run."]
    others = [folder for folder in reversed(steps(run)) if folder != named]
    for folder in (named, *others) if named else others:
        was_there = folder.is_dir()
        try:
            saved = _verified(folder, kinds)
        except InputError as error:
            if was_there and not folder.is_dir():  # a training deleted it while it was read
                return load(run, which, *kinds)
            warnings.append(f"Skipping {folder.name}: {error}")
        else:
            if warnings:
                warnings[-1] += f" Reading step {saved.step}."
            return saved, warnings
    raise InputError(f"{run} has no undamaged step. {warnings[-1]}")


def _verified(folder: Path, kinds: Iterable[str]) -> Saved:
    saved = checkpoint.open_step(folder)
    for kind in kinds:
        saved.read(kind)
    return saved


def target(pointer: Path) -> Path | None:
    """The folder of the step that the file `best` or `last` names; None if it names no step."""
    try:
        name = read_small(pointer).decode("utf-8", errors="replace").strip()
    except InputError:
        return None
    return None if checkpoint.step_number(name) is None else pointer.parent / name


def _numbered(run: Path, which: str) -> Path:
    saved = {checkpoint.step_number(folder.name): folder for folder in steps(run)}
    step = checkpoint.step_number(f"step-{which}")
    if step is None:
        raise UsageError(f"--step {which}: write best, last or the number of a saved step.")
    if step not in saved:
        raise InputError(
            f"{run} has no saved step {which}. Saved: {', '.join(map(str, saved)) or 'none'}."
        )
    return saved[step]


def with_cell_file(config: Config, run: Path, cell: str | None) -> Config:
    """The configuration, with the cell file from --cell if the run was trained with a cell file.

    A cell file is code, so a run's own record of its path is not trusted.  Raises InputError where
    --cell does not name the same file.
    """
    recorded = config.cell.name
    files = cell_files(recorded)
    if not files:
        return config
    if cell is None or [*map(cell_key, stack(cell))] != [*map(cell_key, stack(recorded))]:
        raise InputError(
            f"{run} was trained with a cell file, {', '.join(files)}, which is code. If you trust "
            f"the file, name it: --cell {recorded}"
        )
    return config.updated({"cell.name": cell})
