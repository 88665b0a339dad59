"""Any text, in one go from the command line: every unit, every form of input, every script."""

import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from conftest import sentences

from seqlm.store import runs
from seqlm.text import corpora
from seqlm.text.corpora import KNOWN
from seqlm.text.corpus import open_corpus
from seqlm.text.synthetic import DIAGNOSTICS

UNITS = ("char", "byte", "sentencepiece")
SMALL = ["--preset", "tiny", "--width", 32, "--layers", 1, "--batch", 8, "--length", 64]

SCRIPTS = {
    "russian": "Жили-были дед да баба, и была у них курочка Ряба. Снесла курочка яичко.\n",
    "chinese": "道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。\n",
    "emoji": "👩‍👩‍👧 loves 🍎 and 🍏, e\u0301 🇫🇷🏳️‍🌈 — ½ \u2581 ok 👍🏽\n",
}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_any_script_is_prepared_trained_and_sampled(seqlm_command, tmp_path, script, unit):
    (tmp_path / "t.txt").write_text(SCRIPTS[script] * 120, encoding="utf-8")
    prepared = seqlm_command("prepare", "t.txt", "--unit", unit, "--json").json
    trained = seqlm_command("train", *SMALL, "--steps", 25, "--json").json
    evaluated = seqlm_command("eval", "--json").json
    assert evaluated["chars"] == prepared["splits"]["val"]["chars"]
    assert evaluated["bits_per_char"] == pytest.approx(trained["val_bits_per_char"])
    uniform = math.log2(prepared["vocab_size"]) * evaluated["tokens"] / evaluated["chars"]
    assert evaluated["bits_per_char"] < 0.9 * uniform
    written = seqlm_command("generate", "--chars", 80, "--seed", 1)
    assert written.code == 0 and len(written.out) == 80, "decoded as strict UTF-8"


def test_a_source_tree_in_mixed_encodings_is_read_with_its_encodings_named(seqlm_command, tmp_path):
    tree = tmp_path / "src"
    (tree / "deep").mkdir(parents=True)
    (tree / "a.py").write_text(f"# naïve\n{sentences(3000)}", encoding="utf-8")
    (tree / "deep" / "old.c").write_text("/* größer */ " + sentences(3000), encoding="latin-1")
    (tree / "wide.txt").write_text("wide é " + sentences(3000), encoding="utf-16")
    (tree / "logo.png").write_bytes(b"\x89PNG\x00\xff")
    first = seqlm_command("prepare", "src")
    assert (
        first.code == 0 and "Left out, because they are not UTF-8 (3): src/deep/old.c" in first.err
    )
    assert "--encoding utf-8,cp1252" in first.err
    told = ("--encoding", "utf-8,utf-16,cp1252", "--force", "--json")
    prepared = seqlm_command("prepare", "src", *told).json
    corpus = open_corpus(Path(prepared["data"]))
    text = "".join(corpus.tokenizer.decode(corpus.symbols(split)) for split in corpus.splits)
    assert "# naïve\n" in text and "/* größer */" in text and "wide é" in text
    assert seqlm_command("train", *SMALL, "--steps", 50).code == 0
    assert len(seqlm_command("generate", "--chars", 50).out) == 50


def names(count: int) -> list[str]:
    draw = random.Random(0)
    begin, middle, end = ("Ka Ri Mo Le Na Ta Vi So El An", "ra li no me sa", "na ro el ia us th")
    found: set[str] = set()
    while len(found) < count:
        parts = [draw.choice(begin.split())]
        parts += [draw.choice(middle.split()) for _ in range(draw.randint(1, 6))]
        found.add("".join([*parts, draw.choice(end.split())]))
    return sorted(found)


def test_a_list_of_names_gives_whole_new_names(seqlm_command, tmp_path):
    known = names(8000)
    (tmp_path / "names.txt").write_text("\n".join(known) + "\n")
    prepared = seqlm_command("prepare", "names.txt", "--documents", "lines", "--json").json
    assert sum(counts["documents"] for counts in prepared["splits"].values()) == 8000
    options = ["--preset", "tiny", "--width", 64, "--layers", 1, "--batch", 16, "--steps", 180]
    trained = seqlm_command("train", *options, "--json").json
    assert trained["val_bits_per_char"] < 2.0
    evaluated = seqlm_command("eval", "--json").json
    assert evaluated["documents"] == prepared["splits"]["val"]["documents"]
    written = seqlm_command("generate", "--samples", 40, "--seed", 1).out
    lines = written.splitlines()
    assert len(lines) == 40 and written.endswith("\n"), "a sample is one name, whole"
    assert sum(line.isalpha() and 3 < len(line) < 25 for line in lines) > 35
    assert len(set(lines) - set(known)) > 5, "new ones"
    starts = {name[:2] for name in known}
    assert sum(line[:2] in starts for line in lines) > 30, "that look like the list's"
    begun = seqlm_command("generate", "Vi", "--samples", 3, "--seed", 2).out.splitlines()
    assert len(begun) == 3 and all(line.startswith("Vi") for line in begun)
    as_json = seqlm_command("generate", "--samples", 2, "--seed", 1, "--json").json
    assert [text.rstrip("\n") for text in as_json["texts"]] == lines[:2]


