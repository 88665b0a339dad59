"""Sealed manifests: JSON that lists a folder's files with their sizes and hashes.

What is read may be a stranger's: its size and types are checked before it is believed.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from seqlm.errors import InputError
from seqlm.files import SMALL, read_small, to_json

SPOTS, SPOT = 64, 1 << 16  # places of a large file that are looked at, and bytes of each


def read_json(path: Path, limit: int = SMALL) -> dict[str, Any]:
    """The object in a JSON file of up to `limit` bytes; InputError where it is not one."""
    try:
        value = json.loads(read_small(path, limit).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is not valid JSON. Make it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object. Make it again.")
    return value


def conforms(value: Any, shape: Any) -> bool:
    """Whether a value out of JSON is of a type or union of types, its numbers from 0 to 2^63; for
    {key: shape}, whether it is an object that has at least these keys."""
    if isinstance(shape, Mapping):
        return isinstance(value, Mapping) and all(
            key in value and conforms(value[key], inner) for key, inner in shape.items()
        )
    if isinstance(value, bool):
        return shape is bool
    if isinstance(value, int | float) and not 0 <= value < 2**63:
        return False
    return isinstance(value, shape)


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


HASHES = {"sha256": sha256, "spot_sha256": spot_sha256}


def listed(paths: Iterable[Path], *hashes: str) -> dict[str, dict[str, Any]]:
    """{name: size and hashes} of files, as it stands in a manifest."""
    return {
        path.name: {"bytes": path.stat().st_size, **{h: HASHES[h](path) for h in hashes}}
        for path in sorted(paths)
    }


def changed(path: Path, remedy: str) -> InputError:
    """The error for a file that is not as its manifest lists it."""
    return InputError(f"{path} was cut or changed after it was written. {remedy}")


def refuse_changed(
    folder: Path,
    files: Any,
    limits: Mapping[str, int | None],
    by: str,
    remedy: str,
    unread: Collection[str] = (),
) -> None:
    """Raises InputError, naming the file, unless files are as a manifest lists them.

    files: the list, {name: size and hashes}, which may be anything.  limits: {name: the most bytes
    that such a file can have}.  by: the hash to compare.  unread: names of files of which only the
    size is compared, as they are read and hashed later.
    """
    for name, limit in limits.items():
        path = folder / name
        if not conforms(files, {name: {"bytes": int, by: str}}):
            raise InputError(f"The manifest of {folder} does not list {name}. {remedy}")
        if not path.is_file():
            raise InputError(f"{path} is missing. {remedy}")
        if limit is not None and path.stat().st_size > limit:
            raise InputError(f"{path} is damaged: it is larger than such a file can be. {remedy}")
        if path.stat().st_size != files[name]["bytes"]:
            raise changed(path, remedy)
        if name not in unread and HASHES[by](path) != files[name][by]:
            raise changed(path, remedy)
