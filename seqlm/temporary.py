"""Files and folders that are whole or not there, whatever ends the process that writes them.

    <folder>/.tmp-seqlm-1f0c22ab            a file that is being written
             .tmp-seqlm-1f0c22ab/NAME/new   the folder NAME to be; after the exchange, the old one
             .tmp-seqlm-1f0c22ab/NAME/old   the old NAME, where a system cannot exchange two folders
             .tmp-seqlm-1f0c22ab/NAME/gone  a folder that is being deleted

A process locks what is temporary of its own until it is done, so others know what a killed process
left.  Whoever writes into the folder next deletes that.
"""

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from seqlm.errors import SeqlmError, UsageError
from seqlm.files import cannot_write, make_folder, sync, try_lock

PREFIX = ".tmp-seqlm-"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux, in fcntl.h and linux/fs.h


def write_file(path: Path, text: str) -> None:
    """Replace the file in one step: a reader sees the old text or the new, never a part."""
    write_lines(path, [text.encode("utf-8")])


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """`write_file` for lines that are written as they come."""
    try:
        with temporary(path.parent, folder=False) as aside:
            with aside.open("wb") as file:
                file.writelines(lines)
            sync(aside)
            aside.replace(path)
            sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def new_folder(final: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A folder to fill; it takes the place of `final` when the block ends without an error.

    check: called right before that; what it raises leaves `final` as it is.  Raises UsageError
    where another process is writing `final`.
    """
    if final.name in ("", ".."):
        final = final.resolve()
    new_parents = [parent for parent in final.parents if not os.path.lexists(parent)]
    try:
        make_folder(final.parent)
        with temporary(final.parent) as place:
            new = place / final.name / "new"
            new.mkdir(parents=True)
            _refuse_second_writer(final, place)
            yield new
            for path in new.iterdir():
                sync(path)
            sync(new)
            check()
            _put(new, final)
            sync(final.parent)
        new_parents = []
    except OSError as error:
        raise cannot_write(final, error) from error
    finally:
        with suppress(OSError):  # a parent that is not empty, or was never made
            for parent in new_parents:
                parent.rmdir()


def remove_folder(folder: Path) -> None:
    """Delete the folder: its name is gone in one step, then its files."""
    try:
        with temporary(folder.parent) as place:
            (place / folder.name).mkdir()
            folder.rename(place / folder.name / "gone")
    except OSError as error:
        raise SeqlmError(
            f"Cannot delete {folder}: {error.strerror}. Check the rights to its files."
        ) from error


@contextmanager
def temporary(parent: Path, folder: bool = True) -> Iterator[Path]:
    """A new temporary folder or file in `parent`, deleted when the block ends; what killed
    processes left there is deleted first."""
    sweep(parent)
    path, handle = _create(parent, folder)
    try:
        try:
            yield path
        finally:
            _finish(path)
    finally:
        os.close(handle)


def sweep(parent: Path, alone: bool = False) -> None:
    """Delete what killed processes left in `parent`; a folder that one had taken away to replace
    it comes back.

    alone: no other process writes there, so leftovers are known as such without locks, too.
    """
    for path in parent.glob(f"{PREFIX}*"):
        # another user's may be alive, and a folder like /tmp belongs to all
        if not _is_own(path):
            continue
        if path.is_symlink():
            path.unlink(missing_ok=True)
            continue
        with _opened(path) as handle:
            locked = False if handle is None else try_lock(handle)
            if locked or (locked is None and alone):
                _finish(path)


def bring_back(final: Path) -> None:
    """Put the folder back if a process took it away to replace it, and was killed.

    Waits for a process that is still alive: it needs the folder's name in a moment.
    """
    if os.path.lexists(final):
        return
    for old in final.parent.glob(f"{PREFIX}*/{escape(final.name)}/old"):
        with _opened(old.parents[1]) as handle:
            if handle is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                if not os.path.lexists(final):
                    old.rename(final)
            except FileNotFoundError:  # another process has put it back
                pass
            except OSError as error:
                raise cannot_write(final, error) from error


def bring_all_back(parent: Path) -> None:
    """`bring_back` for every folder in `parent`."""
    for old in parent.glob(f"{PREFIX}*/*/old"):
        bring_back(parent / old.parent.name)


def _create(parent: Path, folder: bool) -> tuple[Path, int]:
    """A new temporary folder or file, locked; its path and the handle that holds the lock."""
    while True:
        path = parent / f"{PREFIX}{secrets.token_hex(4)}"
        try:
            if folder:
                path.mkdir(mode=0o700)
            else:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        try:
            handle = os.open(path, os.O_RDONLY)
            if try_lock(handle) is not False and os.path.samestat(os.fstat(handle), path.stat()):
                return path, handle
            os.close(handle)
        except FileNotFoundError:
            pass  # another process took it for a leftover before the lock


def _finish(path: Path) -> None:
    """Delete what is temporary; the folder that it holds in the place of another comes back."""
    for old in path.glob("*/old"):
        final = path.parent / old.parent.name
        # renamed before it is deleted, so that a part of it never comes back
        old.rename(old.with_name("gone") if os.path.lexists(final) else final)
    if path.is_dir():
        # a leftover that cannot be deleted is no reason to fail
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _put(new: Path, final: Path) -> None:
    """Give the new folder its name; an old one takes the new one's, and is deleted with it."""
    if not os.path.lexists(final):
        new.rename(final)
    elif not _exchange(new, final):
        final.rename(new.with_name("old"))
        new.rename(final)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _refuse_second_writer(final: Path, place: Path) -> None:
    """Raises UsageError where another process has begun to write `final`."""
    for other in final.parent.glob(f"{PREFIX}*"):
        if other == place or not (other / final.name / "new").is_dir():
            continue
        with _opened(other) as handle:
            if handle is not None and try_lock(handle) is False:
                raise UsageError(
                    f"Another process is writing {final}. Wait for it, or choose another place."
                )


def _is_own(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.geteuid()
    except FileNotFoundError:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """A handle for locks, without following a link or waiting for a pipe; None where there is
    none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        handle = None
    try:
        yield handle
    finally:
        if handle is not None:
            os.close(handle)