def test_files_are_documents_and_a_sample_ends_like_one(seqlm_command, tmp_path):
    (tmp_path / "poems").mkdir()
    for i in range(200):
        (tmp_path / "poems" / f"{i}.txt").write_text(f"rose {i % 7}\nviolet\nend")
    prepared = seqlm_command("prepare", "poems", "--documents", "files", "--json").json
    assert prepared["documents"] == "files" and prepared["splits"]["val"]["documents"] > 0
    seqlm_command("train", *SMALL, "--batch", 2, "--steps", 200, "--set", "optim.lr=0.02")
    written = seqlm_command("generate", "--samples", 3, "--temperature", 0.3, "--seed", 1)
    poems = written.out.split("\n----\n")
    assert len(poems) == 3 and all(poem.endswith("end") for poem in poems), written.out


def test_what_cannot_be_read_in_a_folder_is_left_out_with_its_reason(seqlm_command, tmp_path):
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "a.txt").write_text(sentences(4000))
    (tmp_path / "mix" / "b.gz").write_bytes(gzip.compress(TEXT)[:200])
    (tmp_path / "mix" / "c.zip").write_bytes(b"no zip")
    prepared = seqlm_command("prepare", "mix", "--json")
    assert prepared.json["card"]["chars"] == 4000
    said = " ".join(prepared.err.split())
    assert "Left out (2): mix/b.gz is damaged" in said
    assert "UTF-8" not in said


def test_lines_are_written_one_a_line_even_where_one_is_empty(seqlm_command, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(names(300)))
    seqlm_command("prepare", "names.txt", "--documents", "lines")
    seqlm_command("train", *SMALL, "--steps", 2, "--batch", 2)
    stopped = ["generate", "Ka", "--samples", 5, "--seed", 1, "--stop"]
    letters = [word for letter in "abcdefghijklmnopqrstuvwxyz" for word in ("--stop", letter)]
    written = seqlm_command(*stopped[:-1], *letters, "--chars", 3).out
    lines = written.split("\n")
    assert len(lines) >= 5 and all(line == "" or line.startswith("Ka") for line in lines)
    assert sum(line.startswith("Ka") for line in lines) == 5


TEXT = (sentences(4000) + "Ünïcödé 🙂\n").encode()


def packed(name: str) -> bytes:
    if name.endswith(".gz") and not name.endswith(".tar.gz"):
        return gzip.compress(TEXT)
    if name.endswith(".tar.gz"):
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w:gz") as archive:
            member = tarfile.TarInfo("t.txt")
            member.size = len(TEXT)
            archive.addfile(member, io.BytesIO(TEXT))
        return made.getvalue()
    return TEXT


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["t.txt", "t.gz", "t.tar.gz", "folder", "*.txt", "-"])
def test_every_form_of_input_gives_the_same_splits(
    seqlm_command, tmp_path, monkeypatch, unit, name
):
    source = name
    if name == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT)))
    elif name == "folder":
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "t.txt").write_bytes(TEXT)
    else:
        (tmp_path / name.replace("*", "t")).write_bytes(packed(name))
    prepared = seqlm_command("prepare", source, "--unit", unit, "--out", "out", "--json").json
    assert prepared["splits"]["train"]["chars"] == len(TEXT.decode()) * 90 // 100
    (tmp_path / "plain.text").write_bytes(TEXT)
    plain = seqlm_command("prepare", "plain.text", "--unit", unit, "--out", "b", "--json").json
    assert prepared["splits"] == plain["splits"]


