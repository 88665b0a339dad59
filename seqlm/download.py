"""Files from the network: resumed where they were cut, and never taken for whole when they are not.

    <folder>/input.txt  input.txt.part  input.txt.sha256

A `.part` is what has come so far.  The hash of a file is recorded when its content first proved
right, and holds from then on.
"""

import http.client
import os
from collections.abc import Callable
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from seqlm import __version__
from seqlm.errors import InputError
from seqlm.storage import cannot_write, sha256, write_file

TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 18
CANNOT_RESUME = 416  # HTTP: the range that is asked for is not there
Tick = Callable[[float, str], None]  # called now and then with the share that is done, and a word


class NoDownload(InputError):
    """A download that did not come through, and why."""


def fetch(address: str, path: Path, tick: Tick) -> None:
    """Download `address` to `path`, going on where an earlier call was cut.

    A cut connection is tried again for as long as every try brings something.
    Raises NoDownload with what went wrong; what has come so far stays for the next call.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = -1
        while before < (here := _size(part)):
            before = here
            if _go_on(address, part, tick):
                os.replace(part, path)
                return
    except HTTPError as error:
        raise NoDownload(f"{address} answers {error.code} {error.reason}.") from error
    except (URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise NoDownload(f"{address} cannot be reached: {reason}.") from error
    except OSError as error:
        raise cannot_write(part, error) from error
    raise NoDownload(f"The connection to {address} was cut after {_size(part):,} bytes.")


def _go_on(address: str, part: Path, tick: Tick) -> bool:
    """Read what the server still has to give; True when all of it came."""
    done = _size(part)
    headers = {"User-Agent": f"seqlm/{__version__}"}
    if done:
        headers["Range"] = f"bytes={done}-"
    try:
        answer = urlopen(Request(address, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != CANNOT_RESUME or not done:
            raise
        part.unlink()  # longer than what the server has: it was of another file
        return _go_on(address, part, tick)
    with answer:
        resumed = answer.status == 206
        if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            raise NoDownload(f"{address} answers with another part than the one asked for.")
        done = done if resumed else 0
        left = answer.headers.get("Content-Length")
        total = None if left is None else done + int(left)
        with part.open("ab" if resumed else "wb") as file:
            try:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    done += len(chunk)
                    tick(done / total if total else 0.0, f"downloaded {done / 1e6:,.1f} MB")
            except (ConnectionError, TimeoutError, http.client.IncompleteRead):
                return False
    return total is None or done == total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def is_as_recorded(path: Path) -> bool:
    """Whether the file is still the one whose hash was recorded, or none was."""
    record = _record(path)
    return not record.exists() or record.read_text(encoding="utf-8").strip() == sha256(path)


def record(path: Path) -> None:
    """Remember the hash of a file whose content proved right."""
    if not _record(path).exists():
        write_file(_record(path), f"{sha256(path)}\n")


def forget(path: Path) -> None:
    """Delete a download that proved wrong."""
    path.unlink()
    _record(path).unlink(missing_ok=True)
