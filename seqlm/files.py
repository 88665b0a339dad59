"""Files and folders as they are on the disk: made, locked, synced and read.

What is read may be a stranger's: its kind, size and types are checked before it is believed.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seqlm.errors import InputError, SeqlmError, UsageError

PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt")
SMALL = 1 << 20  # bytes: the most that a file of settings or counts has
LOCK = ".lock"


def make_folder(folder: Path) -> None:
    """Make the folder and those above it, if they are not there; their names are on the disk."""
    new = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        for path in reversed(
            new or [folder]
        ):  # Path.mkdir would recurse, and a path can be deeper than that
            path.mkdir(exist_ok=True)
        for path in new:
            sync(path.parent)
    except OSError as error:
        raise cannot_write(folder, error) from error


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """The folder for this process alone, till the block or the process ends; False where the file
    system has no locks, so that nothing can be guarded.

    Raises UsageError where another process has it.
    """
    try:
        # of a stranger's folder: no link is followed, no pipe waited for, nothing cut
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        handle = os.open(folder / LOCK, flags, 0o644)
    except OSError as error:
        raise cannot_write(folder / LOCK, error) from error
    try:
        certain = try_lock(handle)
        if certain is False:
            raise UsageError(
                f"Another process is writing to {folder}. Wait for it, stop it, or choose another "
                "place with --run NAME."
            )
        yield certain is not None
    finally:
        os.close(handle)


def is_locked(folder: Path) -> bool:
    """Whether another process has the folder."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # nobody had it ever, or nobody can
        return False
    try:
        return try_lock(handle, fcntl.LOCK_SH) is False
    finally:
        os.close(handle)


def try_lock(handle: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Lock an open file for this process, without waiting; LOCK_SH shares it with other readers.

    False where another process has it, None where the file system has no locks.
    """
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def names_in(folder: Path) -> list[str]:
    """The names in a folder; none where it is not there, InputError where it cannot be read."""
    try:
        return [entry.name for entry in os.scandir(folder)]
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return []
    except OSError as error:
        raise InputError(f"Cannot read {folder}: {error.strerror}. Check its rights.") from error


def is_utf8(name: str) -> bool:
    """Whether a path can be written into a file: it can be any bytes."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def require_space(place: Path, size: int) -> None:
    """Raises SeqlmError unless the file system of `place` has room for so many bytes."""
    free = shutil.disk_usage(place).free
    if free < size:
        raise SeqlmError(
            f"Cannot write {size / 1e6:,.1f} MB to {place}: only {free / 1e6:,.1f} MB are free. "
            "Free some space."
        )


def cannot_write(path: Path, error: OSError) -> SeqlmError:
    return SeqlmError(f"Cannot write {path}: {error.strerror}. Check the place and the free space.")


def sync(path: Path) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: Any) -> str:
    """Readable JSON, without the NaN literals that JSON does not have."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def refuse_link(path: Path) -> None:
    """Raises InputError for what is there and no plain file of the folder itself."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise InputError(f"{path} is not a plain file, so nothing is written to it. Remove it.")


def refuse_pickle(name: str) -> None:
    """Raises InputError for a name that is a pickle's."""
    if Path(name).suffix.lower() in PICKLES:
        raise InputError(
            f"{name} is a pickle, which can run any code when it is opened, so seqlm never reads "
            "one. Give the folder that seqlm wrote."
        )


def read_small(path: Path, limit: int = SMALL) -> bytes:
    """The bytes of a file; InputError where it is missing, no plain file, or above the limit."""
    try:
        if not path.is_file() and path.exists():
            raise InputError(f"{path} is not a plain file. Make it again.")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}. Check the path.") from error
    if len(data) > limit:
        raise InputError(
            f"{path} is damaged: it has more than the {limit / 1e6:,.0f} MB that such a file can "
            "have. Make it again."
        )
    return data
