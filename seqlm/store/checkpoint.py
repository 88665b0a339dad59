"""A saved step on disk.  Only this module knows the format.

    step-00001000/  config.toml  tokenizer.json  model.safetensors  optimizer.safetensors
                    state.safetensors  train_state.json  MANIFEST.json

The folder needs no other file.  It is written under a temporary name and then renamed.  A step may
come from a stranger, so every value is checked against its file before memory is taken for it.
"""

import hashlib
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from safetensors import SafetensorError

from seqlm import __version__
from seqlm.config import Config, read_toml
from seqlm.errors import InputError, SeqlmError, UsageError
from seqlm.files import SMALL, names_in, require_space, to_json
from seqlm.manifest import changed, conforms, listed, read_json, read_sealed, refuse_changed, seal
from seqlm.temporary import new_folder
from seqlm.text.tokenizer import (
    LARGEST_TOKENIZER,
    TOKENIZER_FILE,
    Tokenizer,
    load_tokenizer,
    validation_protocol,
)

if TYPE_CHECKING:
    from torch import Tensor

    from seqlm.model import LanguageModel

SCHEMA = 2
MANIFEST, CONFIG, PROGRESS = "MANIFEST.json", "config.toml", "train_state.json"
KINDS = {kind: f"{kind}.safetensors" for kind in ("model", "optimizer", "state")}
LIMITS = {CONFIG: SMALL, PROGRESS: SMALL, TOKENIZER_FILE: LARGEST_TOKENIZER}  # bytes
FILES = {**LIMITS, **dict.fromkeys(KINDS.values())}
OTHER_STEP = "Use another step, or restore this one from a backup."
# the tables of the configuration that name the cell and the corpus, as `Config.toml` writes them
NAMED = re.compile(r"^\[(?:cell|data)\]\n(?:(?!\[).*\n)*", re.M)
RUST = re.compile(r".*I/O error: | \(os error \d+\)")  # around the system's reason
Shape = tuple[tuple[int, ...], Any]  # shape and dtype of a tensor


