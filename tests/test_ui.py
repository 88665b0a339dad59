import io
import re

import pytest

from seqlm.cli.results import SPARED
from seqlm.errors import InputError, PeerLost, UsageError
from seqlm.lab import results
from seqlm.ui import Screen, duration, plain, readable


@pytest.mark.parametrize(
    "value, shell, people",
    [
        (1234567, "1234567", "1,234,567"),
        (12345.678, "12345.6780", "12,346"),
        (3.14159, "3.1416", "3.1416"),
        (-1e-9, "0.0000", "0.0000"),
        (None, "-", "-"),
        (True, "yes", "yes"),
        ("text", "text", "text"),
    ],
)
def test_a_value_is_written_for_shells_and_for_people(value, shell, people):
    assert (plain(value), readable(value)) == (shell, people)


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0s"), (59, "59s"), (75, "1m15s"), (3600, "1h00m"), (7260, "2h01m")]
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_a_table_is_tab_separated_where_no_one_looks(capfdbinary):
    Screen().table([["name", "count"], ["a", 1000], ["b", None]])
    assert capfdbinary.readouterr().out == b"name\tcount\na\t1000\nb\t-\n"


@pytest.mark.parametrize("columns", [40, 80])
def test_a_narrow_terminal_shows_fewer_columns_of_results_and_every_name_whole(
    monkeypatch, columns
):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    found = [*results.read().values()]
    rows = [[*results.HEADINGS], *map(results.row, found)]
    Screen().product({}, "", rows, SPARED)
    heading, *lines = terminal.getvalue().splitlines()
    assert "bits per char" in heading and len(lines[0]) <= columns
    assert [line.split()[0] for line in lines] == [one.name for one in found]


def test_notes_go_to_stderr_and_quiet_silences_all_but_warnings(capfdbinary):
    for quiet in (False, True):
        screen = Screen(quiet=quiet)
        screen.note("a note")
        screen.detail("a detail")
        screen.warn("a warning")
        screen.error(InputError("an error"))
    out, err = capfdbinary.readouterr()
    assert out == b""
    assert err.decode().split("\n")[:-1] == [
        *("a note", "warning: a warning", "error: an error"),
        *("warning: a warning", "error: an error"),
    ]


def test_json_has_no_nan():
    with pytest.raises(ValueError, match="JSON"):
        Screen(json=True).product({"value": float("nan")}, "value", [])


def test_progress_is_a_line_every_few_seconds_where_stderr_is_no_terminal(capfd, monkeypatch):
    now = iter([0.0, 1.0, 3.0, 6.0, 7.0, 12.0, 13.0])
    monkeypatch.setattr("seqlm.ui.time.monotonic", lambda: next(now))
    with Screen().progress("working") as bar:
        for share in (0.1, 0.3, 0.6, 0.7, 0.99, 1.0):
            bar.update(share, "so far")
    assert capfd.readouterr().err == "working  60% so far\nworking  99% so far\n"


@pytest.mark.parametrize("left, expected", [(False, ""), (True, "error: one is gone\n")])
def test_a_muted_screen_says_only_its_own_errors_and_that_one_is_gone(capsys, left, expected):
    screen = Screen(json=True)
    screen.mute(left)
    screen.note("a note")
    screen.warn("a warning")
    screen.product({"key": 1}, "key", [])
    screen.error(PeerLost("one is gone"))
    screen.error(UsageError("its own"))
    assert capsys.readouterr() == ("", f"{expected}error: its own\n")


def test_the_bar_is_drawn_whole_on_80_columns_and_the_text_is_cut(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("seqlm.ui.SHOW_AFTER", 0)
    monkeypatch.setattr("seqlm.ui.DRAW_EVERY", 0)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (80, 24))
    with Screen().progress("training") as bar:
        bar.update(0.5, "step 123,456 {best} " + 100 * "x")
        drawn = terminal.getvalue().split("\r")[-1]
    assert re.search(r"training  50%\|.{12}\| step 123,456 \{best\} x", drawn), drawn
    assert len(drawn) <= 80
