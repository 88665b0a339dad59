"""seqlm generate: a run -> text, streamed."""

import os
import secrets
import time
from collections.abc import Iterable, Iterator
from io import StringIO
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seqlm.cli._app import command, read_source
from seqlm.cli._flags import Reading
from seqlm.errors import InputError, UsageError
from seqlm.ui import Screen

if TYPE_CHECKING:
    from seqlm.api import Run

CHARS, DOCUMENT_CHARS = 500, 10_000  # unless --chars says so; a document may end earlier
BETWEEN_SAMPLES = "----"


@command(
    "generate",
    'seqlm generate "ROMEO:"',
    "seqlm generate --temperature 0.7 --chars 2000",
    "cat start.txt | seqlm generate - --run poems-lem",
)
def generate(
    screen: Screen,
    reading: Reading,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to continue; - for stdin.")
    ] = None,
    chars: Annotated[
        int | None,
        typer.Option(metavar="N", help="Characters to write; 500, or a document to its end."),
    ] = None,
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
    on_unknown: Annotated[
        str,
        typer.Option(metavar="error|skip", help="For prompt characters the vocabulary lacks."),
    ] = "error",
) -> None:
    """Write text: the prompt, if there is one, and what the model writes after it."""
    if prompt is not None and prompt_file is not None:
        raise UsageError("Both a PROMPT and --prompt-file are given. Choose one.")
    if samples < 1:
        raise UsageError(f"--samples {samples}: it must be at least 1.")
    raw = _read_prompt(prompt, prompt_file)
    seed = secrets.randbelow(2**31) if seed is None else seed

    from seqlm.text.tokenizer import ByteTokenizer, without_unknown

    loaded = reading.load(screen)
    if loaded.tokenizer.unit != ByteTokenizer.unit:
        _refuse_bytes(raw)
    known, dropped = without_unknown(loaded.tokenizer, raw, on_unknown)
    if dropped:
        screen.warn(f"{dropped:,} prompt characters that the vocabulary lacks were left out.")
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if chars is None:
        chars = CHARS if loaded.tokenizer.end is None else DOCUMENT_CHARS
    options |= dict(stop=tuple(stop or ()), chars=chars)
    screen.note(f"{loaded.path}, step {loaded.step}, seed {seed}")
    result = _write(screen, loaded, known, samples, seed, options)
    if screen.json:
        screen.product(result, "text", [])


def _write(
    screen: Screen, run: "Run", start: bytes, samples: int, seed: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Write the samples as they come, each behind the prompt; what --json says of them."""
    texts: list[list[str]] = []  # only for JSON: one may be endless
    chars, begun = 0, -1
    lines = run.tokenizer.documents == "lines"
    tail = ""  # the last text that was written
    prompt = start.decode("utf-8", "replace")
    pieces = _in_order(run.samples(start, samples, seed=seed, **options))
    first = next(pieces)  # waits for the prompt, which counts in no rate
    began = time.perf_counter()
    for number, piece in chain([first], pieces):
        chars += len(piece)
        if screen.json:
            if number == len(texts):
                texts.append([])
            texts[number].append(piece)
            continue
        if number != begun:
            if number and not lines:
                screen.write(f"\n{BETWEEN_SAMPLES}\n")
            elif number and not tail.endswith("\n"):
                screen.write("\n")
            screen.write_text(prompt)
            begun, tail = number, prompt
        screen.write_text(piece)
        tail = piece or tail
    seconds = time.perf_counter() - began
    if not screen.json and not tail.endswith("\n"):
        screen.end_line()
    timed = chars - len(first[1])
    return {
        "run": str(run.path),
        "step": run.step,
        "prompt": prompt,
        "text": "".join(chain.from_iterable(texts[:1])),
        "texts": list(map("".join, texts)),
        "seed": seed,
        "device": run.runtime.device.value,
        "backend": run.runtime.backend.value,
        "chars": chars,
        "seconds": seconds,
        "chars_per_second": timed / seconds if timed else None,
    }


def _in_order(pieces: Iterable[tuple[int, str, bool]]) -> Iterator[tuple[int, str]]:
    """One text after the other: what comes of a text before its turn waits for it."""
    waiting: dict[int, StringIO] = {}
    ended, turn = set(), 0
    for number, piece, last in pieces:
        if number == turn:
            yield number, piece
        else:
            waiting.setdefault(number, StringIO()).write(piece)
        if last:
            ended.add(number)
        while turn in ended:
            ended.remove(turn)
            turn += 1
            if turn in waiting:
                yield turn, waiting.pop(turn).getvalue()


def _read_prompt(prompt: str | None, prompt_file: str | None) -> bytes:
    if prompt is None and prompt_file is None:
        return b""
    if prompt not in (None, "-"):
        return os.fsencode(prompt)  # the bytes that the shell gave
    return read_source("--prompt-file", prompt_file or "-")


def _refuse_bytes(prompt: bytes) -> None:
    """Raises InputError for a prompt that is no text, which only a model of bytes can read."""
    try:
        prompt.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"The prompt is not UTF-8: byte at offset {error.start}. Convert it to UTF-8."
        ) from None
