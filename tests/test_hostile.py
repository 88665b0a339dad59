"""What nobody should type, and machines that are broken: one sentence and the right exit code."""

import io
import os
import subprocess
import sys
import tempfile
import zipfile
from itertools import islice
from pathlib import Path

import pytest

from seqlm.cells import gru
from seqlm.cli import _app
from seqlm.files import make_folder
from seqlm.lab import compare
from seqlm.text import sources


@pytest.mark.parametrize(
    "arguments",
    [["eval", "--text", "PATH"], ["generate", "--prompt-file", "PATH"]],
    ids=["eval", "generate"],
)
@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_only_regular_files_are_read(run, seqlm_command, arguments, kind):
    """A device may never end and a pipe never begin: standard input stands for both."""
    path = {"device": "/dev/zero", "pipe": "pipe", "folder": "."}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    result = seqlm_command(*(path if word == "PATH" else word for word in arguments))
    assert result.code == 3 and f"{path} is not a regular file" in result.err
    assert "or give - and pipe" in result.err


class Endless(io.RawIOBase):
    """A pipe that never ends; `given` counts its bytes."""

    given = 0

    def readable(self):
        return True

    def readinto(self, buffer):
        buffer[:] = b"a" * len(buffer)
        self.given += len(buffer)
        return len(buffer)


@pytest.mark.parametrize("arguments", [["eval", "--text", "-"], ["generate", "-"]], ids=str)
def test_a_pipe_that_never_ends_is_refused(run, seqlm_command, monkeypatch, arguments):
    """`yes | seqlm eval --text -` would fill the memory."""
    monkeypatch.setattr(_app, "LARGEST_TEXT", 100_000)
    pipe = Endless()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(pipe)))
    result = seqlm_command(*arguments)
    assert result.code == 3 and "the text has more than 0 MB. " in result.err
    assert pipe.given < 200_000


@pytest.mark.parametrize("source", [["prepare"], ["train"], ["train", "--data"]], ids=str)
def test_a_device_is_no_source(seqlm_command, source):
    """/dev/zero would fill the disk."""
    result = seqlm_command(*source, "/dev/zero")
    assert result.code == 3 and "/dev/zero is a device, and its text may never end" in result.err
    assert not list(Path().iterdir())


def test_millions_of_samples_are_written_one_after_another(run, monkeypatch):
    """The first text comes at once: memory does not depend on how many were asked for."""
    from seqlm.cli import _texts
    from seqlm.ui import Screen

    written = []

    class Enough(Exception):
        pass

    def write(self: Screen, text: str) -> None:
        written.append(text)
        if len(written) > 50:
            raise Enough

    monkeypatch.setattr(Screen, "write", write)
    with pytest.raises(Enough):
        _texts.write(Screen(), run, b"", 10**15, 0, {"chars": 2})


def test_texts_wait_in_order_without_being_remembered():
    """What was written is forgotten: a set of ended texts would grow with --samples."""
    from seqlm.cli._texts import in_order

    pieces = in_order((number, "x", True) for number in range(10**9))
    assert [number for number, _ in islice(pieces, 1000)] == list(range(1000))
    assert len(pieces.gi_frame.f_locals["ended"]) <= 1


# Streams: in processes of their own, of a command that does not load torch


def seqlm_process(arguments: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """`seqlm ARGUMENTS` as a shell line, with options of Python and environment variables."""
    line = f"{sys.executable} {' '.join(options)} -m seqlm {arguments}"
    source = str(Path(sources.__file__).parents[2])
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": source, **environment},
    )


@pytest.mark.parametrize("arguments", ["--help", "--version", "prepare --list"])
def test_a_full_disk_behind_standard_output_is_one_sentence(arguments):
    ended = seqlm_process(f"{arguments} > /dev/full")
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1 and "No space left on device" in ended.stderr
    assert ended.stderr.startswith("error: ")


@pytest.mark.parametrize("stream", ["2> /dev/full", "2>&-"])
@pytest.mark.parametrize("arguments, code", [("nonsense", 2), ("prepare nothing", 3), ("runs", 0)])
def test_a_standard_error_that_is_full_or_closed_changes_no_exit_code(stream, arguments, code):
    """Nor does what is written there land in a file that took its number."""
    ended = seqlm_process(f"{arguments} {stream}")
    assert (ended.returncode, ended.stderr) == (code, "")
    assert not list(Path().rglob("*"))


def test_help_is_written_in_an_ascii_locale():
    ended = seqlm_process("eval --help", PYTHONIOENCODING="ascii")
    assert ended.returncode == 0 and "--protocol" in ended.stdout and not ended.stderr


def test_cells_are_listed_by_a_python_without_docstrings(seqlm_command, monkeypatch):
    """python -OO drops the docstrings, from which the table takes its descriptions."""
    monkeypatch.setattr(gru, "__doc__", None)
    result = seqlm_command("cells", "--json")
    assert {row["cell"]: row["about"] for row in result.json["cells"]}["gru"] == ""


# Folders


DEEP = 1050  # more than Python recurses


@pytest.fixture
def deep():
    """The path of a folder with so many folders in one another, and a text in the last.

    It lies outside pytest's own folders: pytest deletes those of earlier sessions, and would fail
    at what a killed session left of this one.
    """
    top, here = tempfile.mkdtemp(prefix="deep"), os.getcwd()
    try:
        os.chdir(top)
        for _ in range(DEEP):
            os.mkdir("d")
            os.chdir("d")
        Path("t.txt").write_text("some text\n" * 100)
        os.chdir(here)
        yield f"{top}/d"
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-r", top], check=True)  # shutil.rmtree would recurse too deep


def test_a_folder_deeper_than_recursion_is_read(deep, seqlm_command):
    assert seqlm_command("prepare", deep, "--json").json["splits"]["train"]["bytes"] == 900


def test_a_folder_deeper_than_recursion_is_made(tmp_path):
    deep = tmp_path / "/".join("d" * DEEP)
    try:
        make_folder(deep)
        assert deep.is_dir()
    finally:
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)


def test_an_archive_deep_in_archives_is_refused_with_the_reason(seqlm_command):
    """Eleven are opened; a bomb of a thousand neither overflows nor is called locked."""
    data, name = b"some text\n" * 100, "t.txt"
    for depth in range(14):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr(name, data)
        data, name = packed.getvalue(), f"{depth}.zip"
        Path(name).write_bytes(data)
    result = seqlm_command("prepare", "12.zip")
    assert result.code == 3
    assert "12.zip holds archives inside archives, more than 10 levels deep" in result.err
    assert seqlm_command("prepare", "9.zip", "--json").json["splits"]["train"]["bytes"] == 900


@pytest.fixture
def locked(monkeypatch):
    """locked(path): as if the folder had mode 000, which the super-user would not notice."""
    scandir, listdir, closed = os.scandir, os.listdir, set()

    def refuse(read):
        def guarded(path="."):
            if os.path.abspath(path) in closed:
                raise PermissionError(13, "Permission denied", str(path))
            return read(path)

        return guarded

    monkeypatch.setattr(os, "scandir", refuse(scandir))
    monkeypatch.setattr(os, "listdir", refuse(listdir))
    return lambda path: closed.add(os.path.abspath(path))


@pytest.mark.parametrize(
    "folder, arguments",
    [
        ("texts", ["prepare", "texts"]),
        ("texts", ["prepare", "text*"]),
        ("data/story", ["train", "--data", "story"]),
        ("data/story", ["eval", "--data", "story"]),
        ("checkpoints/story-mingru", ["eval", "--run", "story-mingru"]),
        ("checkpoints/story-mingru", ["eval"]),
        ("checkpoints/story-mingru", ["train", "--resume", "--run", "story-mingru"]),
        ("checkpoints/story-mingru", ["train", "--run", "story-mingru", "--force"]),
        ("checkpoints", ["eval"]),
    ],
    ids=str,
)
def test_a_folder_that_may_not_be_read_is_named(run, seqlm_command, locked, folder, arguments):
    """It is not taken for one that is missing or no run, and its reason is given."""
    Path("texts").mkdir()
    locked(folder)
    result = seqlm_command(*arguments)
    assert result.code == 3
    assert f"Cannot read {folder}: Permission denied. " in result.err


def test_runs_lists_the_others_where_one_may_not_be_read(run, seqlm_command, locked):
    Path("checkpoints/secret").mkdir()
    locked("checkpoints/secret")
    result = seqlm_command("runs", "-q")
    assert (result.code, result.out) == (0, "checkpoints/story-mingru\n")
    assert "Cannot read checkpoints/secret: Permission denied" in result.err


@pytest.mark.parametrize("place", ["/proc/x", "/dev/null/x", "story.txt/x", "x" * 300])
def test_a_place_that_cannot_be_made_is_an_error_at_once(seqlm_command, text_file, place):
    """/proc is a folder in which nothing can be made: retrying would never end."""
    result = seqlm_command("prepare", text_file, "--out", place)
    assert result.code == 1 and "Cannot write" in result.err


@pytest.mark.parametrize("seeds", [0, -1])
def test_a_comparison_without_seeds_is_refused(seqlm_command, corpus, seeds):
    result = seqlm_command("compare", "--data", "story", "--seeds", seeds)
    assert result.code == 2 and f"--seeds {seeds}: it must be at least 1" in result.err
    assert not Path("checkpoints").exists()


def test_a_comparison_goes_into_no_folder_that_holds_other_things(seqlm_command, corpus):
    """Nothing is trained into it; one that holds a comparison, and notes beside it, is taken."""
    Path("photos").mkdir()
    Path("photos/cat.jpg").touch()
    given = ["compare", "--data", "story", "--cells", "mingru", "--steps", 1]
    result = seqlm_command(*given, "--out", "./photos")
    assert result.code == 2 and "--out photos: the folder has cat.jpg" in result.err
    assert [path.name for path in Path("photos").iterdir()] == ["cat.jpg"]
    Path("photos/mingru-s0.json").touch()
    assert compare.place("./photos") == Path("photos")


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--set", "train.steps=1"],
        ["bench", "--set", "data.path=story"],
        ["compare", "--data", "story", "--set", "data.path=other"],
    ],
    ids=str,
)
def test_a_setting_that_a_command_ignores_is_refused(seqlm_command, corpus, arguments):
    result = seqlm_command(*arguments)
    assert result.code == 2
    assert f"{arguments[-1].partition('=')[0]} has no effect" in result.err


def test_the_corpus_in_the_current_folder_is_not_replaced(seqlm_command, corpus, monkeypatch):
    """The shell would stay in the deleted folder, where nothing is found any more."""
    monkeypatch.chdir(corpus)
    result = seqlm_command("prepare", "../../story.txt", "--out", ".", "--force")
    assert result.code == 2 and ". is the current folder" in result.err


def test_a_cell_file_is_refused_for_a_run_of_a_built_in_cell(run, seqlm_command):
    result = seqlm_command("eval", "--cell", "nothing.py")
    assert result.code == 2
    assert "--cell nothing.py: checkpoints/story-mingru was trained with mingru" in result.err


@pytest.mark.parametrize(
    ("flag", "arguments"),
    [
        ("--data", ["train", "--data", ""]),
        ("--run", ["train", "--run", ""]),
        ("--init-from", ["train", "--init-from", ""]),
        ("--run", ["eval", "--run", ""]),
        ("--text", ["eval", "--text", ""]),
        ("--out", ["compare", "--out", ""]),
        ("--out", ["prepare", "story.txt", "--out", ""]),
    ],
    ids=str,
)
def test_an_empty_value_is_a_usage_error(run, seqlm_command, flag, arguments):
    result = seqlm_command(*arguments)
    assert result.code == 2
    assert f"{flag} is empty. Give a value, or remove the option." in result.err


def test_a_cell_file_that_may_not_be_read_is_bad_input(seqlm_command, corpus, monkeypatch):
    Path("own.py").touch()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    result = seqlm_command("train", "--data", "story", "--cell", "./own.py", "--steps", 1)
    assert result.code == 3
    assert "Cannot read the cell file own.py: Permission denied." in result.err


INTERRUPTS = {
    "import": (
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'seqlm.cli': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    ),
    "commands": (
        "import typer.main\ntyper.main.get_command = lambda _: signal.raise_signal(signal.SIGINT)\n"
    ),
}


@pytest.mark.parametrize("moment", INTERRUPTS)
def test_ctrl_c_before_a_command_begins_ends_in_130_without_a_traceback(moment):
    """The interrupt comes at the first import of the command line, or as the commands are built."""
    code = f"import signal, sys\n{INTERRUPTS[moment]}from seqlm.__main__ import main\nmain()"
    source = {**os.environ, "PYTHONPATH": str(Path(sources.__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, env=source)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"")
