"""seqlm compress and decompress: a file, and a model that makes it small."""

import gzip
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from seqlm.cli._app import command, read_source, refuse_input
from seqlm.cli._flags import Reading, argument, flag
from seqlm.errors import UsageError
from seqlm.extras import extra
from seqlm.ui import Screen, pairs

if TYPE_CHECKING:
    from seqlm.progress import OnProgress
    from seqlm.run import Run

    Convert = Callable[[Run, bytes, OnProgress], bytes]

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
    from seqlm.lab.compress import pack

    zstd = extra("zstandard", "compress")  # before the minutes that compressing may take
    run, data, packed = _converted(screen, reading, source, out, "compressing", pack)
    result = {
        **_about(run, out),
        "bytes": len(data),
        "packed_bytes": len(packed),
        "bits_per_byte": 8 * len(packed) / len(data) if data else None,
        "gzip_bytes": len(gzip.compress(data, 9)),
        "xz_bytes": len(lzma.compress(data, preset=9)),
        "zstd_bytes": len(zstd.compress(data, 19)),
    }
    screen.product(result, "packed_bytes", pairs(result, [*result]))


@command("decompress", "seqlm decompress letter.packed --out letter.txt")
def decompress(
    screen: Screen,
    reading: Reading,
    source: Annotated[str, argument("File to unpack.", "FILE|-")],
    out: Out,
) -> None:
    """Unpack a file that seqlm compress wrote; it needs the same model."""
    from seqlm.lab.compress import unpack

    run, _, data = _converted(screen, reading, source, out, "decompressing", unpack)
    result = {**_about(run, out), "bytes": len(data)}
    screen.product(result, "bytes", pairs(result, [*result]))


def _converted(
    screen: Screen, reading: Reading, source: str, out: Path, doing: str, convert: "Convert"
) -> "tuple[Run, bytes, bytes]":
    """Write the converted source to `out`; returns the run, the source and what was written.

    It computes on one thread, so that all sums are added in one order.
    """
    if reading.threads not in (None, 1):
        raise UsageError(
            f"--threads {reading.threads}: this command computes on one thread. Remove --threads."
        )
    run = replace(reading, threads=1).load(screen)

    from seqlm.temporary import write_lines

    refuse_input("--out", out, source)
    data = read_source("FILE", source)
    with screen.progress(doing) as bar:
        made = convert(run, data, bar.update)
    write_lines(out, [made])
    return run, data, made


def _about(run: "Run", out: Path) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "step": run.step,
        "out": str(out),
        "backend": run.runtime.backend.value,
    }
