"""Writing files and folders completely or not at all, even if the process is killed.

    <folder>/.tmp-seqlm-1f0c22ab/NAME       a file that is being written
             .tmp-seqlm-1f0c22ab/NAME/new   the new folder NAME; after the exchange, the old one
             .tmp-seqlm-1f0c22ab/NAME/old   the old folder, where the system cannot exchange two
             .tmp-seqlm-1f0c22ab/NAME/gone  a folder that is being deleted

A process keeps a lock on its temporary folder.  One without a lock was left by a killed process,
and the next process that writes into <folder> deletes it.
"""

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from glob import escape
from pathlib import Path

from seqlm.errors import SeqlmError, UsageError
from seqlm.files import cannot_write, make_folder, sync, try_lock

PREFIX = ".tmp-seqlm-"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # constants of Linux, from fcntl.h and linux/fs.h


def write_file(path: Path, text: str) -> None:
    """Replace the file in one step: a reader sees the old text or the new text, never a part."""
    write_lines(path, [text.encode("utf-8")])


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """`write_file` for lines from an iterator."""
    try:
        with temporary(path.parent) as place:
            new = place / path.name
            with new.open("wb") as file:
                file.writelines(lines)
            sync(new)
            new.replace(path)
            sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def new_folder(final: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A new folder to fill.  It becomes `final`, or replaces it, when the block ends without error.

    check: is called right before that; if it raises an error, `final` stays as it is.
    Raises UsageError if another process is writing `final`.
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
    """Delete the folder.  Its name disappears in one step, so nobody sees a part of it."""
    try:
        with temporary(folder.parent) as place:
            (place / folder.name).mkdir()
            folder.rename(place / folder.name / "gone")
    except OSError as error:
        raise SeqlmError(
            f"Cannot delete {folder}: {error.strerror}. Check the permissions of its files."
        ) from error


@contextmanager
def temporary(parent: Path) -> Iterator[Path]:
    """A new temporary folder in `parent`, deleted when the block ends.

    Temporary folders of killed processes are deleted first.
    """
    sweep(parent)
    path, handle = _create(parent)
    try:
        try:
            yield path
        finally:
            _finish(path)
    finally:
        os.close(handle)


def scratch() -> AbstractContextManager[Path]:
    """A `temporary` folder where the system has such folders, as for a copy of a text."""
    return temporary(Path(tempfile.gettempdir()))


def sweep(parent: Path, alone: bool = False) -> None:
    """Delete temporary folders of killed processes, and restore folders that they were replacing.

    alone: no other process writes into `parent`, so no locks are needed to recognise leftovers.
    """
    for path in parent.glob(f"{PREFIX}*"):
        # in a shared folder such as /tmp, files of other users are theirs to delete
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
    """Restore the folder if a process was killed while it replaced it.

    If that process is still alive, wait: it is about to put the new folder there.
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
            except FileNotFoundError:  # another process has restored it
                pass
            except OSError as error:
                raise cannot_write(final, error) from error


def bring_all_back(parent: Path) -> None:
    """`bring_back` for every folder in `parent`."""
    for old in parent.glob(f"{PREFIX}*/*/old"):
        bring_back(parent / old.parent.name)


def _create(parent: Path) -> tuple[Path, int]:
    """A new temporary folder, locked; returns its path and the handle that holds the lock."""
    while True:
        path = parent / f"{PREFIX}{secrets.token_hex(8)}"
        path.mkdir(mode=0o700)
        try:
            handle = os.open(path, os.O_RDONLY)
            if try_lock(handle) is not False and os.path.samestat(os.fstat(handle), path.stat()):
                return path, handle
            os.close(handle)
        except FileNotFoundError:
            pass  # before it was locked, another process deleted it as a leftover: try again


def _finish(path: Path) -> None:
    """Delete a temporary folder; an old folder in it is restored if it was not replaced."""
    for old in path.glob("*/old"):
        final = path.parent / old.parent.name
        # renamed before it is deleted, so that a half-deleted folder is never restored
        old.rename(old.with_name("gone") if os.path.lexists(final) else final)
    if path.is_dir():
        # the work itself is done, so a leftover that cannot be deleted is no error
        shutil.rmtree(path, ignore_errors=True)
    else:  # older versions wrote temporary files, too
        path.unlink(missing_ok=True)


def _put(new: Path, final: Path) -> None:
    """Move the new folder to its final name.  An old folder stays in the temporary one instead."""
    if not os.path.lexists(final):
        new.rename(final)
    elif not _exchange(new, final):
        final.rename(new.with_name("old"))
        new.rename(final)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False if the system or the file system cannot do that."""
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
    """Raises UsageError if another process has begun to write `final`."""
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
    """A handle to lock the path; None if it cannot be opened, or is a link."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        handle = None
    try:
        yield handle
    finally:
        if handle is not None:
            os.close(handle)