@dataclass
class Progress:
    """How far a training has come.  With the tensors, it determines the next step."""

    step: int = 0  # steps done
    chars: int = 0  # characters trained on
    elapsed: float = 0.0  # seconds of training, without validations, samples and saves
    best_step: int = 0  # step with the best validation; 0: none yet
    best_bits_per_char: float | None = None  # of the best validation; None: the bytes are no text
    best_bits_per_byte: float | None = (
        None  # of the best validation; validations are compared by it
    )
    evaluations_since_best: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    loss_scale: float = 2.0**16  # factor of the loss under float16, which loses small gradients
    finished: bool = False  # ended by its steps, its time limit or early stopping

    def note(self, bits_per_char: float | None, bits_per_byte: float) -> bool:
        """Record a validation; True if it is the best so far.  A value of NaN is never the best."""
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
    """A step as it is on disk.  A file of tensors is read and verified when it is first used."""

    folder: Path
    config: Config
    tokenizer: Tokenizer
    progress: Progress
    environment: Mapping[str, str | int]  # where it was computed, as runtime.environment returns it
    _hashes: Mapping[str, str] = field(repr=False)  # {kind: sha256 of its file}
    _cache: dict[str, dict[str, "Tensor"]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def step(self) -> int:
        return self.progress.step

    def read(self, kind: str) -> Mapping[str, "Tensor"]:
        """The tensors in the file of 'model', 'optimizer' or 'state', on the CPU.

        The file is read and verified once.  Its tensors stay in a cache until `tensors` is called.
        Raises InputError, naming the file, if it was changed after it was written.
        """
        if kind not in self._cache:
            from safetensors.torch import load  # here, so that listing runs needs no torch

            path = self.folder / KINDS[kind]
            try:
                data = path.read_bytes()
            except (OSError, MemoryError) as error:
                raise InputError(f"Cannot read {path}: {error}. {OTHER_STEP}") from error
            if hashlib.sha256(data).hexdigest() != self._hashes[kind]:
                raise changed(path, OTHER_STEP)
            try:
                self._cache[kind] = load(data)
            except (SafetensorError, ValueError, TypeError, KeyError, OverflowError) as error:
                raise InputError(f"{path} is damaged: {error}. {OTHER_STEP}") from error
        return self._cache[kind]

    def weights(self, config: Config) -> dict[str, "Tensor"]:
        """The weights of the model; InputError if the configuration describes another model.

        Shapes are compared before a model is built, so a wrong file takes no memory.
        """
        return self.tensors("model", shapes_of(self.plan(config).state_dict()))

    def plan(self, config: Config) -> "LanguageModel":
        """The model that the configuration describes, without memory for its weights.

        Raises InputError for an impossible model, or for more layers than the file has tensors: a
        false number of layers would take memory even without weights.
        """
        from seqlm.model import blueprint

        if config.model.layers > len(self.read("model")):
            raise self._misfit("model", f"{config.model.layers} layers")
        try:
            return blueprint(config, self.tokenizer.vocab_size)
        except UsageError as error:
            raise InputError(f"{self.folder / CONFIG} is damaged: {error} {OTHER_STEP}") from error

    def tensors(
        self, kind: str, expected: Mapping[str, Shape], partial: bool = False
    ) -> dict[str, "Tensor"]:
        """The tensors of 'model', 'optimizer' or 'state', on the CPU; they leave the cache.

        expected: {name: shape and dtype}.  partial: some of these may be missing.  Raises
        InputError for a tensor that is not expected, or is missing.
        """
        shapes = shapes_of(self.read(kind))
        others = [name for name, shape in shapes.items() if expected.get(name) != shape]
        missing = [] if partial else [name for name in expected if name not in shapes]
        if others or missing:
            raise self._misfit(kind, (others + missing)[0])
        return self._cache.pop(kind)

    def _misfit(self, kind: str, what: str) -> InputError:
        return InputError(
            f"{self.folder / KINDS[kind]} does not fit the {CONFIG} beside it: {what} does not fit."
            f" {OTHER_STEP}"
        )


def shapes_of(tensors: Mapping[str, "Tensor"]) -> dict[str, Shape]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_number(name: str) -> int | None:
    """The number in the name of a step's folder; None for any other name."""
    digits = name.removeprefix("step-")
    is_step = digits != name and digits.isdecimal() and digits.isascii() and len(digits) < 19
    return int(digits) if is_step else None


def save(
    run: Path,
    config: Config,
    tokenizer: Tokenizer,
    progress: Progress,
    environment: Mapping[str, str | int],
    tensors: Mapping[str, Mapping[str, "Tensor"]],
) -> Path:
    """Write the step into the run, completely or not at all, and verify it; returns its folder.

    tensors: {'model' | 'optimizer' | 'state': {name: tensor}}.  Raises SeqlmError, naming the
    file, if it cannot be written.
    """
    from safetensors.torch import save_file

    folder = run / folder_name(progress.step)
    texts = {
        CONFIG: config.toml(),
        TOKENIZER_FILE: to_json(tokenizer.to_dict()),
        PROGRESS: to_json({**asdict(progress), "environment": environment}),
    }
    size = sum(t.nbytes for named in tensors.values() for t in named.values())
    require_space(run, size + 4 * sum(map(len, texts.values())))  # a character has up to 4 bytes
    with new_folder(folder) as aside:
        for kind, named in tensors.items():
            # copies, because safetensors refuses tensors that share memory
            copies = {name: t.detach().to("cpu", copy=True) for name, t in named.items()}
            copies = {name: t.contiguous() for name, t in copies.items()}
            try:
                save_file(copies, aside / KINDS[kind])
            except SafetensorError as error:  # also for an OSError, such as that of a full disk
                reason = RUST.sub("", str(error))
                intact = any(step_number(name) is not None for name in names_in(run))
                others = "; the steps saved before are intact" if intact else ""
                raise SeqlmError(
                    f"Cannot write {folder / KINDS[kind]}: {reason}. Free some space{others}."
                ) from error
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        manifest = {"schema": SCHEMA, "seqlm": __version__, "torch": version("torch")}
        manifest = seal({**manifest, "files": listed(aside.iterdir(), "sha256")})
        (aside / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    verify(folder)
    return folder


def verify(folder: Path) -> None:
    """Raises InputError, naming the file, if a byte of the step has changed."""
    manifest = read_sealed(folder / MANIFEST, SCHEMA)
    refuse_changed(folder, manifest.get("files"), FILES, "sha256", OTHER_STEP)


def copy(folder: Path, run: Path) -> Path:
    """Copy a step into another run; returns the new folder.  Files that are no step's stay away."""
    names = [*FILES, MANIFEST]
    require_space(run, sum((folder / name).stat().st_size for name in names))
    with new_folder(run / folder.name) as aside:
        for name in names:
            shutil.copyfile(folder / name, aside / name)
    return run / folder.name


def open_step(folder: Path) -> Saved:
    """The step in the folder; InputError, naming the file, if a file is missing or damaged.

    Only the sizes of the tensors' files are checked here; `Saved.read` checks their hashes.
    """
    files = read_sealed(folder / MANIFEST, SCHEMA).get("files")
    refuse_changed(folder, files, FILES, "sha256", OTHER_STEP, unread=KINDS.values())
    assert isinstance(files, dict), "refuse_changed found the step's files in it"
    progress, environment = _progress(folder)
    try:
        config = Config().updated(read_toml(folder / CONFIG))
    except UsageError as error:
        raise InputError(f"{folder / CONFIG} is damaged: {error} {OTHER_STEP}") from error
    return Saved(
        folder,
        config,
        load_tokenizer(folder),
        progress,
        environment,
        {kind: files[name]["sha256"] for kind, name in KINDS.items()},
    )


def _progress(folder: Path) -> tuple[Progress, dict[str, str | int]]:
    """How far the training was at a step, and what it was computed with."""
    # steps of versions that had no float16 have no loss scale
    progress = {"loss_scale": Progress.loss_scale, **read_json(folder / PROGRESS)}
    types = _types()
    if not conforms(progress, {**types, "environment": {}}):
        raise InputError(f"{folder / PROGRESS} is damaged: it is no record of a step. {OTHER_STEP}")
    if progress["step"] != step_number(folder.name):
        raise InputError(f"{folder} holds another step, {progress['step']}. {OTHER_STEP}")
    return Progress(**{name: progress[name] for name in types}), progress["environment"]


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(Progress)


@dataclass(frozen=True)
class Glance:
    """The facts of a step that a list of runs shows."""

    cell: str
    data: str  # folder of the corpus
    protocol: str  # of the validations
    params: int
    progress: Progress


def glance(folder: Path) -> Glance:
    """The facts of a step, in a moment; InputError if a file is missing or not of its format.

    Nothing is hashed, so a file that was changed may stay unnoticed.
    """
    progress, _ = _progress(folder)
    settings = read_toml(folder / CONFIG, NAMED)
    tokenizer = read_json(folder / TOKENIZER_FILE, LARGEST_TOKENIZER)
    names = {"cell.name": str, "data.path": str}
    mark = tokenizer.get("mark", "")
    if not conforms(settings, names) or not conforms(tokenizer, {"documents": str}):
        raise InputError(f"{folder} is damaged: its settings are incomplete. {OTHER_STEP}")
    return Glance(
        settings["cell.name"],
        settings["data.path"],
        validation_protocol(tokenizer["documents"], mark),
        _weights_listed(folder / KINDS["model"]),
        progress,
    )


def _weights_listed(path: Path) -> int:
    """The number of weights in a file of float32 tensors, from the file's size alone.

    The file has 8 bytes with the size of a header, the header, and the weights.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path} is missing. {OTHER_STEP}")
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}. {OTHER_STEP}") from error
    if size <= 8 + header:
        raise InputError(f"{path} is damaged: it has no weights. {OTHER_STEP}")
    return (size - 8 - header) // 4
