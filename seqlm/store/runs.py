"""A run on disk: its saved steps, which of them is best and last, and its lines of metrics.

    checkpoints/<run>/  config.toml  metrics.jsonl  timing.jsonl  best  last  step-00001000/  ...

`best` and `last` name a step and are replaced in one move.

    checkpoints/<run>/.replaced/   the old run, until the new one is good
                      .replacing/  the same, while its files are moved there, or back
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqlm.config import Config, cell_files, cell_key, stack
from seqlm.errors import InputError, UsageError
from seqlm.files import (
    LOCK,
    cannot_write,
    is_utf8,
    locked,
    make_folder,
    names_in,
    read_small,
    refuse_link,
    refuse_pickle,
    sync,
)
from seqlm.store import checkpoint
from seqlm.store.checkpoint import CONFIG, Progress, Saved
from seqlm.temporary import PREFIX, bring_all_back, remove_folder, sweep, write_file, write_lines
from seqlm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

RUNS = Path("checkpoints")
BEST, LAST = "best", "last"
METRICS, TIMING = "metrics.jsonl", "timing.jsonl"
OWN = (CONFIG, METRICS, TIMING, BEST, LAST)  # the files of a run, beside its steps
REPLACED, REPLACING = ".replaced", ".replacing"
LONGEST_LINE = 1 << 16  # bytes


def find(name: str | None, option: str = "--run") -> Path:
    """The run that the option names: a path or a name in checkpoints/; None takes the newest."""
    if name is None:
        newest = max(found(), key=_saved_at, default=None)
        if newest is None:
            raise InputError(f"There is no run in {RUNS}/ yet. Train one: seqlm train")
        return newest
    if not name:
        raise UsageError(f"{option} is an empty name. Give a name, or leave it out.")
    if path := named(name):
        return path
    refuse_pickle(name)
    raise InputError(
        f"{option} {name}: neither {name} nor {RUNS / name} is a run. List yours: seqlm runs"
    )


def named(name: str) -> Path | None:
    """The run at a path or of a name under checkpoints/; None where there is none."""
    for path in (Path(name), RUNS / name):
        settle(path)
        if is_run(path):
            return path
    return None


def is_run(path: Path) -> bool:
    """A folder with a saved step in it."""
    return os.path.isdir(path) and bool(steps(path))


def found() -> Iterator[Path]:
    """The runs under checkpoints/, and folders that cannot be read: they may be runs."""
    for path in sorted(RUNS / name for name in names_in(RUNS) if not name.startswith(".")):
        try:
            settle(path)
            if is_run(path):
                yield path
        except InputError:
            yield path


def _saved_at(run: Path) -> int:
    """When the run was saved last; 0 where its steps have gone just now or cannot be read."""
    times = [0]
    with suppress(InputError):
        for folder in steps(run):
            with suppress(FileNotFoundError):
                times.append(folder.stat().st_mtime_ns)
    return max(times)


def place(name: str) -> Path:
    """Where a new run goes: a path as it is, a bare name under checkpoints/."""
    if not is_utf8(name):
        raise UsageError(f"--run {name}: the name is not UTF-8. Choose another.")
    return Path(name) if Path(name).name != name else RUNS / name


def new(path: Path, force: bool) -> Path:
    """The path, if a new run may take it.

    Raises UsageError where something is there, unless it is a run and `force` is given.
    """
    settle(path)
    if not os.path.lexists(path) or _only_leftovers(path):
        return path
    if not is_run(path) and not (path / METRICS).is_file():  # whose steps somebody deleted
        raise UsageError(f"{path} exists and is not a run. Choose another place with --run NAME.")
    if not force:
        raise UsageError(
            f"{path} exists. Continue it with --resume, replace it with --force, or name another "
            "with --run NAME."
        )
    return path


def _only_leftovers(path: Path) -> bool:
    """A folder in which a training was killed before its first save."""
    if not path.is_dir() or is_run(path):
        return False
    return all(p.name.startswith(PREFIX) or p.name == LOCK for p in path.iterdir())


@contextmanager
def opened(run: Path) -> Iterator[None]:
    """The run's folder, made if it is not there, for this process alone, and put in order."""
    make_folder(run)
    with locked(run):
        sweep(run, alone=True)
        keep_one(run)
        for name in OWN:
            refuse_link(run / name)
        yield


