"""Files and folders that are whole or not there: written aside, synced, then renamed."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from seqlm.errors import InputError, SeqlmError

SPOTS, SPOT = 64, 1 << 16  # places of a large file that are looked at, and bytes of each


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary sibling to fill; it takes the place of `final` when the block ends well."""
    new_parents = [parent for parent in final.parents if not os.path.lexists(parent)]
    aside = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".tmp-{final.name}-", dir=final.parent))
        yield aside
        for path in aside.iterdir():
            _sync(path)
        _sync(aside)
        aside.chmod(0o755)
        if final.exists():
            _exchange(aside, final)
        else:
            aside.rename(final)
        _sync(final.parent)
        new_parents = []
    except OSError as error:
        raise cannot_write(final, error) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):  # of one that is not empty, or was never made
            for parent in new_parents:
                parent.rmdir()


def _exchange(aside: Path, final: Path) -> None:
    """A folder cannot be replaced in one call: the old one steps aside, then goes."""
    old = Path(tempfile.mkdtemp(prefix=f".tmp-{final.name}-", dir=final.parent))
    try:
        final.rename(old / "old")
        try:
            aside.rename(final)
        except OSError:
            (old / "old").rename(final)
            raise
    finally:
        if final.exists():  # the new folder, or the old one put back
            shutil.rmtree(old)


def write_file(path: Path, text: str) -> None:
    """Replace the file in one step: a reader sees the old text or the new, never a part."""
    aside = path.with_name(f".tmp-{path.name}")
    try:
        aside.write_text(text, encoding="utf-8")
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> SeqlmError:
    return SeqlmError(f"Cannot write {path}: {error.strerror}. Check the place and the free space.")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: Any) -> str:
    """Readable JSON, without the NaN literals that JSON does not have."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}. Is the folder whole?") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is not valid JSON. Make it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object. Make it again.")
    return value


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a hash of everything else in it: its identity, and a guard for it."""
    rest = {key: value for key, value in manifest.items() if key != "fingerprint"}
    return {**rest, "fingerprint": hashlib.sha256(to_json(rest).encode()).hexdigest()}


def read_sealed(path: Path, schema: int) -> dict[str, Any]:
    """A sealed manifest; InputError where it is damaged, was changed or is of another format."""
    manifest = read_json(path)
    try:
        whole = seal(manifest) == manifest
    except ValueError:  # NaN or half a surrogate pair, which no manifest of ours holds
        whole = False
    if not whole:
        raise InputError(f"{path} was changed after it was written. Make it again.")
    if manifest.get("schema") != schema:
        raise InputError(
            f"{path} is of format {manifest.get('schema')}, and this seqlm reads {schema}. Use the "
            "seqlm that wrote it, or make it again."
        )
    return manifest


def sha256(path: Path) -> str:
    """The hash of a file; InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}. Check its rights.") from error


def spot_sha256(path: Path) -> str:
    """The hash of the file's size and of up to 64 places in it: as quick for any size.

    It knows a file that was cut or replaced, and one changed anywhere if it is under 4 MB.
    """
    try:
        size = path.stat().st_size
        found = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            for spot in range(SPOTS):
                file.seek(max(0, size - SPOT) * spot // (SPOTS - 1))
                found.update(file.read(SPOT))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}. Check its rights.") from error
    return found.hexdigest()
