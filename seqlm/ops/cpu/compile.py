"""How the loops are compiled, and where the compiled code is kept."""

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import caching

# numba's default division checks for zeros, and a loop with such a check is not vectorised
INNER: dict[str, Any] = dict(error_model="numpy", fastmath={"contract", "nsz", "arcp"})
# only loops call these functions, so numba need not compile what Python and C would call
UNWRAPPED: dict[str, Any] = dict(no_cpython_wrapper=True, no_cfunc_wrapper=True)
REASSOCIATED = {*INNER["fastmath"], "reassoc"}  # a sum over a row becomes several partial sums
STALE_SECONDS = 7 * 24 * 3600  # the age at which compiled code of other sources is deleted


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a loop, and keep it on disk if numba finds a folder that can be written to."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        loop = njit(nogil=True, **{**INNER, **options})(function)
        with suppress(RuntimeError):  # no such folder: every process compiles the loop again
            loop._cache = _Cache(function)
        return loop

    return decorate


def inlined(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Inline a function into every loop that calls it.

    A function that is not inlined would be stored on disk once for each loop that calls it, always
    under the same name.  The loop that is loaded first would decide which version a process runs,
    and the versions differ in a number's last bit.
    """
    return njit(forceinline=True, **UNWRAPPED, **{**INNER, **options})


def part(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function of one loop by itself: a long loop takes less time to compile in parts."""
    return njit(**UNWRAPPED, **{**INNER, **options})


def _hash_of_sources() -> str:
    digest = sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


SOURCES = _hash_of_sources()


def _in_own_folder(locator: Any) -> Any:
    """One of numba's cache locators, changed to use a folder of its own for these sources.

    numba only notices a change in the file of the loop itself.  Inlined functions are in other
    files, so the folder's name is the hash of all files.
    """

    class OwnFolder(locator):  # type: ignore[misc]  # numba has no types for its locators
        def get_cache_path(self) -> str:
            return str(Path(super().get_cache_path(), f"seqlm-{SOURCES}"))

        def get_source_stamp(self) -> str:
            return SOURCES

        def ensure_cache_path(self) -> None:
            folder = Path(self.get_cache_path())
            new = not folder.exists()
            super().ensure_cache_path()
            if new:
                remove_stale(folder)

    return OwnFolder


def remove_stale(folder: Path) -> None:
    """Delete the folders of other sources, next to this one, that were last written a week ago.

    A process that still runs those sources compiles again the loops that it has not yet loaded.
    """
    for other in folder.parent.glob("seqlm-*"):
        try:
            stale = other != folder and time.time() - other.stat().st_mtime > STALE_SECONDS
        except OSError:  # another process has just deleted it
            continue
        if stale:
            shutil.rmtree(other, ignore_errors=True)


class _CacheFiles(caching.CompileResultCacheImpl):
    _locator_classes = [  # noqa: RUF012  # numba declares no class variable
        _in_own_folder(locator) for locator in caching.CompileResultCacheImpl._locator_classes
    ]


class _Cache(caching.FunctionCache):
    _impl_class = _CacheFiles

    def save_overload(self, sig: Any, data: Any) -> None:
        # on a full disk the loop still runs, and the next process compiles it again
        with suppress(OSError):
            super().save_overload(sig, data)