def set_aside(run: Path) -> None:
    """Move all that a training wrote into the run, and nothing else, to a folder inside it.

    There it stays until `drop_replaced` deletes it or `bring_back` restores it.
    """
    own = _own(run)
    if not own:
        return
    try:
        (run / REPLACING).mkdir()
        for path in own:
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
    """Restore the run that was set aside, and delete the new one; False where there was none.

    It can be called again where it was killed: what is in `.replacing` is never deleted.
    """
    replaced, replacing = run / REPLACED, run / REPLACING
    for path in (replaced, replacing):
        if path.is_symlink():  # a stranger's, which could lead to another run
            raise InputError(f"{path} is a link, which seqlm never makes. Remove it.")
    found = replaced.is_dir() or replacing.is_dir()
    try:
        if replaced.is_dir():
            for path in _own(run):
                if path.is_dir() and not path.is_symlink():
                    remove_folder(path)
                else:
                    path.unlink()
            replaced.rename(replacing)
        if replacing.is_dir():
            for path in _own(replacing):
                path.rename(run / path.name)
            sync(run)
            replacing.rmdir()
    except OSError as error:
        raise cannot_write(run, error) from error
    return found


def settle(run: Path) -> None:
    """Decide between a run that was set aside and the new one, if the process that trained the new
    one is gone: the new one stays if it has a step that learned."""
    places = run / REPLACED, run / REPLACING
    # os.path says no, where Path raises: a name may be a long prompt, or a folder unreadable
    if not any(os.path.isdir(path) and not os.path.islink(path) for path in places):
        return
    with suppress(UsageError), locked(run) as certain:  # UsageError: the new run is being trained
        if certain:
            keep_one(run)


def keep_one(run: Path) -> None:
    """`settle` for the process that has the run."""
    last = pointed(run / LAST)
    learned = last is not None and checkpoint.number(last.name) and last.is_dir()
    # while `.replacing` is there, what is beside it may be the old run's
    if learned and not (run / REPLACING).is_dir():
        drop_replaced(run)
    else:
        bring_back(run)


def _own(run: Path) -> list[Path]:
    """All that a training wrote into the run."""
    files = [run / name for name in OWN]
    return [*steps(run), *(path for path in files if os.path.lexists(path))]


def steps(run: Path) -> list[Path]:
    """The folders of the run's saved steps, oldest first."""
    numbered = ((checkpoint.number(name), run / name) for name in names_in(run))
    found = sorted((n, path) for n, path in numbered if n is not None and os.path.isdir(path))
    return [path for _, path in found]


def save(
    run: Path,
    config: Config,
    tokenizer: Tokenizer,
    progress: Progress,
    environment: Mapping[str, str | int],
    tensors: Mapping[str, Mapping[str, "Tensor"]],
    best: bool,
) -> None:
    """Save a step, point `last` (and `best`) to it, then delete what is too old."""
    folder = checkpoint.save(run, config, tokenizer, progress, environment, tensors)
    for name in (METRICS, TIMING):
        if (run / name).is_file():
            sync(run / name)  # no line up to a saved step is lost
    write_file(run / CONFIG, config.toml())
    # `last` comes after: a kill in between leaves a run that trains to this step once more
    for which in (BEST, LAST) if best else (LAST,):
        point(run, which, folder)
    _delete_old(run, folder, progress.best_step, config.train.keep)


def _delete_old(run: Path, newest: Path, best: int, keep: int) -> None:
    # steps after the newest were damaged, or given up when the run went back: they do not count
    folders = steps(run)
    behind = folders[: folders.index(newest) + 1]
    for folder in behind[:-keep]:
        if checkpoint.number(folder.name) != best:
            remove_folder(folder)


def point(run: Path, which: str, folder: Path) -> None:
    """Let `best` or `last` name a step."""
    write_file(run / which, f"{folder.name}\n")


