"""The format of a run on disk, and the one place that knows it.

    checkpoints/<run>/  config.toml  metrics.jsonl  timing.jsonl  best  last
                        step-00001000/  config.toml  tokenizer.json  model.safetensors
                                        optimizer.safetensors  state.safetensors
                                        train_state.json  MANIFEST.json

A step's folder is complete in itself.  It is written aside and renamed, its manifest last; `best`
and `last` name a step and are replaced in one move.  Safetensors, JSON and TOML only.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from seqlm import __version__
from seqlm.config import Config, cell_key, read_toml, stack
from seqlm.errors import InputError, SeqlmError, UsageError
from seqlm.storage import (
    new_folder,
    read_json,
    read_sealed,
    seal,
    sha256,
    to_json,
    write_file,
)
from seqlm.tokenizer import FILE as TOKENIZER_FILE
from seqlm.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

RUNS = Path("checkpoints")
SCHEMA = 1
MANIFEST, CONFIG, PROGRESS = "MANIFEST.json", "config.toml", "train_state.json"
METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


@dataclass
class Progress:
    """How far a training has come: all that decides its next step, beside tensors."""

    step: int = 0  # steps done
    chars: int = 0  # characters trained on
    elapsed: float = 0.0  # seconds of training, without validations, samples and saves
    best_step: int = 0  # 0: none yet
    best_bits_per_char: float | None = None  # of the validation that found it; None: no text
    best_bits_per_byte: float | None = None  # the same, by which validations are compared
    evaluations_since_best: int = 0
    skipped: int = 0  # steps that were not finite
    skipped_in_a_row: int = 0
    finished: bool = False  # by steps, time limit or early stopping: nothing left to do

    def note(self, bits_per_char: float | None, bits_per_byte: float) -> bool:
        """Take in a validation; True when it is the best so far, which NaN never is."""
        best = self.best_bits_per_byte
        if math.isfinite(bits_per_byte) and (best is None or bits_per_byte < best):
            self.best_step, self.best_bits_per_char = self.step, bits_per_char
            self.best_bits_per_byte = bits_per_byte
            self.evaluations_since_best = 0
            return True
        self.evaluations_since_best += 1
        return False


@dataclass(frozen=True)
class Saved:
    """A step as it is on disk, verified; tensors are read when they are asked for."""

    folder: Path
    config: Config
    tokenizer: Tokenizer
    progress: Progress

    @property
    def step(self) -> int:
        return self.progress.step

    def tensors(self, kind: str) -> dict[str, "Tensor"]:
        """The tensors of 'model', 'optimizer' or 'state', on the CPU."""
        from safetensors.torch import load_file  # here, so that listing runs needs no torch

        path = self.folder / f"{kind}.safetensors"
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged: {error}. Choose another with --step.") from error


def find_run(name: str | None) -> Path:
    """The folder that --run names: a path or a name under checkpoints/; None takes the newest."""
    if name is None:
        newest = max(runs(), key=lambda run: (run / "last").stat().st_mtime_ns, default=None)
        if newest is None:
            raise InputError(f"There is no run in {RUNS}/ yet. Train one: seqlm train")
        return newest
    for path in (Path(name), RUNS / name):
        if is_run(path):
            return path
    if Path(name).suffix in (".pt", ".pth", ".pkl", ".ckpt"):
        raise InputError(
            f"{name} is a pickle, which can run any code when it is opened, so seqlm never reads "
            "one. Give the folder of a run."
        )
    raise InputError(
        f"--run {name}: neither {name} nor {RUNS / name} is a run. List yours: seqlm runs"
    )


def is_run(path: Path) -> bool:
    return os.path.isfile(path / "last") and os.path.isfile(path / CONFIG)


def runs() -> Iterator[Path]:
    return (path for path in sorted(RUNS.glob("[!.]*")) if is_run(path))


def run_path(name: str) -> Path:
    """Where a new run goes: a path as it is, a bare name under checkpoints/."""
    return Path(name) if Path(name).name != name else RUNS / name


def new_run(path: Path, force: bool) -> Path:
    """The path, if a new run may take it.

    Raises UsageError where something is there, unless it is a run and `force` is given.
    """
    if not os.path.lexists(path) or _only_leftovers(path):
        return path
    if not is_run(path):
        raise UsageError(f"{path} exists and is not a run. Choose another place with --run NAME.")
    if not force:
        raise UsageError(
            f"{path} exists. Continue it with --resume, replace it with --force, or name another "
            "with --run NAME."
        )
    return path


def _only_leftovers(path: Path) -> bool:
    """A folder in which a training was killed before its first save."""
    return path.is_dir() and all(entry.name.startswith(".tmp-") for entry in path.iterdir())


def step_folder(run: Path, step: int) -> Path:
    return run / f"step-{step:08d}"


def step_folders(run: Path) -> list[Path]:
    """The run's saved steps, oldest first."""
    return sorted(path for path in run.glob("step-*") if path.name[5:].isdecimal())


