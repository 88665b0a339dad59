"""Folders are whole or not there, whatever fails while they are written."""

from pathlib import Path

import pytest

from seqlm.errors import InputError, SeqlmError
from seqlm.files import new_folder, to_json, write_file
from seqlm.manifest import read_json, read_sealed, seal


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    for content in ("one", "two"):
        with new_folder(tmp_path / "final") as aside:
            (aside / "file").write_text(content)
            assert not (tmp_path / "final" / "file").exists() or content == "two"
        assert (tmp_path / "final" / "file").read_text() == content
    assert names(tmp_path) == ["final"]


def test_a_failure_while_writing_leaves_what_was_there(tmp_path):
    (tmp_path / "final").mkdir()
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "final") as aside:
        (aside / "half").write_text("half")
        _ = 1 / 0
    assert names(tmp_path) == ["final"] and names(tmp_path / "final") == []


def test_a_folder_that_cannot_be_exchanged_is_put_back(tmp_path, monkeypatch):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").write_text("old")
    real = Path.rename

    def refuse(self, target):
        if target == tmp_path / "final" and self.name.startswith(".tmp-"):
            raise OSError(16, "Device or resource busy")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(SeqlmError, match="Cannot write .*final: Device or resource busy"):
        with new_folder(tmp_path / "final") as aside:
            (aside / "new").write_text("new")
    assert names(tmp_path) == ["final"] and names(tmp_path / "final") == ["old"]


def test_a_file_is_replaced_in_one_step(tmp_path):
    write_file(tmp_path / "pointer", "one\n")
    write_file(tmp_path / "pointer", "two\n")
    assert (tmp_path / "pointer").read_text() == "two\n" and names(tmp_path) == ["pointer"]


def test_a_seal_breaks_with_any_change(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(to_json(seal({"schema": 1, "value": 7})))
    assert read_sealed(path, 1)["value"] == 7
    with pytest.raises(InputError, match="is of format 1, and this seqlm reads 2"):
        read_sealed(path, 2)
    path.write_text(path.read_text().replace("7", "8"))
    with pytest.raises(InputError, match="was changed after it was written"):
        read_sealed(path, 1)


@pytest.mark.parametrize("content", ['{"a": NaN, "fingerprint": "x"}', '{"a": "\\ud800"}', "{}"])
def test_an_odd_manifest_is_an_input_error(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="was changed after it was written"):
        read_sealed(tmp_path / "manifest.json", 1)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"[" * 100_000])
def test_damaged_json_is_an_input_error(tmp_path, content):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(InputError, match="state.json is damaged"):
        read_json(tmp_path / "state.json")


def test_a_name_too_long_leaves_none_of_the_folders_it_made(tmp_path):
    with pytest.raises(SeqlmError, match="name too long"):
        with new_folder(tmp_path / "one" / "two" / ("x" * 250)):
            pass
    assert not (tmp_path / "one").exists()


def test_a_path_that_goes_through_a_new_folder_stays_good(tmp_path):
    with new_folder(tmp_path / "new" / ".." / "final"):
        pass
    assert (tmp_path / "new" / ".." / "final").is_dir()
