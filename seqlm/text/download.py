"""Downloads: an interrupted one is resumed, and a file gets its name only when it is complete.

    <folder>/input.txt  input.txt.part  input.txt.from

`.part` holds the bytes received so far; `.from` holds the server's name (ETag or date) for the
version of the file.  corpora.py checks the content against published hashes.
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
BYTES_AT_ONCE = 1 << 18  # bytes
CANNOT_RESUME = 416  # HTTP: the requested range does not exist


class NoDownload(InputError):
    """A download that failed; the message gives the reason."""


def fetch(address: str, path: Path, tick: OnProgress) -> None:
    """Download `address` to `path`; resume where an earlier call was interrupted.

    After a lost connection it tries again, as long as every attempt receives some bytes.
    Raises NoDownload with the reason; the bytes received so far stay for the next call.
    """
    part, version = _beside(path, ".part"), _beside(path, ".from")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        received = -1  # bytes when the last attempt began
        while received < _size(part):
            received = _size(part)
            if _resume(address, part, version, tick):
                version.unlink(missing_ok=True)
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


def _resume(address: str, part: Path, version: Path, tick: OnProgress) -> bool:
    """Download the bytes that are still missing; True when the file is complete."""
    done = _size(part)
    headers = {"User-Agent": f"seqlm/{__version__}", "Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
        if version.exists():  # if the version has changed, the server then sends the whole file
            headers["If-Range"] = version.read_text(encoding="utf-8").strip()
    try:
        answer = urlopen(Request(address, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != CANNOT_RESUME or not done:
            raise
        if error.headers.get("Content-Range") == f"bytes */{done}":
            return True  # an earlier call received everything
        part.unlink()  # longer than the file on the server: it is from another version
        return _resume(address, part, version, tick)
    with answer:
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise NoDownload(f"{address} answers with compressed data, which was not requested.")
        resumed = answer.status == http.client.PARTIAL_CONTENT
        if not resumed:
            done, total = 0, answer.length
            tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            # first of all, or a kill would leave bytes of one version under the name of another
            part.unlink(missing_ok=True)
            version.unlink(missing_ok=True)
            # files with the same weak ETag (W/...) may differ in their bytes
            if tag and not tag.startswith("W/"):
                version.write_text(tag, encoding="utf-8")
        else:
            part_range = re.fullmatch(
                r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", "")
            )
            if part_range is None or int(part_range[1]) != done:
                raise NoDownload(f"{address} answers with another part than the one requested.")
            total = None if part_range[2] == "*" else int(part_range[2])
        with part.open("ab") as file:
            while chunk := _read(answer):
                file.write(chunk)
                done += len(chunk)
                tick(done / total if total else 0.0, f"downloaded {done / 1e6:,.1f} MB")
    if total is None:
        # the size is unknown: after a part, the next request shows whether there are more bytes
        return not resumed
    return done == total


def _read(answer: http.client.HTTPResponse) -> bytes:
    """The next bytes; b"" if the connection is lost."""
    try:
        return answer.read(BYTES_AT_ONCE)
    except (OSError, http.client.HTTPException):
        return b""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)
