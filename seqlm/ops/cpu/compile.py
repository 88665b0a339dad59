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

# numba's own division stops for zeros, which would keep loops from becoming vector instructions
INNER: dict[str, Any] = dict(error_model="numpy", fastmath={"contract", "nsz", "arcp"})
REASSOCIATED = {*INNER["fastmath"], "reassoc"}  # for sums over a row: several partial sums at once
STALE = 7 * 24 * 3600  # seconds after which other sources' compiled code is deleted


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile, and keep on disk if there is a place that can be written to."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        loop = njit(nogil=True, **{**INNER, **options})(function)
        with suppress(RuntimeError):  # no such place: it is compiled again in every process
            loop._cache = _Cache(function)
        return loop

    return decorate


def part(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile into every loop that calls it.

    numba would keep a function of its own on disk once for each loop that calls it, under one name,
    and the loops loaded first would decide which one a process runs: they differ in a number's last
    bit.  Neither Python nor C calls a part, so the wrappers for that are left out.
    """
    unwrapped: dict[str, Any] = dict(no_cpython_wrapper=True, no_cfunc_wrapper=True)
    return njit(forceinline=True, **unwrapped, **{**INNER, **options})


def _hash_of_sources() -> str:
    digest = sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


SOURCES = _hash_of_sources()


def _in_own_folder(place: Any) -> Any:
    """One of numba's places for compiled code, with a folder in it for these sources.

    numba only notices a change in the file of a loop itself.  The parts stand in other files, so
    the name of the folder is the hash of all of them.
    """

    class OwnFolder(place):  # type: ignore[misc]  # numba has no types for its places
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
    """Delete the folders of other sources beside this one that nobody has written to for a week.

    Another process may still run those sources: it then compiles again what it has not yet loaded.
    """
    for other in folder.parent.glob("seqlm-*"):
        try:
            stale = other != folder and time.time() - other.stat().st_mtime > STALE
        except OSError:  # another process has just deleted it
            continue
        if stale:
            shutil.rmtree(other, ignore_errors=True)


class _Places(caching.CompileResultCacheImpl):
    _locator_classes = [  # noqa: RUF012  # numba declares no class variable
        _in_own_folder(place) for place in caching.CompileResultCacheImpl._locator_classes
    ]


class _Cache(caching.FunctionCache):
    _impl_class = _Places

    def save_overload(self, sig: Any, data: Any) -> None:
        # a full disk: the loop runs, and the next process compiles it again
        with suppress(OSError):
            super().save_overload(sig, data)
