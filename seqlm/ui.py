"""Output for the user: results (text, tables, JSON) on stdout; notes and progress on stderr."""

import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from seqlm.errors import PeerLost, SeqlmError
from seqlm.files import to_json

if TYPE_CHECKING:
    from rich.console import Console

LINE_EVERY = 5.0  # seconds between progress lines, if stderr is not a terminal
DRAW_EVERY = 0.1  # seconds between two drawings of the bar on a terminal
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
LAYOUT = "{desc} {percentage:3.0f}%|{bar:12}| "
SHOW_AFTER = 2.0  # seconds before any progress is shown: short work shows none


class Screen:
    """Prints what a command has to say, according to --json, --quiet, --verbose and NO_COLOR."""

    def __init__(
        self, json: bool = False, quiet: bool = False, verbose: bool = False, color: bool = True
    ):
        from rich.console import Console  # here, so that --help does not wait for it

        self.json, self.quiet, self.verbose = json, quiet, verbose
        self._muted = self._left = False
        plain = None if color else True
        self._err = Console(stderr=True, no_color=plain, highlight=False, soft_wrap=True)
        self._out = Console(no_color=plain, highlight=False)

    def mute(self, left: bool) -> None:
        """Print nothing, because another process prints the same.

        left: print an error about a lost process, as the other process may be the lost one.
        """
        self.quiet, self._muted, self._left = True, True, left

    def note(self, *texts: str) -> None:
        """Messages about what happens; -q hides them."""
        for text in () if self.quiet else texts:
            self._err.print(visible(text), style="dim", markup=False)

    def detail(self, text: str) -> None:
        """A message that only -v shows."""
        if self.verbose:
            self.note(text)

    def hint(self, command: str) -> None:
        self.note(f"next: {command}")

    def warn(self, *texts: str) -> None:
        for text in () if self._muted else texts:
            self._err.print(f"warning: {visible(text)}", style="yellow", markup=False)

    def error(self, error: SeqlmError) -> None:
        if not isinstance(error, PeerLost) or self._left or not self._muted:
            self._err.print(f"error: {visible(str(error))}", style="red", markup=False)

    def write(self, text: str) -> None:
        """Write text to stdout, unchanged, in UTF-8 for every locale, and without buffering."""
        if self._muted:
            return
        if sys.stdout is None:
            raise SeqlmError("Standard output is closed. Open it, or write to a file: > FILE")
        try:
            # a path that is not UTF-8 contains halves of surrogate pairs
            sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise SeqlmError(
                f"Cannot write to standard output: {error.strerror}. Check its file or device."
            ) from error

    def write_text(self, text: str) -> None:
        """Write text from a model; on a terminal, control characters become visible."""
        self.write(visible(text) if self.terminal() else text)

    def colored(self) -> bool:
        """Whether standard output shows colours."""
        return self.terminal() and not self._out.no_color

    def width(self) -> int:
        """The columns of standard output; 80 where it is no terminal."""
        return self._out.width

    def colors(self, parts: Iterable[tuple[str, str | None]], style: str = "black on") -> None:
        """Text on coloured backgrounds, or with style="" in colours.

        Its lines break as they do without colours.
        """
        from rich.text import Text

        shown = Text()
        for text, color in parts:
            shown.append(visible(text), style=f"{style} {color}" if color else None)
        self._out.print(shown, soft_wrap=True, end="")

    def end_line(self) -> None:
        """End the line after a text, but only on a terminal: a file gets the text unchanged."""
        if self.terminal():
            self.write("\n")

    def terminal(self) -> bool:
        """Whether standard output is a terminal."""
        return sys.stdout is not None and sys.stdout.isatty()

    def product(self, value: Mapping[str, Any], key: str, rows: Sequence[Sequence[Any]]) -> None:
        """The result of a command: a table; with --json an object; with -q one value of it."""
        if self.json:
            self.write(_escaped(to_json(value)))
        elif self.quiet:
            self.write(f"{visible(plain(value[key]))}\n")
        else:
            self.table(rows)

    def json_line(self, value: Mapping[str, Any]) -> None:
        """An object on a line of its own, for a command that writes JSON lines."""
        self.write(_escaped(json.dumps(value, ensure_ascii=False, allow_nan=False)) + "\n")

    def aside(self, rows: Sequence[Sequence[Any]]) -> None:
        """A table that is not the result: on stderr, and hidden by -q."""
        if self.quiet:
            return
        if sys.stderr.isatty():
            self._draw(self._err, rows)
        else:
            width = max(len(plain(row[0])) for row in rows)
            for heading, *cells in rows:
                self.note("  ".join([plain(heading).ljust(width), *map(plain, cells)]).rstrip())

    def table(self, rows: Sequence[Sequence[Any]], tabs: bool = False) -> None:
        """A table whose first row has the headings.

        It is tab-separated if stdout is not a terminal, or if `tabs` is true.
        """
        if self.terminal() and not tabs:
            self._draw(self._out, rows)
        else:
            lines = ("\t".join(visible(plain(cell)) for cell in row) for row in rows)
            self.write("".join(f"{line}\n" for line in lines))

    def _draw(self, console: "Console", rows: Sequence[Sequence[Any]]) -> None:
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=None, pad_edge=False, header_style="bold")
        for heading, *cells in zip(*rows, strict=True):
            numeric = all(isinstance(cell, int | float | None) for cell in cells)
            drawn.add_column(heading, justify="right" if numeric else "left", overflow="fold")
        for row in rows[1:]:
            drawn.add_row(*(Text(visible(readable(cell))) for cell in row))
        console.print(drawn)

    def progress(self, what: str) -> "ProgressBar":
        return ProgressBar(what, shown=not self.quiet)


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """The progress of work: a bar on a terminal, else a line every few seconds."""

    def __init__(self, what: str, shown: bool):
        self.what, self.shown = what, shown
        self.began = self.last = time.monotonic()
        self._bar: Any = None

    def update(self, share: float, text: str = "") -> None:
        """share: the share of the work that is done, 0 to 1."""
        now, terminal = time.monotonic(), sys.stderr.isatty()
        early = now - self.began < SHOW_AFTER
        if not self.shown or early or now - self.last < (DRAW_EVERY if terminal else LINE_EVERY):
            return
        self.last = now
        if terminal:
            self._draw(share, text)
        else:
            print(f"{self.what} {share:4.0%} {text}".rstrip(), file=sys.stderr, flush=True)

    def _draw(self, share: float, text: str) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=1.0, desc=self.what, dynamic_ncols=True, bar_format=LAYOUT)
        self._bar.n = share
        # the text comes last, so that a narrow terminal cuts off the text and not the bar
        self._bar.bar_format = LAYOUT + text.replace("{", "{{").replace("}", "}}")
        self._bar.refresh()

    def clear(self) -> None:
        """Make room for a note above the bar."""
        if self._bar is not None:
            self._bar.clear()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.leave = False
            self._bar.close()


def visible(text: str) -> str:
    """The text with control characters as escapes, except newline and tab."""
    return CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _escaped(text: str) -> str:
    """JSON without control characters, which a terminal would execute."""
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def plain(value: Any) -> str:
    """A value for scripts: 4 decimals, no thousands separators, '-' for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def readable(value: Any) -> str:
    """A value for people: with thousands separators, and without decimals from 1,000 on."""
    if isinstance(value, float) and abs(value) >= 1000:
        value = round(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else plain(value)


def pairs(values: Mapping[str, Any], keys: Sequence[str]) -> list[list[Any]]:
    """A table with the columns figure and value, for some of the values."""
    return [["figure", "value"], *([key.replace("_", " "), values[key]] for key in keys)]


def duration(seconds: float) -> str:
    """75 -> '1m15s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
