"""A saved step on disk: the format, and the one place that knows it.

    step-00001000/  config.toml  tokenizer.json  model.safetensors  optimizer.safetensors
                    state.safetensors  train_state.json  MANIFEST.json

The folder is complete in itself.  It is written aside and renamed, its manifest last.  What is
read may be a stranger's: nothing is believed that the files' own sizes do not bear out.
"""

import hashlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from safetensors import SafetensorError

from seqlm import __version__
from seqlm.config import Config, read_toml
from seqlm.errors import InputError, SeqlmError, UsageError
from seqlm.files import SMALL, require_space, to_json
from seqlm.manifest import changed, conforms, listed, read_json, read_sealed, refuse_changed, seal
from seqlm.temporary import new_folder
from seqlm.text.tokenizer import FILE as TOKENIZER_FILE
from seqlm.text.tokenizer import LARGEST, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from seqlm.model import LanguageModel

SCHEMA = 2
MANIFEST, CONFIG, PROGRESS = "MANIFEST.json", "config.toml", "train_state.json"
KINDS = {kind: f"{kind}.safetensors" for kind in ("model", "optimizer", "state")}
LIMITS = {CONFIG: SMALL, PROGRESS: SMALL, TOKENIZER_FILE: LARGEST}  # bytes
FILES = {**LIMITS, **dict.fromkeys(KINDS.values())}
ANOTHER = "Choose another step with --step."
Shape = tuple[tuple[int, ...], Any]  # and dtype of a tensor


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
    loss_scale: float = 2.0**16  # by which float16 multiplies gradients, that none is too small
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
    """A step as it is on disk; its tensors are read and verified when they are asked for."""

    folder: Path
    config: Config
    tokenizer: Tokenizer
    progress: Progress
    environment: Mapping[str, str | int]  # that it was computed in, as runtime.environment says
    _hashes: Mapping[str, str] = field(repr=False)  # sha256 of the tensors' files, by kind
    _held: dict[str, dict[str, "Tensor"]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def step(self) -> int:
        return self.progress.step

    def hold(self, kind: str) -> Mapping[str, "Tensor"]:
        """The tensors of 'model', 'optimizer' or 'state' as they are in the file, on the CPU.

        The file is read and verified once, and its tensors are kept until `tensors` takes them.
        Raises InputError, naming the file, where it is not as it was written.
        """
        if kind not in self._held:
            from safetensors.torch import load  # here, so that listing runs needs no torch

            path = self.folder / KINDS[kind]
            try:
                data = path.read_bytes()
            except (OSError, MemoryError) as error:
                raise InputError(f"Cannot read {path}: {error}. {ANOTHER}") from error
            if hashlib.sha256(data).hexdigest() != self._hashes[kind]:
                raise changed(path, ANOTHER)
            try:
                self._held[kind] = load(data)
            except (SafetensorError, ValueError, TypeError, KeyError, OverflowError) as error:
                raise InputError(f"{path} is damaged: {error}. {ANOTHER}") from error
        return self._held[kind]

    def weights(self, config: Config) -> dict[str, "Tensor"]:
        """The model's tensors, which are those that the configuration describes.

        Raises InputError where they are not, before a model takes any memory.
        """
        return self.tensors("model", shapes_of(self.plan(config).state_dict()))

    def plan(self, config: Config) -> "LanguageModel":
        """The model that the configuration describes, without memory for its weights.

        Raises InputError for one that cannot be, or has more layers than the file has tensors.
        """
        from seqlm.model import blueprint

        if config.model.layers > len(self.hold("model")):
            raise self._misfit("model", f"{config.model.layers} layers")
        try:
            return blueprint(config, self.tokenizer.vocab_size)
        except UsageError as error:
            raise InputError(f"{self.folder / CONFIG} is damaged: {error} {ANOTHER}") from error

    def tensors(
        self, kind: str, expected: Mapping[str, Shape], partial: bool = False
    ) -> dict[str, "Tensor"]:
        """The tensors of 'model', 'optimizer' or 'state', on the CPU, which are the caller's now.

        expected: their names, shapes and dtypes; partial: some may be missing.  Raises InputError
        where they are others.
        """
        shapes = shapes_of(self.hold(kind))
        others = [name for name, shape in shapes.items() if expected.get(name) != shape]
        missing = [] if partial else [name for name in expected if name not in shapes]
        if others or missing:
            raise self._misfit(kind, (others + missing)[0])
        return self._held.pop(kind)

    def _misfit(self, kind: str, what: str) -> InputError:
        return InputError(
            f"{self.folder / KINDS[kind]} is not what {CONFIG} beside it describes: {what} does "
            f"not fit. {ANOTHER}"
        )


def shapes_of(tensors: Mapping[str, "Tensor"]) -> dict[str, Shape]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def number(name: str) -> int | None:
    """The step that a folder's name stands for; None where it is no step's."""
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
    """Write the step into the run, whole or not at all, and verify it; its folder.

    tensors: {'model' | 'optimizer' | 'state': {name: tensor}}.  Raises SeqlmError, naming the
    file, where it cannot be written.
    """
    from safetensors.torch import save_file

    folder = run / folder_name(progress.step)
    texts = {
        CONFIG: config.toml(),
        TOKENIZER_FILE: to_json(tokenizer.to_dict()),
        PROGRESS: to_json({**asdict(progress), "environment": environment}),
    }
    size = sum(t.nbytes for named in tensors.values() for t in named.values())
    require_space(run, size + sum(map(len, texts.values())) * 4)  # bytes of a character, at most
    with new_folder(folder) as aside:
        for kind, named in tensors.items():
            # copies, since safetensors refuses tensors that share their memory
            own = {name: t.detach().to("cpu", copy=True) for name, t in named.items()}
            own = {name: t.contiguous() for name, t in own.items()}
            try:
                save_file(own, aside / KINDS[kind])
            except SafetensorError as error:  # in which the OSError of a full disk arrives
                raise SeqlmError(
                    f"Cannot write {folder / KINDS[kind]}: {error}. Free some space; the steps "
                    "saved before are intact."
                ) from error
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        manifest = {"schema": SCHEMA, "seqlm": __version__, "torch": version("torch")}
        manifest = seal({**manifest, "files": listed(aside.iterdir(), "sha256")})
        (aside / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    verify(folder)
    return folder


def verify(folder: Path) -> None:
    """Raises InputError, naming the file, unless every byte of the step is as it was written."""
    manifest = read_sealed(folder / MANIFEST, SCHEMA)
    refuse_changed(folder, manifest.get("files"), FILES, "sha256", ANOTHER)


def copy(folder: Path, place: Path) -> Path:
    """A copy of a step in another run's folder: of its own files, and nothing beside them."""
    own = [*FILES, MANIFEST]
    require_space(place, sum((folder / name).stat().st_size for name in own))
    with new_folder(place / folder.name) as aside:
        for name in own:
            shutil.copyfile(folder / name, aside / name)
    return place / folder.name


def open_step(folder: Path) -> Saved:
    """The step in the folder; InputError, naming the file, where anything is wrong with it.

    The tensors' files are known by their sizes here, and verified by `Saved.hold`.
    """
    files = read_sealed(folder / MANIFEST, SCHEMA).get("files")
    refuse_changed(folder, files, FILES, "sha256", ANOTHER, unread=KINDS.values())
    assert isinstance(files, dict), "refuse_changed found the step's files in it"
    # steps that were saved before there was float16 have no scale
    progress = {"loss_scale": Progress.loss_scale, **read_json(folder / PROGRESS)}
    shape = get_type_hints(Progress)
    if not conforms(progress, {**shape, "environment": {}}):
        raise InputError(f"{folder / PROGRESS} is damaged: it is no record of a step. {ANOTHER}")
    if progress["step"] != number(folder.name):
        raise InputError(f"{folder} holds step {progress['step']}, not its own. {ANOTHER}")
    try:
        config = Config().updated(read_toml(folder / CONFIG))
    except UsageError as error:
        raise InputError(f"{folder / CONFIG} is damaged: {error} {ANOTHER}") from error
    return Saved(
        folder,
        config,
        load_tokenizer(folder),
        Progress(**{name: progress[name] for name in shape}),
        progress["environment"],
        {kind: files[name]["sha256"] for kind, name in KINDS.items()},
    )
