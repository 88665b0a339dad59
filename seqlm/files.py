"""Making, locking, syncing and reading files and folders.

A file may come from a stranger, so its kind and size are checked before it is read.
"""

import errno
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
SMALL = 1 << 20  # bytes: an upper limit for files of settings or counts
LOCK = ".lock"


def make_folder(folder: Path) -> None:
    """Make the folder and its missing parents, and wait until their names are on the disk."""
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
    """Lock the folder for this process during the block; UsageError if another process has it.

    Yields False if the file system has no locks; nothing is guarded then.
    """
    try:
        # the folder may be a stranger's: no link is followed, and no pipe blocks this process
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        handle = os.open(folder / LOCK, flags, 0o644)
    except OSError as error:
        raise cannot_write(folder / LOCK, error) from error
    try:
        success = try_lock(handle)
        if success is False:
            raise in_use(folder)
        yield success is not None
    finally:
        os.close(handle)


def in_use(folder: Path) -> UsageError:
    """The error for a run that another process writes."""
    return UsageError(
        f"Another process is writing to {folder}. Wait for it, stop it, or choose another place "
        "with --run NAME."
    )


def is_locked(folder: Path) -> bool:
    """Whether another process has locked the folder."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # without a readable lock file, no process holds the lock
        return False
    try:
        return try_lock(handle, fcntl.LOCK_SH) is False
    finally:
        os.close(handle)


def try_lock(handle: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Lock an open file without waiting; LOCK_SH shares the lock with other readers.

    Returns True, False if another process has the lock, or None if the file system has no locks.
    """
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def names_in(folder: Path) -> list[str]:
    """The names in a folder; none if it does not exist.  InputError if it cannot be read."""
    try:
        return [entry.name for entry in os.scandir(folder)]
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return []
    except OSError as error:
        raise InputError(
            f"Cannot read {folder}: {error.strerror}. Check its permissions."
        ) from error


def is_utf8(name: str) -> bool:
    """Whether a path can be written into a text file; on Linux a path may be any bytes."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def require_space(place: Path, size: int) -> None:
    """Raises SeqlmError unless `size` bytes are free in the file system of `place`."""
    free = shutil.disk_usage(place).free
    if free < size:
        raise SeqlmError(
            f"Cannot write {size / 1e6:,.1f} MB to {place}: only {free / 1e6:,.1f} MB are free. "
            "Free some space."
        )


def cannot_write(path: Path, error: OSError) -> SeqlmError:
    reason = f"{error.strerror}. Check the place and the free space."
    if error.errno == errno.EISDIR:
        reason = "it is a folder. Name a file."
    elif error.errno == errno.ENOENT and not os.path.lexists(path.parent):
        reason = f"the folder {path.parent} does not exist. Create it, or choose another place."
    return SeqlmError(f"Cannot write {path}: {reason}")


def require_place(path: Path) -> None:
    """Raises SeqlmError, before long work, if the path is a folder or in a folder that is not."""
    code = errno.EISDIR if path.is_dir() else None if path.parent.is_dir() else errno.ENOENT
    if code is not None:
        raise cannot_write(path, OSError(code, os.strerror(code)))


def sync(path: Path) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: Any) -> str:
    """Indented JSON; ValueError for NaN, which JSON does not have."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def refuse_link(path: Path) -> None:
    """Raises InputError if the path exists and is a link, a folder or a device."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise InputError(f"{path} is not a plain file, so seqlm does not write to it. Remove it.")


def refuse_pickle(name: str) -> None:
    """Raises InputError for a name that ends like that of a pickle."""
    if Path(name).suffix.lower() in PICKLES:
        raise InputError(
            f"{name} is a pickle. Opening a pickle can run any code, so seqlm never reads one. "
            "Give the folder that seqlm wrote."
        )


def read_small(path: Path, limit: int = SMALL) -> bytes:
    """The bytes of a file; InputError if it is missing, larger than the limit, or no plain file."""
    try:
        if not path.is_file() and path.exists():
            raise InputError(f"{path} is not a plain file. Check the path, or make it again.")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}. Check the path.") from error
    if len(data) > limit:
        raise InputError(
            f"{path} is damaged: it is larger than {limit / 1e6:,.0f} MB, the limit for such a "
            "file. Make it again."
        )
    return data
