"""Sealed manifests: JSON files that list the files of a folder with their sizes and hashes.

A manifest may come from a stranger, so its size and types are checked before it is used.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from seqlm.errors import InputError
from seqlm.files import SMALL, read_small, to_json

SPOTS, SPOT = 64, 1 << 16  # places of a large file that are hashed, and bytes at each


def read_json(path: Path, limit: int = SMALL) -> dict[str, Any]:
    """The object in a JSON file of up to `limit` bytes; InputError for anything else."""
    try:
        value = json.loads(read_small(path, limit).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is not valid JSON. Make it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object. Make it again.")
    return value


def conforms(value: Any, types: Any) -> bool:
    """Whether a value from JSON has the right type, and its numbers are from 0 to 2^63 - 1.

    types: a type or union of types; or {key: types} for an object with at least these keys.
    """
    if isinstance(types, Mapping):
        return isinstance(value, Mapping) and all(
            key in value and conforms(value[key], inner) for key, inner in types.items()
        )
    if isinstance(value, bool):
        return types is bool
    if isinstance(value, int | float) and not 0 <= value < 2**63:
        return False
    return isinstance(value, types)


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with its fingerprint, a hash of everything else in it."""
    rest = {key: value for key, value in manifest.items() if key != "fingerprint"}
    return {**rest, "fingerprint": hashlib.sha256(to_json(rest).encode()).hexdigest()}


def read_sealed(path: Path, schema: int) -> dict[str, Any]:
    """A sealed manifest; InputError if it is damaged, was changed or has another format."""
    manifest = read_json(path)
    try:
        intact = seal(manifest) == manifest
    except ValueError:  # NaN, or half of a surrogate pair: seqlm never writes either
        intact = False
    if not intact:
        raise InputError(f"{path} was changed after it was written. Make it again.")
    if manifest.get("schema") != schema:
        raise InputError(
            f"{path} has format {manifest.get('schema')}, but this version of seqlm reads format "
            f"{schema}. Use the version that wrote it, or make it again."
        )
    return manifest


def sha256(path: Path) -> str:
    """The hash of a file; InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}. Check its permissions.") from error


def spot_sha256(path: Path) -> str:
    """A hash of the file's size and of 64 places in it.  It is equally quick for every size.

    It detects that a file was cut or replaced.  In files under 4 MB it detects every change.
    """
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            for spot in range(SPOTS):
                file.seek(max(0, size - SPOT) * spot // (SPOTS - 1))
                digest.update(file.read(SPOT))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}. Check its permissions.") from error
    return digest.hexdigest()


HASHES = {"sha256": sha256, "spot_sha256": spot_sha256}


def listed(paths: Iterable[Path], *hashes: str) -> dict[str, dict[str, Any]]:
    """{name: size and hashes} of files, for a manifest."""
    return {
        path.name: {"bytes": path.stat().st_size, **{h: HASHES[h](path) for h in hashes}}
        for path in sorted(paths)
    }


def changed(path: Path, remedy: str) -> InputError:
    """The error for a file that differs from its entry in the manifest."""
    return InputError(f"{path} was cut or changed after it was written. {remedy}")


def refuse_changed(
    folder: Path,
    files: Any,
    limits: Mapping[str, int | None],
    kind: str,
    remedy: str,
    unread: Collection[str] = (),
) -> None:
    """Raises InputError, naming the file, if a file differs from its entry in a manifest.

    files: the manifest's list, {name: size and hashes}; it is not checked yet.
    limits: {name: largest legal size in bytes} of the files to check; None: no limit.
    kind: "sha256" or "spot_sha256".  unread: names of files whose hash is checked later.
    """
    for name, limit in limits.items():
        path = folder / name
        if not conforms(files, {name: {"bytes": int, kind: str}}):
            raise InputError(f"The manifest of {folder} does not list {name}. {remedy}")
        if not path.is_file():
            raise InputError(f"{path} is missing. {remedy}")
        if limit is not None and path.stat().st_size > limit:
            raise InputError(f"{path} is damaged: it is larger than such a file can be. {remedy}")
        if path.stat().st_size != files[name]["bytes"]:
            raise changed(path, remedy)
        if name not in unread and HASHES[kind](path) != files[name][kind]:
            raise changed(path, remedy)
