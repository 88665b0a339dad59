"""seqlm generate: a run -> text, printed as it is generated."""

import fcntl
import os
import secrets
import stat
import sys
import termios
import time
from collections.abc import Iterable, Iterator
from io import StringIO
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

from seqlm.cli._app import command, read_source
from seqlm.cli._flags import Reading, argument, flag, switch
from seqlm.config import CHARS, DOCUMENT_CHARS
from seqlm.errors import InputError, UsageError
from seqlm.ui import Screen

if TYPE_CHECKING:
    from seqlm.api import Run

PROMPT, TEXT, SAMPLING = "Prompt", "Text", "Sampling"  # panels of --help
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
        str | None, argument("Text to continue; -: standard input.", "PROMPT")
    ] = None,
    prompt_option: Annotated[
        str | None, flag("The same as PROMPT.", PROMPT, "TEXT", "--prompt")
    ] = None,
    prompt_file: Annotated[
        str | None, flag("Read the prompt from a file.", PROMPT, "FILE|-")
    ] = None,
    on_unknown: Annotated[
        str, flag("Stop at an unknown character of the prompt, or skip it.", PROMPT, "error|skip")
    ] = "error",
    chars: Annotated[
        int | None, flag(f"Characters to generate. Default: {CHARS}, or one document.", TEXT, "N")
    ] = None,
    samples: Annotated[int, flag("Number of texts.", TEXT, "N", "--samples", "--count")] = 1,
    unique: Annotated[
        bool, switch("Documents only: no two texts are alike.", TEXT, "--unique")
    ] = False,
    new: Annotated[
        bool, switch("Documents only: no text is in the run's corpus.", TEXT, "--new")
    ] = False,
    jsonl: Annotated[
        bool,
        switch("Documents only: a JSON object with text and bits for each text.", TEXT, "--jsonl"),
    ] = False,
    stop: Annotated[
        list[str] | None, flag("End the text before this string. May be repeated.", TEXT, "TEXT")
    ] = None,
    temperature: Annotated[
        float, flag("0: always the most likely symbol; above 1: more random.", SAMPLING, "T")
    ] = 1.0,
    top_k: Annotated[
        int, flag("Sample from the K most likely symbols; 0: from all.", SAMPLING, "K")
    ] = 0,
    top_p: Annotated[
        float, flag("Sample from the most likely symbols with total probability P.", SAMPLING, "P")
    ] = 1.0,
    min_p: Annotated[
        float, flag("Sample from symbols at least P times as likely as the best.", SAMPLING, "P")
    ] = 0.0,
    allow: Annotated[
        str | None, flag("The only characters that may occur.", SAMPLING, "CHARACTERS")
    ] = None,
    ban: Annotated[
        str | None, flag("Characters that may not occur.", SAMPLING, "CHARACTERS")
    ] = None,
    seed: Annotated[
        int | None, flag("Random seed: repeats a text. Default: a new one.", SAMPLING, "N")
    ] = None,
) -> None:
    """Generate text: print the prompt, if any, and continue it."""
    ways = {"a PROMPT": prompt, "--prompt": prompt_option, "--prompt-file": prompt_file}
    given = [way for way, value in ways.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"Both {given[0]} and {given[1]} are given. Keep one of them.")
    prompt = prompt_option if prompt is None else prompt
    if samples < 1:
        raise UsageError(f"--samples {samples}: it must be at least 1.")
    items = unique or new or jsonl
    if items and stop:
        raise UsageError(
            "--stop has no effect with --unique, --new or --jsonl, whose texts are whole."
        )
    if jsonl and screen.json:
        raise UsageError("Both --json and --jsonl are given. Keep one of them.")
    _hint(screen, reading, prompt, given)
    raw = _read_prompt(prompt, prompt_file)
    seed = secrets.randbelow(2**31) if seed is None else seed

    from seqlm.text.tokenizer import ByteTokenizer, without_unknown

    loaded = reading.load(screen)
    if loaded.tokenizer.unit != ByteTokenizer.unit:
        _refuse_bytes(raw)
    known, dropped = without_unknown(loaded.tokenizer, raw, on_unknown)
    if dropped:
        screen.warn(
            f"{dropped:,} characters of the prompt are not in the vocabulary and were skipped."
        )
    options: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if chars is None:
        chars = CHARS if loaded.tokenizer.end is None else DOCUMENT_CHARS
    options |= dict(stop=tuple(stop or ()), chars=chars, allow=allow, ban=ban or "")
    screen.note(f"{loaded.path}, step {loaded.step}, seed {seed}")
    if items:
        del options["stop"]
        options |= dict(unique=unique, new=new)
        result = _write_items(screen, loaded, known, samples, seed, options, jsonl)
    else:
        result = _write(screen, loaded, known, samples, seed, options)
    if screen.json:
        screen.product(result, "text", [])


