"""Sealed manifests and JSON: what is damaged or was changed is an error that says so."""

import pytest

from seqlm.errors import InputError
from seqlm.files import to_json
from seqlm.manifest import read_json, read_sealed, seal


def test_a_seal_breaks_with_any_change(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(to_json(seal({"schema": 1, "value": 7})))
    assert read_sealed(path, 1)["value"] == 7
    with pytest.raises(InputError, match="has format 1, but this version of seqlm reads format 2"):
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
