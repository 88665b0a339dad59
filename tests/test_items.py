"""New items for a list: no two alike, none in the list, and an end when there are no more."""

import json

import pytest
from conftest import valid

import seqlm
from seqlm.errors import SeqlmError, UsageError
from seqlm.generation.items import items

SMALL = dict(preset="tiny", width=16, layers=1, batch=8, length=16, steps=30, lr=1e-2)


@pytest.fixture
def names(seqlm_command, tmp_path):
    """A run on 100 short names."""
    found = sorted({a + b for a in "abcdefghij" for b in "an en o ill ix un ert ul as ia".split()})
    (tmp_path / "names.txt").write_text("\n".join(found))
    assert seqlm_command("prepare", "names.txt", "--documents", "lines").code == 0
    return seqlm.train(**SMALL), found


@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize("new", [True, False])
def test_items_are_new_or_unique_as_asked(names, unique, new):
    run, known = names
    found = [*run.items(150, seed=1, unique=unique, new=new)]
    assert len(found) == 150 and not any("\n" in text for text in found)
    assert (len(set(found)) == 150) == unique
    if new:
        assert not set(found) & set(known)


def test_items_begin_with_the_prompt(names):
    run, known = names
    found = [*run.items(5, "a", seed=1)]
    assert all(text.startswith("a") and text not in known for text in found)


def test_an_empty_line_is_no_item():
    texts = [("", True), ("ann", True), ("", True), ("bo", False), ("cy", True)]
    assert [*items(iter(texts), 2, set(), unique=False)] == ["ann", "cy"]


def test_texts_without_an_end_are_no_items(names):
    run, _ = names
    assert all(len(text) < 3 for text in run.items(5, chars=3, seed=1))


def test_the_end_of_what_a_model_can_give_is_an_error(names, monkeypatch):
    run, _ = names
    monkeypatch.setattr("seqlm.generation.items.PATIENCE", 20)
    found = run.items(10, temperature=0, new=False)
    assert next(found)
    with pytest.raises(
        SeqlmError, match="no more to give: 1 of 10 texts were found, and the next 20"
    ):
        next(found)


def test_generate_writes_one_item_a_line(seqlm_command, names):
    _, known = names
    arguments = ["generate", "--samples", "20", "--unique", "--new", "--seed", "1"]
    lines = seqlm_command(*arguments).out.splitlines()
    assert len(lines) == len(set(lines)) == 20 and not set(lines) & set(known)
    result = seqlm_command(*arguments, "--json").json
    assert result["texts"] == lines and len(result["bits"]) == 20
    run = seqlm.load()
    alone = [run.bits_per_char(line) * (len(line) + 1) for line in lines]
    assert result["bits"] == pytest.approx(alone, rel=1e-5)


def test_json_lines_have_each_item_with_its_bits(seqlm_command, names):
    arguments = ["generate", "--samples", "9", "--unique", "--seed", "1"]
    whole = seqlm_command(*arguments, "--json").json
    lines = [json.loads(line) for line in seqlm_command(*arguments, "--jsonl").out.splitlines()]
    for line in lines:
        valid("generate-line", line)
    assert [line["text"] for line in lines] == whole["texts"]
    assert [line["bits"] for line in lines] == pytest.approx(whole["bits"], rel=1e-5)
    refused = seqlm_command(*arguments, "--jsonl", "--json")
    assert refused.code == 2 and "Both --json and --jsonl are given." in refused.err


def test_items_of_files_are_apart(seqlm_command, tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"{'ab' * (i % 5)}\nx")
    files = [f"{i}.txt" for i in range(60)]
    assert seqlm_command("prepare", *files, "--documents", "files", "--out", "data/f").code == 0
    seqlm.train("data/f", **SMALL)
    out = seqlm_command("generate", "--samples", "3", "--new", "--seed", "1").out
    assert out.count("----\n") == 3


def test_an_option_that_cuts_documents_is_refused(names):
    for name in ("stop", "load_state", "save_state"):
        with pytest.raises(UsageError, match=f"Items are whole documents, so {name} has no place"):
            names[0].items(1, **{name: "a"})


def test_a_run_without_documents_has_no_items(seqlm_command, run):
    result = seqlm_command("generate", "--new")
    assert result.code == 2
    assert "trained on one stream of text, so its texts have no end." in result.err
    assert "seqlm prepare TEXT --documents lines --out DIR, then seqlm train DIR" in result.err
    with pytest.raises(UsageError):
        run.items(3)


def test_stop_and_items_contradict(seqlm_command, run):
    result = seqlm_command("generate", "--unique", "--stop", "a")
    assert result.code == 2 and "--stop has no effect with --unique, --new or --jsonl" in result.err
