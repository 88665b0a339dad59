"""Writes generated texts as they come, and collects them for --json."""

import time
from collections.abc import Iterable, Iterator
from io import StringIO
from itertools import chain
from typing import TYPE_CHECKING, Any

from seqlm.ui import Screen

if TYPE_CHECKING:
    from seqlm.run import Run

BETWEEN_SAMPLES = "----"


def write(
    screen: Screen,
    run: "Run",
    start: bytes,
    samples: int,
    seed: int,
    options: dict[str, Any],
    keep: bool = False,
) -> dict[str, Any]:
    """Write the samples as they come, each after the prompt; returns the result for --json.

    keep: whether the result has the texts also without --json; a text may be very long.
    """
    texts: list[list[str]] = []
    chars, begun = 0, -1
    lines = run.tokenizer.documents == "lines"
    tail = ""  # the last piece that was written
    # a prompt that is only read, for --save-state, may be very long
    prompt = start.decode("utf-8", "replace") if options["chars"] else ""
    pieces = in_order(run.samples(start, samples, seed=seed, **options))
    first = next(pieces)  # reads the prompt, which the rate does not include
    began = time.perf_counter()
    for number, piece in chain([first], pieces):
        chars += len(piece)
        if screen.json or keep:
            if number == len(texts):
                texts.append([])
            texts[number].append(piece)
        if screen.json:
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


def write_items(
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
        "chars_per_second": None,  # texts that were left out took time, too
    }


def novelty_of(screen: Screen, run: "Run", texts: list[str] | None) -> dict[str, Any]:
    """The object `novelty` for --json; texts: None: the model generates one."""
    with screen.progress("searching the training text") as bar:
        found = run.novelty(texts, tick=bar.update)
    return {name: novelty.to_dict() for name, novelty in found.items()}


def novelty_rows(found: dict[str, Any]) -> list[list[Any]]:
    """A table of `novelty_of`."""
    columns = found["text"], found["held_out"]
    rows = [["novelty", "text", "val split"]]
    rows.append(["characters", *(column["chars"] for column in columns)])
    rows.append(["longest part from train", *(column["longest_chars"] for column in columns)])
    for size in found["text"]["new"]:
        shares = [column["new"][size] for column in columns]
        rows.append([f"share of new {size}-grams", *shares])
    return rows


def _about(run: "Run", start: bytes, seed: int) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "step": run.step,
        "prompt": start.decode("utf-8", "replace"),
        "seed": seed,
        "device": run.runtime.device.value,
        "backend": run.runtime.backend.value,
    }


def in_order(pieces: Iterable[tuple[int, str, bool]]) -> Iterator[tuple[int, str]]:
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
