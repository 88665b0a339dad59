"""Files from the network: a cut download is resumed, and only a complete file gets its name.

    <folder>/input.txt  input.txt.part  input.txt.from

`.part` holds what has come so far; `.from` names the version of the file on the server.  Whether
the content is right is checked against published hashes: corpora.py.
"""

import http.client
import os
import re
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from seqlm import __version__
from seqlm.errors import InputError
from seqlm.files import cannot_write
from seqlm.progress import OnProgress

TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 18
CANNOT_RESUME = 416  # HTTP: the range that is asked for is not there


class NoDownload(InputError):
    """A download that did not come through, and why."""


def fetch(address: str, path: Path, tick: OnProgress) -> None:
    """Download `address` to `path`, going on where an earlier call was cut.

    A cut connection is tried again for as long as every try brings something.
    Raises NoDownload with what went wrong; what has come so far stays for the next call.
    """
    part, version = _beside(path, ".part"), _beside(path, ".from")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = -1
        while before < (here := _size(part)):
            before = here
            if _go_on(address, part, version, tick):
                os.replace(part, path)
                version.unlink(missing_ok=True)
                return
    except HTTPError as error:
        raise NoDownload(f"{address} answers {error.code} {error.reason}.") from error
    except (URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise NoDownload(f"{address} cannot be reached: {reason}.") from error
    except OSError as error:
        raise cannot_write(part, error) from error
    raise NoDownload(f"The connection to {address} was cut after {_size(part):,} bytes.")


def _go_on(address: str, part: Path, version: Path, tick: OnProgress) -> bool:
    """Read what the server still has to give; True when all of it came."""
    done = _size(part)
    headers = {"User-Agent": f"seqlm/{__version__}", "Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
        if version.exists():  # of another version the server then gives all
            headers["If-Range"] = version.read_text(encoding="utf-8").strip()
    try:
        answer = urlopen(Request(address, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != CANNOT_RESUME or not done:
            raise
        if error.headers.get("Content-Range") == f"bytes */{done}":
            return True  # all of it had come
        part.unlink()  # it was of another file
        return _go_on(address, part, version, tick)
    with answer:
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise NoDownload(f"{address} answers with a packed file, which was not asked for.")
        resumed = answer.status == http.client.PARTIAL_CONTENT
        if not resumed:
            done, total = 0, answer.length
            named = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            # a weak one does not tell bytes apart
            version.unlink(missing_ok=True)
            if named and not named.startswith("W/"):
                version.write_text(named, encoding="utf-8")
        else:
            given = re.fullmatch(
                r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", "")
            )
            if given is None or int(given[1]) != done:
                raise NoDownload(f"{address} answers with another part than the one asked for.")
            total = None if given[2] == "*" else int(given[2])
        with part.open("ab" if resumed else "wb") as file:
            while chunk := _read(answer):
                file.write(chunk)
                done += len(chunk)
                tick(done / total if total else 0.0, f"downloaded {done / 1e6:,.1f} MB")
    if total is None:  # of a range, the server's next answer says whether there is more
        return not resumed
    return done == total


def _read(answer: http.client.HTTPResponse) -> bytes:
    """The next bytes; none where the connection is cut."""
    try:
        return answer.read(CHUNK)
    except (OSError, http.client.HTTPException):
        return b""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)