def _hint(screen: Screen, reading: Reading, prompt: str | None, given: list[str]) -> None:
    """Say so if the prompt is also the name of a run, or if text is piped in and not read."""
    from seqlm.store import runs

    if prompt and reading.run is None and runs.named(prompt):
        screen.note(
            f"{prompt} is used as the prompt. It is also a run; to use the run: --run {prompt}"
        )
    if not given and _has_unread_input():
        screen.note("Standard input is not read. To continue the text in it: seqlm generate -")


def _has_unread_input() -> bool:
    """Whether standard input is a file or a pipe with text in it; does not wait for input."""
    if sys.stdin is None:
        return False
    try:
        number = sys.stdin.fileno()
        kind = os.fstat(number)
        if stat.S_ISREG(kind.st_mode):
            return kind.st_size > os.lseek(number, 0, os.SEEK_CUR)
        if stat.S_ISFIFO(kind.st_mode):
            waiting = fcntl.ioctl(number, termios.FIONREAD, bytes(4))
            return int.from_bytes(waiting, sys.byteorder) > 0
    except OSError:  # closed, or not a file of the system
        pass
    return False


def _write(
    screen: Screen, run: "Run", start: bytes, samples: int, seed: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Write the samples as they come, each after the prompt; returns the result for --json."""
    texts: list[list[str]] = []  # only for JSON, because a text may be very long
    chars, begun = 0, -1
    lines = run.tokenizer.documents == "lines"
    tail = ""  # the last piece that was written
    prompt = start.decode("utf-8", "replace")
    pieces = _in_order(run.samples(start, samples, seed=seed, **options))
    first = next(pieces)  # reads the prompt, which the rate does not include
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
        **_about(run, start, seed),
        "text": "".join(chain.from_iterable(texts[:1])),
        "texts": list(map("".join, texts)),
        "chars": chars,
        "seconds": seconds,
        "chars_per_second": timed / seconds if timed else None,
    }


def _write_items(
    screen: Screen,
    run: "Run",
    start: bytes,
    count: int,
    seed: int,
    options: dict[str, Any],
    jsonl: bool,
) -> dict[str, Any]:
    """Write documents as they are found, one to a line; returns the result for --json."""
    texts: list[str] = []
    began = time.perf_counter()
    for text in run.items(count, start, seed=seed, **options):
        texts.append(text)
        if jsonl:
            screen.json_line({"text": text, "bits": run.document_bits([text])[0]})
        elif not screen.json:
            between = f"\n{BETWEEN_SAMPLES}" if run.tokenizer.documents == "files" else ""
            screen.write_text(f"{text}{between}\n")
    seconds = time.perf_counter() - began
    return {
        **_about(run, start, seed),
        "text": texts[0],
        "texts": texts,
        "bits": run.document_bits(texts) if screen.json else [],
        "chars": sum(map(len, texts)),
        "seconds": seconds,
        "chars_per_second": sum(map(len, texts)) / seconds,
    }


def _about(run: "Run", start: bytes, seed: int) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "step": run.step,
        "prompt": start.decode("utf-8", "replace"),
        "seed": seed,
        "device": run.runtime.device.value,
        "backend": run.runtime.backend.value,
    }


def _in_order(pieces: Iterable[tuple[int, str, bool]]) -> Iterator[tuple[int, str]]:
    """One text after the other; pieces of a later text wait until the earlier ones have ended."""
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
        return os.fsencode(prompt)  # the original bytes of the command line
    return read_source("--prompt-file", prompt_file or "-")


def _refuse_bytes(prompt: bytes) -> None:
    """Raises InputError for a prompt that is not UTF-8; only a byte model can read it."""
    try:
        prompt.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"The prompt is not UTF-8: byte at offset {error.start}. Convert it to UTF-8."
        ) from None
