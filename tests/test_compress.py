"""Compressed files come back byte for byte, in the size that eval states, or not at all."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

import seqlm
from seqlm.errors import InputError, SeqlmError
from seqlm.lab.compress import pack, unpack

constriction = pytest.importorskip("constriction", reason="constriction is not installed")

TEXT = "the cat sees a dog.\nthe old king likes my friend.\n" * 4
SMALL = dict(preset="tiny", width=8, layers=1, batch=4, length=16, steps=2, threads=1)


@pytest.fixture
def one(run):
    """The small run, on one thread as the commands compute."""
    return seqlm.load("checkpoints/story-mingru", threads=1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"t",
        TEXT.encode(),
        "the €uro, the Öl\r\n\t\x00".encode() * 3,
        bytes(range(256)),
        TEXT.encode().replace(b"dog", b"d\xff\xfeg"),
    ],
)
def test_any_bytes_come_back(one, data):
    assert unpack(one, pack(one, data)) == data


@pytest.mark.parametrize("unit", ["byte", "sentencepiece"])
@pytest.mark.parametrize("documents", ["none", "lines"])
def test_every_unit_comes_back(seqlm_command, text_file, unit, documents):
    options = ["--vocab-size", "300"] if unit == "sentencepiece" else []
    prepared = ["prepare", text_file, "--unit", unit, "--documents", documents, *options]
    assert seqlm_command(*prepared).code == 0
    run = seqlm.train(**SMALL)
    data = TEXT.encode() + "Ö\u2581\n".encode() + b"\xff" * (unit == "byte")
    assert unpack(run, pack(run, data)) == data


@pytest.mark.parametrize("documents", ["none", "lines"])
def test_the_size_is_what_eval_states(seqlm_command, text_file, documents):
    assert seqlm_command("prepare", text_file, "--documents", documents).code == 0
    run = seqlm.train(**SMALL)
    data = text_file.read_bytes()
    stated = run.bits_per_char(data.decode()) * len(data) / 8
    assert stated <= len(pack(run, data)) <= 1.005 * stated + 64


def test_a_flipped_bit_is_an_error_and_never_another_text(one):
    packed, generator = pack(one, TEXT.encode()), random.Random(0)
    for _ in range(200):
        damaged = bytearray(packed)
        damaged[generator.randrange(len(packed))] ^= 1 << generator.randrange(8)
        with pytest.raises(InputError, match="The file is damaged, or seqlm compress did not"):
            unpack(one, bytes(damaged))


@pytest.mark.parametrize("size", [0, 5, 12, 40])
def test_a_file_that_is_cut_is_an_error(one, size):
    with pytest.raises(InputError, match="damaged"):
        unpack(one, pack(one, TEXT.encode())[:size])


def test_another_model_is_an_error(one):
    other = seqlm.train("data/story", run="other", **SMALL)
    with pytest.raises(InputError, match="Another model than that of checkpoints/other, step 2"):
        unpack(other, pack(one, TEXT.encode()))


def test_other_probabilities_are_an_error(one, monkeypatch):
    """As on another processor, which rounds differently."""
    packed = pack(one, TEXT.encode())
    own = type(one.predictor()).probabilities
    monkeypatch.setattr(
        "seqlm.generation.predict.Predictor.probabilities", lambda self: np.roll(own(self), 1)
    )
    with pytest.raises(InputError, match="computes other probabilities .* There: 0.*Here: 0"):
        unpack(one, packed)


def test_the_commands_round_trip_beside_other_compressors(seqlm_command, run, text_file):
    result = seqlm_command("compress", text_file, "--out", "a.packed", "--json").json
    assert result["packed_bytes"] == Path("a.packed").stat().st_size
    for other in ("gzip_bytes", "xz_bytes", "zstd_bytes"):
        assert 0 < result[other] < result["bytes"]
    done = seqlm_command("decompress", "a.packed", "--out", "b.txt", "--json")
    assert done.json["bytes"] == 4000, done.err
    assert Path("b.txt").read_bytes() == text_file.read_bytes()


def test_commands_say_what_is_wrong(seqlm_command, run, text_file):
    result = seqlm_command("decompress", text_file, "--out", "b.txt")
    assert result.code == 3 and "The file is damaged" in result.err
    assert not Path("b.txt").exists()
    result = seqlm_command("compress", text_file, "--out", "a", "--threads", "2")
    assert result.code == 2 and "this command computes on one thread" in result.err
    assert seqlm_command("compress", text_file).code == 2


def test_without_the_library_the_error_names_the_extra(one, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    with pytest.raises(SeqlmError, match=r"pip install -e '\.\[compress\]'"):
        pack(one, b"a")


def test_the_packed_file_holds_no_text(one):
    packed = pack(one, TEXT.encode())
    assert b"the cat" not in packed and len(json.dumps(TEXT)) > len(packed)
