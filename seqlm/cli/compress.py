"""seqlm compress and decompress: a file, and a model that makes it small."""

import gzip
import lzma
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from seqlm.cli._app import command, read_source
from seqlm.cli._flags import Reading, argument, flag
from seqlm.errors import UsageError
from seqlm.ui import Screen

if TYPE_CHECKING:
    from seqlm.api import Run

FILES = "Files"  # a panel of --help
Out = Annotated[Path, flag("File to write; an existing file is replaced.", FILES, "FILE")]


@command("compress", "seqlm compress letter.txt --out letter.packed")
def compress(
    screen: Screen,
    reading: Reading,
    source: Annotated[str, argument("File to compress; -: standard input.", "FILE|-")],
    out: Out,
) -> None:
    """Compress a file with a model; it takes one step of the model per symbol."""
    loaded = _on_one_thread(reading).load(screen)

    from seqlm.lab.compress import pack
    from seqlm.temporary import write_lines

    data = read_source("FILE", source)
    with screen.progress("compressing") as bar:
        packed = pack(loaded, data, bar.update)
    write_lines(out, [packed])
    result = {
        **_about(loaded, out),
        "bytes": len(data),
        "packed_bytes": len(packed),
        "bits_per_byte": 8 * len(packed) / len(data) if data else None,
        "gzip_bytes": len(gzip.compress(data, 9)),
        "xz_bytes": len(lzma.compress(data, preset=9)),
    }
    _print(screen, result, "packed_bytes")


@command("decompress", "seqlm decompress letter.packed --out letter.txt")
def decompress(
    screen: Screen,
    reading: Reading,
    source: Annotated[str, argument("File to unpack.", "FILE|-")],
    out: Out,
) -> None:
    """Unpack a file that seqlm compress wrote; it needs the same model."""
    loaded = _on_one_thread(reading).load(screen)

    from seqlm.lab.compress import unpack
    from seqlm.temporary import write_lines

    packed = read_source("FILE", source)
    with screen.progress("decompressing") as bar:
        data = unpack(loaded, packed, bar.update)
    write_lines(out, [data])
    _print(screen, {**_about(loaded, out), "bytes": len(data)}, "bytes")


def _on_one_thread(reading: Reading) -> Reading:
    """The flags with one thread, so that all sums are added in one order."""
    if reading.threads not in (None, 1):
        raise UsageError(
            f"--threads {reading.threads}: this command computes on one thread. Remove --threads."
        )
    return replace(reading, threads=1)


def _about(run: "Run", out: Path) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "step": run.step,
        "out": str(out),
        "backend": run.runtime.backend.value,
    }


def _print(screen: Screen, result: dict[str, Any], key: str) -> None:
    rows = [[name.replace("_", " "), value] for name, value in result.items()]
    screen.product(result, key, [["figure", "value"], *rows])
