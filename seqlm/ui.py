"""Output for the user: results (text, tables, JSON) on stdout; notes and progress on stderr."""

import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from threading import Lock
from typing import TYPE_CHECKING, Any, Self

from seqlm.errors import PeerLost, SeqlmError
from seqlm.files import to_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

LINE_EVERY = 5.0  # seconds between progress lines, if stderr is not a terminal
DRAW_EVERY = 0.25  # seconds between two drawings on a terminal
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
BAR = 12  # characters of the bar
SPARKS, LEVELS = 20, "▁▂▃▄▅▆▇█"  # a table of 40 columns has room for 20
LINES_OF_ROW = 3  # of a row of the table
ASCII = str.maketrans(f"{LEVELS}█░", "_.-=+*%##-")
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
        # a text such as :b: is no emoji
        self._err = Console(
            stderr=True, no_color=plain, highlight=False, soft_wrap=True, emoji=False
        )
        self._out = Console(no_color=plain, highlight=False, emoji=False)

    def mute(self, left: bool) -> None:
        """Print nothing, because another process prints the same.

        left: print an error about a lost process, as the other process may be the lost one.
        """
        self.quiet, self._muted, self._left = True, True, left

    def note(self, *texts: str) -> None:
        """Messages about what happens; -q hides them."""
        for text in () if self.quiet else texts:
            self._say(text, "dim")

    def detail(self, text: str) -> None:
        """A message that only -v shows."""
        if self.verbose:
            self.note(text)

    def hint(self, command: str) -> None:
        self.note(f"next: {command}")

    def warn(self, *texts: str) -> None:
        for text in () if self._muted else texts:
            self._say(f"warning: {text}", "yellow")

    def error(self, error: SeqlmError) -> None:
        if not isinstance(error, PeerLost) or self._left or not self._muted:
            self._say(f"error: {error}", "red")

    def _say(self, text: str, style: str) -> None:
        from rich.text import Text

        # the style is the text's own: print(style=...) would also dye a table that is drawn below
        self._err.print(Text(visible(text), style=style))

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

    def product(
        self,
        value: Mapping[str, Any],
        key: str,
        rows: Sequence[Sequence[Any]],
        spared: Sequence[str] = (),
    ) -> None:
        """The result of a command: a table; with --json an object; with -q one value of it."""
        if self.json:
            self.write(_escaped(to_json(value)))
        elif self.quiet:
            self.write(f"{visible(plain(value[key]))}\n")
        else:
            self.table(rows, spared=spared)

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

    def table(
        self, rows: Sequence[Sequence[Any]], tabs: bool = False, spared: Sequence[str] = ()
    ) -> None:
        """A table whose first row has the headings.

        It is tab-separated if stdout is not a terminal, or if `tabs` is true.
        spared: the columns that a narrow terminal does without, the first one first.
        """
        if self.terminal() and not tabs:
            self._draw(self._out, fitting(rows, spared, self._out.width))
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

    def board(self, what: str) -> "Board":
        return Board(what, not self.quiet, self._err)


class ProgressBar:
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

    def close(self) -> None:
        """Remove the bar; no other is drawn."""
        self.shown = False
        if self._bar is not None:
            self._bar.leave = False
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Board(ProgressBar):
    """`ProgressBar` with a small table on a terminal, which shows `rows`, too.

    Notes appear above it.  At its end it leaves one line.
    """

    def __init__(self, what: str, shown: bool, console: "Console"):
        super().__init__(what, shown)
        self.rows: dict[str, Sequence[object]] = {}  # {heading: parts of its text}
        self._console, self._latest = console, ""
        self._live: Any = None
        self._lock = Lock()  # a thread may close the table while it is drawn

    def update(self, share: float, text: str = "") -> None:
        self._latest = f"{self.what} {share:4.0%} {text}"
        with self._lock:
            super().update(share, text)

    def _draw(self, share: float, text: str) -> None:
        if self._console.is_dumb_terminal:  # it cannot move its cursor
            super()._draw(share, text)
            return
        from rich.live import Live

        if self._live is None:
            self._live = Live(
                console=self._console,
                auto_refresh=False,  # only a report changes the table
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        self._live.update(self._table(share), refresh=True)

    def _table(self, share: float) -> "Text":
        from rich.text import Text

        done = round(share * BAR)
        bar = f"{'█' * done}{'░' * (BAR - done)} {share:4.0%}"
        table = Text(no_wrap=True, overflow="crop")  # lines that wrap would not be removed whole
        for heading, parts in {self.what: [bar], **self.rows}.items():
            shown = visible("  ".join(map(str, parts)))
            if self._console.options.ascii_only:
                shown = shown.translate(ASCII)
            for number, line in enumerate(shown.split("\n")[:LINES_OF_ROW]):
                table.append(f"{'' if number else heading:<11}", style="dim").append(f"{line}\n")
        table.right_crop()  # the last newline
        return table

    def close(self) -> None:
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None
                self._console.print(visible(self._latest), style="dim", markup=False)
            super().close()


class Sparkline:
    """The course of a value, as at most SPARKS characters; each is the mean of several values."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._part: list[float] = []
        self._size = 1  # values in a mean

    def add(self, value: float) -> None:
        if isfinite(value):
            self._part.append(value)
        if len(self._part) == self._size:
            self._means.append(sum(self._part) / self._size)
            self._part = []
        if len(self._means) == SPARKS:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(one + other) / 2 for one, other in pairs]
            self._size *= 2

    def __str__(self) -> str:
        low, high = min(self._means, default=0), max(self._means, default=0)
        scale = (len(LEVELS) - 1) / ((high - low) or 1)
        return "".join(LEVELS[round((mean - low) * scale)] for mean in self._means)


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
    return f"{value:z.4f}" if isinstance(value, float) else str(value)  # z: no -0.0000


def readable(value: Any) -> str:
    """A value for people: with thousands separators, and without decimals from 1,000 on."""
    if isinstance(value, float) and abs(value) >= 1000:
        value = round(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else plain(value)


def fitting(
    rows: Sequence[Sequence[Any]], spared: Sequence[str], width: int
) -> Sequence[Sequence[Any]]:
    """The table without those of the spared columns that `width` characters have no room for.

    Each column has room for its values and for the longest word of its heading.
    """
    for name in spared:
        columns = list(zip(*rows, strict=True))
        needed = [
            max(*map(len, heading.split()), *(len(readable(value)) for value in values))
            for heading, *values in columns
        ]
        if sum(needed) + 2 * (len(needed) - 1) <= width:
            break
        rows = list(zip(*(column for column in columns if column[0] != name), strict=True))
    return rows


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
