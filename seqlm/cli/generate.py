"""seqlm generate: a run -> text, printed as it is generated."""

import fcntl
import os
import secrets
import stat
import sys
import termios
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from seqlm.cli._app import command, read_source
from seqlm.cli._flags import Rounding, argument, flag, switch, temperatures
from seqlm.cli._interactive import converse
from seqlm.cli._texts import novelty_of, novelty_rows, write, write_items
from seqlm.config import CHARS, DOCUMENT_CHARS
from seqlm.errors import UsageError
from seqlm.ui import Screen

if TYPE_CHECKING:
    from seqlm.run import Run

PROMPT, TEXT, SAMPLING, STATE = "Prompt", "Text", "Sampling", "State"  # panels of --help


@command(
    "generate",
    'seqlm generate "ROMEO:"',
    "seqlm generate --temperature 0.7 --chars 2000",
    "cat start.txt | seqlm generate - --run poems-lem",
)
def generate(
    screen: Screen,
    reading: Rounding,
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
    samples: Annotated[int, flag("Number of texts.", TEXT, "N")] = 1,
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
    interactive: Annotated[
        bool,
        switch(
            "Continue line after line, and keep the state. /help shows commands.",
            TEXT,
            "--interactive",
            "-i",
        ),
    ] = False,
    temperature: Annotated[
        str,
        flag(
            "0: always the most likely symbol; above 1: more random. Several values, such as "
            "0.3,0.8, go from the first to the last over --chars.",
            SAMPLING,
            "T[,T...]",
        ),
    ] = "1",
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
    regex: Annotated[
        str | None, flag("What the whole text matches, without the prompt.", SAMPLING, "REGEX")
    ] = None,
    repetition_penalty: Annotated[
        float, flag("Above 1: the last 64 symbols become less likely.", SAMPLING, "R")
    ] = 1.0,
    novelty: Annotated[
        bool,
        switch("Show how much of the texts is copied from the training text.", TEXT, "--novelty"),
    ] = False,
    seed: Annotated[
        int | None, flag("Random seed: repeats a text. Default: a new one.", SAMPLING, "N")
    ] = None,
    load_state: Annotated[
        Path | None, flag("Go on from a state that --save-state wrote.", STATE, "FILE")
    ] = None,
    save_state: Annotated[
        Path | None,
        flag("Save the model's state after the text. --chars 0: after the prompt.", STATE, "FILE"),
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
    alone = {"--stop": stop, "--load-state": load_state, "--save-state": save_state}
    if items and any(alone.values()):
        named = next(name for name, value in alone.items() if value)
        raise UsageError(
            f"{named} has no effect with --unique, --new or --jsonl, whose texts are whole."
        )
    if jsonl and screen.json:
        raise UsageError("Both --json and --jsonl are given. Keep one of them.")
    if novelty and screen.quiet and not screen.json:
        raise UsageError("--novelty prints beside the text, and --quiet hides that. Remove one.")
    if interactive:
        stdin = "-" in (prompt, prompt_file)
        _refuse_beside_interactive(screen, items, novelty, samples, stdin)
    _hint(screen, reading, prompt, given or ["--interactive"] * interactive)
    raw = _read_prompt(prompt, prompt_file)
    seed = secrets.randbelow(2**31) if seed is None else seed

    options: dict[str, Any] = dict(temperature=temperatures(temperature))
    options |= dict(top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    options |= dict(allow=allow, ban=ban or "", regex=regex)
    _check(chars, save_state is not None, options)
    loaded = reading.load(screen)
    known = _known(screen, loaded, raw, on_unknown)
    options["chars"] = _chars(loaded, chars, options["temperature"])
    if novelty:
        loaded.corpus()  # an error before anything is generated, if it is missing
    screen.note(f"{loaded.path}, step {loaded.step}, seed {seed}")
    if items:
        options |= dict(unique=unique, new=new)
        result = write_items(screen, loaded, known, samples, seed, options, jsonl)
    else:
        options |= dict(stop=tuple(stop or ()), load_state=load_state, save_state=save_state)
        if interactive:
            skip = partial(_known, screen, loaded, on_unknown=on_unknown)
            converse(screen, loaded, known, seed, options, skip)
            return
        result = write(screen, loaded, known, samples, seed, options, keep=novelty)
    if novelty:
        result["novelty"] = novelty_of(screen, loaded, result["texts"])
        screen.aside(novelty_rows(result["novelty"]))
    if screen.json:
        screen.product(result, "text", [])


def _refuse_beside_interactive(
    screen: Screen, items: bool, novelty: bool, samples: int, reads: bool
) -> None:
    """Raises UsageError for options that contradict --interactive.

    items: whether texts are whole documents.  reads: whether the prompt is standard input.
    """
    others = {"--json": screen.json, "--unique, --new or --jsonl": items}
    others |= {
        "--novelty": novelty,
        "--samples": samples > 1,
        "a prompt from standard input": reads,
    }
    for name, present in others.items():
        if present:
            raise UsageError(f"--interactive and {name} do not go together. Keep one of them.")


def _check(chars: int | None, saves: bool, options: dict[str, Any]) -> None:
    """Raises UsageError for a number out of range, before a run is loaded.

    saves: whether --save-state is given, which needs no characters.
    """
    from seqlm.generation.generate import Sampling, check_chars

    check_chars(CHARS if chars is None else chars, 0 if saves else 1)
    Sampling.of(options)


def _chars(run: "Run", chars: int | None, temperatures: tuple[float, ...]) -> int:
    """--chars or its default.  Raises UsageError where temperatures need a length to go over."""
    if chars is not None or run.tokenizer.end is None:
        return CHARS if chars is None else chars
    if len(temperatures) > 1:
        raise UsageError(
            "Several temperatures go from the first to the last over --chars, and a document may "
            "have any length. Give --chars."
        )
    return DOCUMENT_CHARS


def _known(screen: Screen, run: "Run", prompt: bytes, on_unknown: str) -> bytes:
    """The prompt without what --on-unknown skips."""
    from seqlm.text.tokenizer import encode_known

    _, known, skipped = encode_known(run.tokenizer, prompt, on_unknown)
    if skipped:
        screen.warn(
            "Characters of the prompt that are not in the vocabulary and were skipped: "
            f"{skipped:,}."
        )
    return known


def _hint(screen: Screen, reading: Rounding, prompt: str | None, given: list[str]) -> None:
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


def _read_prompt(prompt: str | None, prompt_file: str | None) -> bytes:
    if prompt is None and prompt_file is None:
        return b""
    if prompt not in (None, "-"):
        return os.fsencode(prompt)  # the original bytes of the command line
    return read_source("--prompt-file", prompt_file or "-")
