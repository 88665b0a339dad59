"""The table that a training shows on a terminal, seen through a pseudo-terminal."""

import os
import pty
import re
import signal
import sys
from threading import Thread

import pytest

from seqlm.ui import Sparkline

GIVEN = ["--preset", "tiny", "--width", 8, "--layers", 1, "--batch", 4, "--length", 16]
CODE = re.compile(r"\x1b\[\??(\d*)(?:;\d+)*([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


def shown(output: str, width: int) -> tuple[list[str], list[str]]:
    """What a terminal shows at the end, and what it showed before each time it erased lines."""
    lines, row, column, before = [""], 0, 0, []
    for count, code, back, down, text in CODE.findall(output):
        if back:
            column = 0
        elif down:
            row += 1
            lines += [""] * (row == len(lines))
        elif text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
            assert column <= width, "a line that wraps is not erased whole"
        elif code == "A":
            row -= int(count)
        elif code == "K":
            if lines[row] and row == len(lines) - 1:
                before.append("\n".join(lines))
            lines[row] = ""
        else:
            assert code in "hlm", code
    return lines, before


@pytest.fixture
def terminal(monkeypatch):
    """terminal(width) makes standard error a pseudo-terminal; it returns the pieces that come."""
    opened = []

    def make(width, on_text=lambda text: None):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr("seqlm.ui.SHOW_AFTER", 0)
        monkeypatch.setattr("seqlm.ui.DRAW_EVERY", 0)
        here, there = pty.openpty()
        pieces = []

        def read():
            while True:
                try:
                    piece = os.read(here, 1 << 16)
                except OSError:  # the other side is closed
                    return
                pieces.append(piece)
                on_text(piece.decode("utf-8", "replace"))

        reader = Thread(target=read)
        reader.start()
        error = os.fdopen(there, "w", encoding="utf-8")
        monkeypatch.setattr(sys, "stderr", error)

        def written():
            error.close()
            reader.join()
            os.close(here)
            return b"".join(pieces).decode("utf-8")

        opened.append(error)
        return written

    yield make
    for error in opened:
        error.close()


@pytest.mark.parametrize("width", [80, 40])
def test_a_terminal_shows_a_table_and_keeps_plain_lines(corpus, seqlm_command, terminal, width):
    written = terminal(width)
    given = ["--data", corpus, *GIVEN, "--steps", 6, "--set", "train.eval_every=2"]
    assert seqlm_command("train", *given).code == 0
    output = written()
    assert not re.search(r"\x1b\[(3|4|9)\d", output), "NO_COLOR is set"
    # notes wrap, as they may: only the table has to fit
    last, before = shown(output, 200)
    *_, table = [text for text in before if "validation " in text]
    rows = table.splitlines()
    rows = rows[max(i for i, row in enumerate(rows) if row.startswith("training ")) :]
    headings = [row[:11].strip() for row in rows]
    assert headings[:6] == ["training", "step", "bits/char", "speed", "validation", "sample"]
    assert 6 <= len(rows) <= 8 and max(map(len, rows)) <= width
    assert rows[0].endswith(" 100%") and re.fullmatch("step       6  0s left", rows[1])
    end = [line for line in last if line]
    assert not [line for line in end if re.match("speed|sample|bits/char", line)]
    assert [line for line in end if line.startswith("training 100% step 6 bpc ")]
    assert sum("val bits-per-char" in line for line in end) == 3
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l"), "the cursor is back"


def test_ctrl_c_removes_the_table_and_says_how_to_go_on(corpus, seqlm_command, terminal):
    sent = []

    def interrupt(text):
        if "bits/char" in text and not sent:
            sent.append(text)
            os.kill(os.getpid(), signal.SIGINT)

    written = terminal(80, interrupt)
    result = seqlm_command("train", "--data", corpus, *GIVEN, "--steps", 1_000_000)
    assert result.code == 130
    last, _ = shown(written(), 200)
    end = [line for line in last if line]
    assert not [line for line in end if re.match("speed|sample|bits/char", line)]
    training, finishing, saved = end[-3:]
    assert re.match(r"training +0% step [\d,]+ bpc ", training)
    assert finishing.startswith("Finishing the step and saving.")
    assert re.match(r"Saved step \d+\. To continue: seqlm train --resume", saved)


def test_a_sparkline_shows_a_course_of_any_length_in_few_characters():
    short, long = Sparkline(), Sparkline()
    assert str(short) == ""
    for value in (8, float("nan"), 1):
        short.add(value)
    assert str(short) == "█▁"
    for value in range(1000, 0, -1):
        long.add(value)
    levels = ["▁▂▃▄▅▆▇█".index(level) for level in str(long)]
    assert 10 <= len(levels) <= 20
    assert levels == sorted(levels, reverse=True) and (levels[0], levels[-1]) == (7, 0)
