"""generate --interactive: a line in, a continuation out, and the state is kept between them."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from seqlm.cli._app import LARGEST_TEXT
from seqlm.cli._flags import temperatures
from seqlm.errors import SeqlmError, UsageError, unknown
from seqlm.files import require_place
from seqlm.text.sources import standard_input
from seqlm.ui import Screen

if TYPE_CHECKING:
    from seqlm.generation.context import Context
    from seqlm.run import Run

COMMANDS = {
    "/reset": "forget everything: begin a new text",
    "/save": "FILE: save the state, for --load-state",
    "/temperature": "T: change the temperature",
    "/help": "show these commands; a line that begins with // begins with one / for the model",
    "/quit": "end, as the end of the input does",
}


def converse(
    screen: Screen,
    run: "Run",
    start: bytes,
    seed: int,
    options: dict[str, Any],
    known: Callable[[bytes], bytes],
) -> None:
    """Continue a prompt, and then each line of the input, until its end or /quit.

    known: gives the part of a line that the vocabulary knows.
    """
    session = _Session(screen, run, seed, options)
    if start:
        screen.write_text(start.decode("utf-8", "replace"))
        session.go_on(start)
    for line in _lines():
        try:
            if not line.startswith(b"/") or line.startswith(b"//"):
                session.go_on(known(line[1:] if line.startswith(b"//") else line))
            elif not session.obey(*os.fsdecode(line).split(maxsplit=1)):
                break
        except SeqlmError as error:
            screen.error(error)
    if options["save_state"] is not None:
        session.save(options["save_state"])


class _Session:
    """The text so far, as the model's context, and how it goes on."""

    def __init__(self, screen: Screen, run: "Run", seed: int, options: dict[str, Any]):
        from seqlm.generation.generate import Rules, Sampling

        self.sampling = Sampling.of(options)
        self.rules = {name: options[name] for name in ("chars", "stop", "allow", "ban", "regex")}
        # both raise errors, which should come before the first line is read
        Rules.of(run.tokenizer, **self.rules)
        if options["save_state"] is not None:
            require_place(options["save_state"])
        self.screen, self.run, self.seed, self.number = screen, run, seed, 0
        self.context: Context | None = None  # None: the beginning of a text
        if options["load_state"] is not None:
            self.context = run.load_context(options["load_state"])

    def go_on(self, text: bytes) -> None:
        """Read a text and write its continuation, until Ctrl-C at the latest."""
        from seqlm.generation.generate import generate_many

        tail = ""
        with _ctrl_c() as pressed:
            pieces = generate_many(
                self.run.model,
                self.run.tokenizer,
                text,
                seed=self.seed,
                numbers=(self.number,),
                sampling=self.sampling,
                after=self.context,
                keep=partial(setattr, self, "context"),
                halted=pressed.is_set,
                **self.rules,
            )
            for _, piece, _ in self.run.runtime.each(pieces):
                self.screen.write_text(piece)
                tail = piece or tail
        if not tail.endswith("\n"):
            self.screen.write("\n")
        self.number += 1

    def obey(self, command: str, value: str = "") -> bool:
        """Carry out a command.  Returns False for the one that ends the session."""
        if command not in COMMANDS:
            raise unknown("command", command, COMMANDS)
        if command in ("/save", "/temperature") and not value:
            raise UsageError(f"{command} needs a value: {command} {COMMANDS[command]}.")
        if command == "/reset":
            self.context = None
        elif command == "/save":
            self.save(value)
        elif command == "/temperature":
            try:
                self.sampling = replace(self.sampling, temperature=temperatures(value))
            except UsageError as error:  # it names the option
                raise UsageError(str(error).replace("--temperature", command)) from None
        elif command == "/help":
            self.screen.note(*(f"{name} {text}" for name, text in COMMANDS.items()))
        return command != "/quit"

    def save(self, path: str | Path) -> None:
        from seqlm.generation.context import read

        with self.run.runtime.active():
            now = read(self.run.model, self.run.tokenizer, "", self.context)
        self.run.save_context(path, now)


def _lines() -> Iterator[bytes]:
    """The lines of standard input; at a terminal they can be edited and recalled."""
    if sys.stdin is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        for line in iter(partial(standard_input().readline, LARGEST_TEXT), b""):
            yield line.removesuffix(b"\n")
        return
    with suppress(ImportError):  # Python may be built without it
        import readline  # noqa: F401 - changes input()
    while True:
        try:
            line = os.fsencode(input("> "))
        except EOFError:
            print()
            return
        yield line


@contextmanager
def _ctrl_c() -> Iterator[Event]:
    """An event that Ctrl-C sets during the block, in place of ending the command."""
    pressed = Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