BAD = {
    "empty": (b"", 3, "The text is empty"),
    "short": (b"x", 3, "too short to split"),
    "no text": (b"good text " * 99 + b"\xff" + b" and more" * 9, 3, "byte 0xff at offset 990"),
    "cut": (b"good text " * 99 + b"\xe2\x82", 3, "byte 0xe2 at offset 990"),
    "utf-16": ("wide text".encode("utf-16") * 99, 3, "starts like UTF-16: try --encoding utf-16"),
    "nul": (b"text\x00with NUL\n" * 99, 0, "99 NUL characters"),
    "mojibake": ("cafÃ© au lait\n".encode() * 99, 0, "mojibake"),
    "one symbol": (b"a" * 1000, 0, ""),
    "one line": (b"text without any newline " * 999, 0, ""),
    "newlines": (b"\n" * 1000, 0, ""),
}


@pytest.mark.parametrize(
    "form, unit",
    [*product(["file", "split files"], UNITS), ("gz", "char"), ("-", "byte"), ("-", "char")],
)
@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_answered_in_every_unit_and_form(
    seqlm_command, tmp_path, monkeypatch, unit, form, fault
):
    data, code, message = BAD[fault]
    if unit == "byte" and fault in ("no text", "cut", "utf-16"):
        code, message = 0, ""  # any bytes are bytes
    source = ["t.txt"]
    (tmp_path / "t.txt").write_bytes(data)
    if form == "gz":
        source = ["t.gz"]
        (tmp_path / "t.gz").write_bytes(gzip.compress(data))
    elif form == "-":
        source = ["-"]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    elif form == "split files":
        (tmp_path / "v.txt").write_bytes(b"a good text for validation\n")
        source = ["--train", "t.txt", "--val", "v.txt"]
        if fault == "empty":
            message = "The text of the train split is empty"
        elif fault == "short":
            code, message = 0, ""
    if unit == "sentencepiece" and fault == "newlines":
        code, message = 3, "sentencepiece finds no 1024 pieces in this text"
    result = seqlm_command("prepare", *source, "--unit", unit, "--out", "data/x")
    said = " ".join(result.err.split())
    assert result.code == code, said
    assert message in said and "Traceback" not in said
    assert (tmp_path / "data" / "x").exists() == (code == 0)
    assert not list((tmp_path).glob("data/.tmp*"))


ERRORS = [
    (["--unit", "sentencepiece", "--vocab-size", "256"], 2, "it must be from 300 to"),
    (["--unit", "sentencepiece", "--model-type", "word"], 2, "Known: unigram, bpe"),
    (["--vocab-size", "500"], 2, "need --unit sentencepiece, but the unit is char"),
    (["--unit", "pieces"], 2, "Unknown unit 'pieces'. "),
    (["--documents", "line"], 2, "Unknown value of --documents 'line'. Did you mean 'lines'?"),
    (["--split", "90,20"], 2, "--split 90,20: give the percent of train and val"),
    (["--encoding", "utf9"], 2, "--encoding utf9: Python knows no such text encoding"),
    (["--train", "t.txt", "--val", "t.txt"], 2, "without SOURCE and --split"),
    (
        ["--documents", "files"],
        3,
        "Too few distinct files: the",
    ),
    (["--list"], 2, "Remove t.txt, or --list"),
    (["--from", "x.txt"], 2, "name the file itself: seqlm prepare x.txt"),
]


@pytest.mark.parametrize("options, code, message", ERRORS, ids=lambda v: str(v)[:40])
def test_options_that_cannot_be_say_what_is_right(seqlm_command, tmp_path, options, code, message):
    (tmp_path / "t.txt").write_bytes(TEXT)
    result = seqlm_command("prepare", "t.txt", *options)
    assert (result.code, result.out) == (code, ""), result.err
    assert message in " ".join(result.err.split())
    assert not (tmp_path / "data").exists()


def test_enwik8_is_of_bytes():
    from seqlm.errors import UsageError
    from seqlm.text.prepare import prepare

    with pytest.raises(UsageError, match="enwik8 is defined in bytes. Remove --unit char"):
        prepare(["enwik8"], unit="char")