def save(
    run: Path,
    config: Config,
    tokenizer: Tokenizer,
    progress: Progress,
    tensors: Mapping[str, Mapping[str, "Tensor"]],
    best: bool,
) -> None:
    """Write the step, verified, then point `last` (and `best`) to it, then delete what is too old.

    tensors: {'model' | 'optimizer' | 'state': {name: tensor}}.
    """
    from safetensors.torch import save_file

    folder = step_folder(run, progress.step)
    with new_folder(folder) as aside:
        for kind, named in tensors.items():
            own = {name: t.detach().cpu().contiguous() for name, t in named.items()}
            try:
                save_file(own, aside / f"{kind}.safetensors")
            except SafetensorError as error:  # in which the OSError of a full disk arrives
                raise SeqlmError(
                    f"Cannot write {folder / kind}.safetensors: {error}. Free some space; the "
                    "steps saved before are intact."
                ) from error
        (aside / CONFIG).write_text(config.toml(), encoding="utf-8")
        (aside / TOKENIZER_FILE).write_text(to_json(tokenizer.to_dict()), encoding="utf-8")
        (aside / PROGRESS).write_text(to_json(asdict(progress)), encoding="utf-8")
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(aside.iterdir())
        }
        manifest = {"schema": SCHEMA, "seqlm": __version__, "torch": version("torch")}
        manifest = seal({**manifest, "files": files})
        (aside / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    verify(folder)
    write_file(run / CONFIG, config.toml())
    # `last` comes after: a kill in between leaves a run that trains to this step once more
    for pointer in ("best", "last") if best else ("last",):
        write_file(run / pointer, f"{folder.name}\n")
    _delete_old(run, folder, config.train.keep)


def _delete_old(run: Path, newest: Path, keep: int) -> None:
    best = (run / "best").read_text().strip() if (run / "best").is_file() else ""
    # steps after the newest were damaged, or given up when the run went back: they do not count
    behind = [folder for folder in step_folders(run) if folder.name <= newest.name]
    for folder in behind[:-keep]:
        if folder.name != best:
            shutil.rmtree(folder)


def verify(folder: Path) -> None:
    """Raises InputError, naming the file, unless the step is as it was written."""
    manifest = read_sealed(folder / MANIFEST, SCHEMA)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing. Choose another step with --step.")
        if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
            raise InputError(f"{path} was cut or changed. Choose another step with --step.")


def load(run: Path, which: str = "best") -> tuple[Saved, list[str]]:
    """The step that --step names: 'best', 'last' or a number; and warnings about what was damaged.

    A damaged best or last step is passed over for the newest that verifies.  A step asked for by
    number is an InputError when it does not.
    """
    if which not in ("best", "last"):
        return _open(_numbered(run, which)), []
    # a run that was never validated has no best step yet: its last one stands in
    pointer = run / which if (run / which).is_file() else run / "last"
    pointed = _pointed(pointer)
    warnings = [] if pointed else [f"{pointer} names no step of the run: taking the newest."]
    others = [folder for folder in reversed(step_folders(run)) if folder != pointed]
    for folder in (pointed, *others) if pointed else others:
        try:
            return _open(folder), warnings
        except InputError as error:
            warnings.append(f"Passing over {folder.name}: {error}")
    raise InputError(f"{run} has no step that is whole, so it cannot be read. {warnings[-1]}")


def _pointed(pointer: Path) -> Path | None:
    """The step folder that `best` or `last` names; None where it names none of this run."""
    name = pointer.read_bytes().decode("utf-8", errors="replace").strip()
    is_step = name.startswith("step-") and name[5:].isdecimal()
    return pointer.parent / name if is_step else None


def _numbered(run: Path, which: str) -> Path:
    saved = {int(folder.name.removeprefix("step-")): folder for folder in step_folders(run)}
    if not which.isdecimal():
        raise UsageError(f"--step {which}: write best, last or the number of a saved step.")
    if int(which) not in saved:
        raise InputError(
            f"{run} has no saved step {which}. Saved: {', '.join(map(str, saved)) or 'none'}."
        )
    return saved[int(which)]


def _open(folder: Path) -> Saved:
    verify(folder)
    raw = read_json(folder / PROGRESS)
    missing = {f.name for f in fields(Progress)} - raw.keys()
    if missing:
        raise InputError(
            f"{folder / PROGRESS} lacks {', '.join(sorted(missing))}: another seqlm wrote it. Use "
            "that one, or train again."
        )
    progress = Progress(**{f.name: raw[f.name] for f in fields(Progress)})
    config = Config().updated(read_toml(folder / CONFIG))
    return Saved(folder, config, load_tokenizer(folder), progress)


def with_own_cell(config: Config, run: Path, given: str | None) -> Config:
    """The configuration with the cell file that the user names; InputError where one is missing."""
    recorded = config.cell.name
    files = [name for name in stack(recorded) if name.endswith(".py")]
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
        with (run / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def cut_lines(run: Path, step: int) -> None:
    """Drop the lines of steps after `step`: they will be written again."""
    for name in (METRICS, TIMING):
        path = run / name
        if path.is_file():
            rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_file(path, "".join(row for row in rows if _step_of(row) <= step))


def _step_of(row: str) -> float:
    """The step of a line; infinity for one that is damaged, as a kill cuts the last one short."""
    try:
        return json.loads(row)["step"] if row.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf
