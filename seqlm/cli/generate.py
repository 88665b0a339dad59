"""seqlm generate: a run -> text, streamed."""

import secrets
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from seqlm.cli._app import Device, OwnCell, RunName, Step, Threads, command
from seqlm.errors import InputError, UsageError
from seqlm.ui import Screen

BETWEEN_SAMPLES = "----"


@command("generate")
def generate(
    screen: Screen,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Text to continue; - for stdin.")
    ] = None,
    run: RunName = None,
    step: Step = "best",
    chars: Annotated[int, typer.Option(metavar="N", help="Characters to write.")] = 500,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 is greedy, 1 as trained, above 1 wilder.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Only the K likeliest; 0 all.")] = 0,
    top_p: Annotated[float, typer.Option(metavar="P", help="Only the likeliest, to P.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(metavar="P", help="Only those at least P times the likeliest.")
    ] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may repeat.")
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Texts to write.")] = 1,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Makes it repeatable; random by default.")
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE|-", help="The prompt from a file.")
    ] = None,
    cell: OwnCell = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Continue a prompt, or write from nothing.  The prompt is written before its continuation.

    seqlm generate "ROMEO:"   ·   seqlm generate --temperature 0.7 --chars 2000
    """
    if prompt is not None and prompt_file is not None:
        raise UsageError("Both a PROMPT and --prompt-file are given. Choose one.")
    if samples < 1:
        raise UsageError(f"--samples {samples}: it must be at least 1.")
    text = _prompt(prompt, prompt_file)
    seed = secrets.randbelow(2**31) if seed is None else seed
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)

    from seqlm import api

    loaded = api.load(run, step, device=device or "auto", cell=cell, threads=threads or 0)
    for warning in loaded.warnings:
        screen.warn(warning)
    screen.note(f"{loaded.path}, step {loaded.step}, seed {seed}")
    options |= dict(stop=tuple(stop or ()), chars=chars)
    texts, timed, seconds = [], 0, 0.0
    for number in range(samples):
        pieces = loaded.stream(text, seed=seed + number, **options)
        if not screen.json:
            screen.write(f"\n{BETWEEN_SAMPLES}\n{text}" if number else text)
        first = _show(screen, [next(pieces, "")])
        began = time.perf_counter()  # after the first piece, which waits for the prompt
        rest = _show(screen, pieces)
        seconds += time.perf_counter() - began
        timed += len(rest)
        texts.append(first + rest)
    if screen.json:
        result = {
            "run": str(loaded.path),
            "step": loaded.step,
            "prompt": text,
            "text": texts[0],
            "texts": texts,
            "seed": seed,
            "chars": sum(map(len, texts)),
            "seconds": seconds,
            "chars_per_second": timed / seconds if timed else None,
        }
        screen.product(result, "text", [])
    elif not texts[-1].endswith("\n"):
        screen.end_line()


def _prompt(prompt: str | None, prompt_file: str | None) -> str:
    if prompt is None and prompt_file is None:
        return ""
    if prompt not in (None, "-"):
        return prompt
    source = prompt_file or "-"
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise InputError(f"--prompt-file {source}: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"The prompt is not UTF-8: byte at offset {error.start}. Convert it to UTF-8."
        ) from None


def _show(screen: Screen, pieces: Iterable[str]) -> str:
    """Write the pieces as they come, unless JSON is wanted; the whole of them."""
    shown = ""
    for piece in pieces:
        if not screen.json:
            screen.write(piece)
        shown += piece
    return shown