def test_a_corpus_counted_in_bytes_says_so(seqlm_command, tmp_path, monkeypatch):
    data = (bytes(range(205)) * 50)[:10_000]
    published = corpora.Published(10_000, "sha1", hashlib.sha1(data).hexdigest(), "its author")
    sizes = {"train": 9000, "val": 500, "test": 500}
    known = replace(KNOWN["enwik8"], fill=corpora._one_file("enwik8", published, sizes))
    monkeypatch.setitem(KNOWN, "enwik8", known)
    (tmp_path / "enwik8").write_bytes(data)
    prepared = seqlm_command("prepare", "enwik8", "--from", "enwik8", "--json").json
    assert prepared["data"] == "data/enwik8" and prepared["characters"] == "bytes"
    assert prepared["splits"]["val"]["chars"] == prepared["splits"]["val"]["bytes"] == 500
    seqlm_command("train", *SMALL, "--steps", 2)
    evaluated = seqlm_command("eval", "--json").json
    assert evaluated["characters"] == "bytes"
    assert evaluated["bits_per_char"] == evaluated["bits_per_byte"]
    assert "a character is\ta byte" in seqlm_command("eval").out
    read = seqlm_command("eval", "--on-unknown", "skip", "--json").json
    assert (read["chars"], read["bits_per_char"]) == (500, evaluated["bits_per_char"])


def test_a_val_split_that_would_slow_training_down_is_warned_of(
    seqlm_command, text_file, monkeypatch
):
    monkeypatch.setattr("seqlm.text.prepare.LARGE_VAL", 199)
    result = seqlm_command("prepare", text_file)
    assert "The val split has 200 bytes, and every validation reads all" in result.err
    assert "val split" not in seqlm_command("prepare", text_file, "--split", "99,1", "--force").err


def test_the_known_corpora_are_listed(seqlm_command):
    listed = seqlm_command("prepare", "--list", "--json").json
    found = {row["corpus"]: row for row in listed["corpora"]}
    known, made = [*KNOWN], [*DIAGNOSTICS]
    assert known == ["stdlib", "tinyshakespeare", "ptb-char", "enwik8", "text8"]
    assert list(found) == known + made
    assert found["brackets"]["options"] == {"depth": 8, "length": 64, "documents": 50_000}
    assert found["enwik8"]["unit"] == "byte" and found["stdlib"]["address"] is None
    assert "enwik8" in seqlm_command("prepare", "--list").out
    assert seqlm_command("prepare", "--list", "-q").out.split() == list(found)


def test_the_data_card_is_shown_and_kept(seqlm_command, text_file):
    prepared = seqlm_command("prepare", text_file)
    assert "data card" in prepared.err and "baseline: xz -9" in prepared.err
    assert "rarest" in prepared.err and "data card" not in prepared.out
    assert "data card" not in seqlm_command("prepare", text_file, "--force", "-q").err
    manifest = json.loads((text_file.parent / "data/story/manifest.json").read_text())
    assert manifest["card"]["chars"] == 4000
    assert seqlm_command("prepare", text_file, "--force", "--json").json["card"] == manifest["card"]


# What the shell completes


COMPLETED = {
    ("tr",): "train",
    ("train", "--cell", "min"): "mingru minlstm",
    ("train", "--cell", "lem,min"): "lem,mingru lem,minlstm",
    ("train", "--preset", "b"): "base",
    ("train", "--data", ""): "story",
    ("eval", "--run", "st"): "story-mingru",
    ("prepare", "tiny"): "tinyshakespeare",
    ("prepare", "story.t"): "story.txt",
    ("prepare", "--documents", "l"): "lines",
}
COMPLETE = """
import json, os, sys
from contextlib import suppress
from seqlm.cli import main

for words in json.loads(sys.argv.pop()):
    os.environ["COMP_WORDS"] = " ".join(["seqlm", *words])
    os.environ["COMP_CWORD"] = str(len(words))
    with suppress(SystemExit):
        main()
    print("=====", "torch" in sys.modules)
"""


def test_commands_cells_corpora_and_runs_are_completed_without_torch(run, tmp_path):
    """What bash would offer for the last word."""
    command = [sys.executable, "-c", COMPLETE, json.dumps([*COMPLETED])]
    environment = os.environ | {"_SEQLM_COMPLETE": "complete_bash"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    offered = [" ".join(part.split()) for part in ran.stdout.split("===== False\n")]
    assert offered == [*COMPLETED.values(), ""], ran.stderr
    assert runs.is_run(runs.RUNS / "story-mingru")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    """The most that preparing 30 MB holds is what 10 MB hold, and a little."""
    text = sentences(1_000_000).encode()
    peaks = []
    for size in (10, 30):
        with (tmp_path / f"{size}.txt").open("wb") as file:
            file.writelines(text for _ in range(size))
        code = f"from seqlm.text.prepare import prepare\nprepare(['{size}.txt'])\n"
        code += "print(open('/proc/self/status').read())"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", ran.stdout)[1]) * 1024)
    assert peaks[1] < peaks[0] + 14e6