def go_back(run: Path, progress: Progress) -> None:
    """Let the pointers and the lines of the run be those of a step that it goes on from."""
    cut_lines(run, progress.step)
    for which, step in ((BEST, progress.best_step), (LAST, progress.step)):
        folder = run / checkpoint.folder_name(step)
        if folder.is_dir() and (which == LAST or step):
            point(run, which, folder)
        else:
            (run / which).unlink(missing_ok=True)


def load(run: Path, which: str = BEST, *kinds: str) -> tuple[Saved, list[str]]:
    """The step that --step names: 'best', 'last' or a number; and warnings about what was damaged.

    kinds: 'model', 'optimizer' and 'state', the tensors that the caller will use; the files of
    others are not read.  A damaged best or last step is passed over for the newest that verifies.
    A step asked for by number is an InputError when it does not.
    """
    bring_all_back(run)
    if which not in (BEST, LAST):
        return _verified(_numbered(run, which), kinds), []
    # a run that was never validated has no best step yet: its last one stands in
    pointer = run / (which if os.path.lexists(run / which) else LAST)
    named = pointed(pointer)
    warnings = [] if named else [f"{pointer} names no step of the run: taking the newest."]
    others = [folder for folder in reversed(steps(run)) if folder != named]
    for folder in (named, *others) if named else others:
        was_there = folder.is_dir()
        try:
            return _verified(folder, kinds), warnings
        except InputError as error:
            if was_there and not folder.is_dir():  # training deleted it while it was read
                return load(run, which, *kinds)
            warnings.append(f"Passing over {folder.name}: {error}")
    raise InputError(f"{run} has no step that is whole, so it cannot be read. {warnings[-1]}")


def _verified(folder: Path, kinds: Iterable[str]) -> Saved:
    saved = checkpoint.open_step(folder)
    for kind in kinds:
        saved.hold(kind)
    return saved


def pointed(pointer: Path) -> Path | None:
    """The step folder that `best` or `last` names; None where it names none of this run."""
    try:
        name = read_small(pointer).decode("utf-8", errors="replace").strip()
    except InputError:
        return None
    return None if checkpoint.number(name) is None else pointer.parent / name


def _numbered(run: Path, which: str) -> Path:
    saved = {checkpoint.number(folder.name): folder for folder in steps(run)}
    step = checkpoint.number(f"step-{which}")
    if step is None:
        raise UsageError(f"--step {which}: write best, last or the number of a saved step.")
    if step not in saved:
        raise InputError(
            f"{run} has no saved step {which}. Saved: {', '.join(map(str, saved)) or 'none'}."
        )
    return saved[step]


def with_own_cell(config: Config, run: Path, given: str | None) -> Config:
    """The configuration with the cell file that the user names; InputError where one is missing."""
    recorded = config.cell.name
    files = cell_files(recorded)
    if not files:
        return config
    if given is None or [*map(cell_key, stack(given))] != [*map(cell_key, stack(recorded))]:
        raise InputError(
            f"{run} was trained with a cell of its author's own, {', '.join(files)}, which is "
            f"code. If you trust the file, name it: --cell {recorded}"
        )
    return config.updated({"cell.name": given})


def append_lines(run: Path, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
    """One line more in metrics.jsonl (no clock in it) and in timing.jsonl."""
    for name, row in ((METRICS, metrics), (TIMING, timing)):
        try:
            with (run / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise cannot_write(run / name, error) from error


def cut_lines(run: Path, step: int) -> None:
    """Drop the lines of steps after `step`: they will be written again."""
    for name in (METRICS, TIMING):
        if (run / name).is_file():
            with (run / name).open("rb") as file:
                rows = iter(lambda: file.readline(LONGEST_LINE), b"")
                write_lines(run / name, (row for row in rows if _step_of(row) <= step))


def _step_of(row: bytes) -> float:
    """The step of a line; infinity for one that is damaged, as a kill cuts the last one short."""
    if not row.endswith(b"\n"):
        return math.inf
    try:
        step = json.loads(row)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf
