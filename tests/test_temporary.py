"""Files and folders are whole or not there, wherever the process that writes them is killed."""

import io
import os
import shutil
from pathlib import Path

import pytest
from killing import kills

from seqlm import temporary
from seqlm.errors import SeqlmError, UsageError
from seqlm.temporary import bring_all_back, bring_back, new_folder, remove_folder, sweep, write_file
from seqlm.text import ready

FINAL = Path("place/final")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    """Both ways to replace a folder: in one call, and where the system has no such call."""
    if request.param == "two renames":
        monkeypatch.setattr(temporary, "_exchange", lambda one, other: False)


def write(content: str, folder: Path = FINAL) -> None:
    with new_folder(folder) as aside:
        (aside / "one").write_text(content)
        (aside / "two").write_text(content)


def read(folder: Path = FINAL) -> set[str]:
    return {(folder / name).read_text() for name in ("one", "two")}


def afresh(*contents: str) -> None:
    """An empty place, in which these were written one after the other."""
    shutil.rmtree("place", ignore_errors=True)
    for content in contents:
        write(content)


def test_a_folder_appears_whole_and_replaces_the_old_one(way):
    for content in ("old", "new"):
        write(content)
        assert read() == {content} and names(FINAL.parent) == ["final"]


def test_a_failure_while_writing_leaves_what_was_there(way):
    write("old")
    with pytest.raises(ZeroDivisionError), new_folder(FINAL) as aside:
        (aside / "half").write_text("half")
        _ = 1 / 0
    assert read() == {"old"} and names(FINAL.parent) == ["final"]


def test_a_folder_that_cannot_be_exchanged_is_put_back(monkeypatch):
    write("old")
    real = Path.rename

    def refuse(self, target):
        if target == FINAL and self.name == "new":
            raise OSError(16, "Device or resource busy")
        return real(self, target)

    monkeypatch.setattr(temporary, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(SeqlmError, match="Cannot write .*final: Device or resource busy"):
        write("new")
    assert read() == {"old"} and names(FINAL.parent) == ["final"]


def test_a_new_folder_is_whole_or_not_there_wherever_its_writer_is_killed():
    for k in kills(afresh, lambda: write("new")):
        assert not FINAL.exists() or read() == {"new"}, k
        write("newer")
        assert names(FINAL.parent) == ["final"], k
    assert k >= 8


def test_a_replaced_folder_is_the_old_or_the_new_wherever_its_writer_is_killed(way):
    for k in kills(lambda: afresh("old"), lambda: write("new")):
        bring_back(FINAL)
        assert read() in ({"old"}, {"new"}), k
        sweep(FINAL.parent)
        assert names(FINAL.parent) == ["final"], k
    assert k >= 8


def test_the_next_writer_sweeps_whatever_a_killed_one_left(way):
    for k in kills(lambda: afresh("old"), lambda: write("new")):
        write("other", FINAL.with_name("other"))
        assert read() in ({"old"}, {"new"}) and names(FINAL.parent) == ["final", "other"], k


def test_a_folder_is_there_or_gone_wherever_its_deletion_is_killed():
    for k in kills(lambda: afresh("old"), lambda: remove_folder(FINAL)):
        bring_all_back(FINAL.parent)
        assert not FINAL.exists() or read() == {"old"}, k
        sweep(FINAL.parent)
        assert names(FINAL.parent) in (["final"], []), k


def test_a_file_is_the_old_or_the_new_wherever_its_writer_is_killed():
    path = Path("pointer")
    for k in kills(lambda: write_file(path, "old"), lambda: write_file(path, "new")):
        assert path.read_text() in ("old", "new"), k
    write_file(path, "newest")
    assert names(Path()) == ["pointer"] and path.read_text() == "newest"


def test_a_sweep_itself_may_be_killed(way):
    def left():
        afresh("old")
        old = FINAL.parent / f"{temporary.PREFIX}00000000/final/old"
        old.parent.mkdir(parents=True)
        FINAL.rename(old)

    for k in kills(left, lambda: sweep(FINAL.parent)):
        bring_back(FINAL)
        assert read() == {"old"}, k
        sweep(FINAL.parent)
        assert names(FINAL.parent) == ["final"], k


def test_what_a_living_process_writes_is_not_swept():
    with new_folder(FINAL) as aside:
        (aside / "one").write_text("one")
        sweep(FINAL.parent, alone=True)
        write_file(FINAL.parent / "file", "text")
    assert names(FINAL) == ["one"]


def test_two_writers_of_one_folder_are_told_apart():
    with new_folder(FINAL):
        with pytest.raises(UsageError, match="Another process is writing place/final. Wait for"):
            write("second")
        write("other", FINAL.with_name("other"))
    assert names(FINAL.parent) == ["final", "other"] and names(FINAL) == []


def test_the_last_look_can_keep_the_old_folder():
    def refuse():
        raise UsageError("no")

    write("old")
    with pytest.raises(UsageError, match="no"), new_folder(FINAL, refuse) as aside:
        (aside / "one").write_text("new")
    assert read() == {"old"} and names(FINAL.parent) == ["final"]


def test_only_own_leftovers_are_swept():
    """Other dotted files, links' targets and another user's leftovers stay."""
    Path("target").mkdir()
    Path("target/file").write_text("dear")
    Path(f"{temporary.PREFIX}link").symlink_to("target")
    Path(".tmp-mine").mkdir()
    Path(f"{temporary.PREFIX}11111111").mkdir()
    sweep(Path())
    assert names(Path()) == [".tmp-mine", "target"] and names(Path("target")) == ["file"]


def test_another_users_leftovers_are_left_alone(monkeypatch):
    Path(f"{temporary.PREFIX}11111111").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    sweep(Path())
    assert names(Path()) == [f"{temporary.PREFIX}11111111"]


def test_without_locks_leftovers_stay_and_a_folder_comes_back(monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    write("old")
    old = FINAL.parent / f"{temporary.PREFIX}00000000/final/old"
    old.parent.mkdir(parents=True)
    FINAL.rename(old)
    monkeypatch.setattr("fcntl.flock", unsupported)
    bring_all_back(FINAL.parent)
    assert read() == {"old"}
    sweep(FINAL.parent)
    assert len(names(FINAL.parent)) == 2
    sweep(FINAL.parent, alone=True)
    assert names(FINAL.parent) == ["final"]


def test_a_name_too_long_leaves_none_of_the_folders_it_made():
    with (
        pytest.raises(SeqlmError, match="name too long"),
        new_folder(Path("one") / "two" / ("x" * 256)),
    ):
        pass
    assert not Path("one").exists()


def test_a_path_that_goes_through_a_new_folder_stays_good():
    with new_folder(Path("new/../final")):
        pass
    assert Path("new/../final").is_dir()


def test_copies_of_standard_input_that_killed_trainings_left_are_deleted(tmp_path, monkeypatch):
    """`seqlm train -` reads its text twice, so it has a copy among the system's temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / f"{temporary.PREFIX}killed" / "stdin"
    left.parent.mkdir()
    left.write_text("text")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    with ready._readable_twice(["-"]) as (copy,):
        assert Path(copy).read_text() == "text" and not left.exists()
    assert not list(tmp_path.glob(f"{temporary.PREFIX}*"))
