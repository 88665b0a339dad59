"""`compare` trains under equal conditions, loses no result, and tells chance from difference."""

import csv
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, needs_shakespeare, sentences, valid
from killing import kills

import seqlm
from seqlm import api
from seqlm.errors import Diverged, InputError, UsageError
from seqlm.evaluation import evaluate
from seqlm.evaluation.passage import passage_of_split
from seqlm.lab import compare as lab
from seqlm.lab.entries import entries as parse
from seqlm.model import blueprint, parameter_count
from seqlm.text.corpus import open_corpus
from seqlm.text.prepare import prepare
from seqlm.training import launch

GIVEN = {"model.width": 16, "model.layers": 1, "train.batch": 2, "train.length": 16}
GIVEN |= {"train.steps": 6, "runtime.threads": 1}
SHAPE = "--preset tiny --width 16 --layers 1 --batch 2 --length 16 --steps 6 --threads 1".split()


def entries(*names, match="params", **more):
    return parse(names, match, "tiny", None, {**GIVEN, **more})


def params(entry):
    return parameter_count(blueprint(entry.config, 1))


@pytest.mark.parametrize("width", [100, 256])
def test_widths_match_the_parameters_of_the_first_within_one_percent(width):
    names = "mingru", "minlstm", "lem", "cfc", "lstm", "attention", "lem:recurrence=diagonal"
    first, *others = parse(names, "params", None, None, {"model.width": width})
    assert first.config.model.width == width
    for other in others:
        assert abs(params(other) / params(first) - 1) <= 0.01, other.label
        assert other.config.model.width != width


def test_matched_by_steps_all_have_the_width_that_is_given():
    assert {e.config.model.width for e in entries("mingru", "lem", "lstm", match="steps")} == {16}


def test_a_stack_and_options_of_one_cell_are_written_into_its_name():
    given = {"cell.lem.dt": 0.5, "model.layers": 2}
    alone, mixed = entries("mingru", "mingru+lem:lem.recurrence=diagonal", **given)
    assert alone.config.cell.options == {"mingru": alone.config.cell.options["mingru"]}
    assert mixed.config.cell.name == "mingru,lem"
    lem = mixed.config.cell.options["lem"]
    assert (lem["dt"], lem["recurrence"]) == (0.5, "diagonal")


def test_an_entry_may_have_its_own_settings_of_the_model_and_the_optimizer():
    names = "mingru", "mingru:model.conv=4", "lem:dt=0.5:optim.lr=0.03:model.layers=2"
    first, second, third = entries(*names, **{"optim.lr": 0.06})
    assert [e.config.model.conv for e in (first, second, third)] == [0, 4, 0]
    assert [e.config.optim.lr for e in (first, second, third)] == [0.06, 0.06, 0.03]
    assert third.config.model.layers == 2 and third.config.cell.options["lem"]["dt"] == 0.5
    # equal in size with its own settings
    assert third.config.model.width < 16 and abs(params(third) / params(first) - 1) < 0.2
    assert entries("mingru", "lem:model.width=8", match="steps")[1].config.model.width == 8


@pytest.mark.parametrize(
    "names, match, more, message",
    [
        (["mingru", "mingru"], "params", {}, "give at least one cell, and each only once"),
        ([], "params", {}, "give at least one cell"),
        (["mingru", "mngru"], "params", {}, "Unknown cell 'mngru'. Did you mean 'mingru'"),
        (["mingru"], "parameters", {}, "Unknown match 'parameters'. Did you mean 'params'"),
        (["mingru"], "time", {}, "--match time compares equal times. Give --time-limit"),
        (["mingru"], "steps", {"train.time_limit": 9.0}, "--match steps compares equal steps"),
        (["mingru"], "params", {"cell.lem.dt": 0.5}, "cell.lem.dt is set, but lem is not compared"),
        (["mingru:dt=1"], "params", {}, "Unknown option of mingru 'dt'"),
        (["mingru:dt"], "params", {}, "dt"),
        (
            ["mingru", "lem:train.steps=9"],
            "params",
            {},
            "lem:train.steps=9: train.steps cannot differ between.*all: --set train.steps=9",
        ),
        (["mingru:runtime.threads=1"], "params", {}, "runtime.threads cannot differ between"),
        (
            ["mingru", "lem:model.width=8"],
            "params",
            {},
            "lem:model.width=8: the width follows from",
        ),
        (["mingru:model.cnv=4"], "params", {}, "Unknown configuration key 'model.cnv'"),
        (
            ["mingru", "attention:heads=500"],
            "params",
            {},
            "cell.heads is 500; it must be from 1 to 8",
        ),
        (
            ["mingru", "cfc:backbone_units=6000"],
            "params",
            {},
            "No width of cfc:backbone_units=6000 gives about",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(names, match, more, message):
    given = {k: v for k, v in {**GIVEN, **more}.items() if k != "train.steps" or not more}
    with pytest.raises(UsageError, match=message):
        parse(names, match, "tiny", None, given)


def compared(corpus, found, seeds, out="checkpoints/both", split="val"):
    opened = open_corpus(corpus)
    told = [*lab.compare(opened, found, seeds, Path(out), split)]
    return told, lab.results(opened, found, seeds, Path(out), split)


@pytest.fixture
def kept(corpus, at_once, tmp_path_factory):
    """A finished comparison: its entries and its folder."""
    found = entries("mingru", "lstm", match="steps")
    made = (
        tmp_path_factory.getbasetemp() / "compared"
    )  # once for all tests, of which each has a copy
    if not made.exists():
        compared(corpus, found, 1)
        shutil.copytree("checkpoints/both", made)
    else:
        shutil.copytree(made, "checkpoints/both")
    return found, Path("checkpoints/both")


def test_a_comparison_trains_all_seeds_and_says_what_they_came_to(corpus, at_once):
    found = entries("mingru", "lstm")
    told, rows = compared(corpus, found, 2)
    assert told[-1].trainings == 4 and {(t.label, t.seed) for t in told} == {
        (label, seed) for label in ("mingru", "lstm") for seed in (0, 1)
    }
    assert [row.bits_per_char for row in rows] == sorted(row.bits_per_char for row in rows)
    best, other = rows
    assert best.behind == 0 and best.low is best.high is None
    assert other.behind == pytest.approx(other.bits_per_char - best.bits_per_char, abs=1e-9)
    assert other.low <= other.behind <= other.high
    for row in rows:
        runs = [api.load(f"checkpoints/both/{row.cell}-s{seed}") for seed in (0, 1)]
        figures = [run.evaluate(split="val")["bits_per_char"] for run in runs]
        assert row.bits_per_char == pytest.approx(sum(figures) / 2, rel=1e-6)
        assert row.spread == pytest.approx(np.std(figures, ddof=1), rel=1e-3)
        assert [run.config.train.seed for run in runs] == [0, 1]
        state = runs[0].model.initial_state(1)
        assert row.state_bytes == sum(s.numel() * s.element_size() for s in state)
        assert row.params == parameter_count(runs[0].model) and row.steps == 6
        assert row.chars_per_second > 0 and row.decode_chars_per_second > 0
        assert row.peak_memory_bytes > 5e7


def test_an_interrupted_comparison_goes_on_where_it_was(corpus, monkeypatch, request):
    found = entries("mingru", "lem")
    spawn = lab.spawn
    request.getfixturevalue("at_once")
    compared(corpus, found[:1], 1)
    monkeypatch.setattr(lab, "spawn", spawn)
    first = lab.compare(open_corpus(corpus), found, 1, Path("checkpoints/both"), "val")
    while next(first).label == "mingru":
        pass
    first.close()  # in the middle of lem's training, which saves its step
    run = Path("checkpoints/both/lem-s0")
    assert not run.with_name("lem-s0.json").exists()
    kept = Path("checkpoints/both/mingru-s0.json").read_bytes()
    _, rows = compared(corpus, found, 1)
    assert Path("checkpoints/both/mingru-s0.json").read_bytes() == kept
    assert {row.steps for row in rows} == {6}

    def again(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(lab, "_train", again)
    assert compared(corpus, found, 1)[1] == rows


def test_another_configuration_does_not_pass_for_the_one_that_is_there(corpus, tmp_path, at_once):
    compared(corpus, entries("mingru"), 1)
    with pytest.raises(UsageError, match="mingru-s0.json has another configuration"):
        compared(corpus, entries("mingru", **{"train.steps": 7}), 1)
    with pytest.raises(UsageError, match="mingru-s0.json has another configuration"):
        compared(corpus, entries("mingru"), 1, split="test")
    (tmp_path / "other.txt").write_text(sentences(4000, seed=1))
    with pytest.raises(UsageError, match="mingru-s0.json has another configuration"):
        compared(prepare(["other.txt"])[0], entries("mingru"), 1)


def test_a_run_that_is_in_the_way_is_not_taken_for_the_one_that_is_wanted(corpus, at_once):
    seqlm.train(corpus, **SMALL, run="checkpoints/both/mingru-s0")
    with pytest.raises(UsageError, match="mingru-s0 has another configuration, corpus or"):
        compared(corpus, entries("mingru"), 1)


def test_an_outcome_without_its_run_is_made_again_and_a_damaged_one_said(corpus, at_once):
    found, out = entries("mingru"), Path("checkpoints/both")
    _, rows = compared(corpus, found, 1)
    shutil.rmtree(out / "mingru-s0")
    _, again = compared(corpus, found, 1)
    assert again[0].bits_per_char == rows[0].bits_per_char
    for damaged, words in (("{", "not valid JSON"), ("{}", "damaged, or of another version")):
        (out / "mingru-s0.json").write_text(damaged)
        with pytest.raises(InputError, match=words):
            compared(corpus, found, 1)


@pytest.mark.parametrize(
    "forged",
    [
        *({"nats": [value] * 20} for value in (math.nan, math.inf, -1.0, "1", None, True)),
        *({"nats": value} for value in ([], {}, "1", 1.0)),
        *({"seconds": value} for value in (math.nan, 0.0, -1.0, "1")),
        *({"accuracy": value} for value in (math.nan, 1.5)),
        *({"evaluated": value} for value in (0, -5, 1e3)),
        *({name: math.inf} for name in ("params", "steps", "chars", "state_bytes")),
        {"decode_chars_per_second": math.inf},
        {"identity": 1},
    ],
    ids=str,
)
def test_figures_that_no_training_has_are_refused(corpus, at_once, kept, forged):
    """NaN, for example, would be the best result."""
    found, out = kept
    path = out / "mingru-s0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **forged}))
    with pytest.raises(InputError, match="mingru-s0.json is damaged, or of another"):
        compared(corpus, found, 1)


def test_results_of_different_blocks_are_refused(corpus, at_once, kept):
    found, out = kept
    path = out / "mingru-s0.json"
    outcome = json.loads(path.read_text())
    path.write_text(json.dumps({**outcome, "nats": outcome["nats"][:-1]}))
    with pytest.raises(InputError, match="do not use the same blocks"):
        compared(corpus, found, 1)


def test_wherever_compare_is_killed_it_goes_on_and_keeps_what_was_done(corpus, kept, monkeypatch):
    """Killed at every file operation that writes an outcome."""
    found, out = kept
    path = out / "lstm-s0.json"
    opened, before = open_corpus(corpus), path.read_bytes()
    word = lab.Outcome(**json.loads(before))
    process = SimpleNamespace(join=lambda: None)

    def once(*_, daemon):
        return process, SimpleNamespace(recv=lambda: word, close=lambda: None)

    monkeypatch.setattr(lab, "spawn", once)
    count = 0
    for _ in kills(
        lambda: path.unlink(missing_ok=True),
        lambda: [*lab.compare(opened, found, 1, out, "val")],
    ):
        assert not path.exists() or path.read_bytes() == before
        [*lab.compare(opened, found, 1, out, "val")]
        assert path.read_bytes() == before and not list(out.glob(".*"))
        count += 1
    assert count >= 3


def test_a_place_that_cannot_be_written_is_said(seqlm_command, corpus, tmp_path):
    (tmp_path / "one.txt").write_text("x")
    for out in ("./one.txt", "./one.txt/below"):
        result = seqlm_command("compare", "--data", corpus, "--cells", "mingru", "--out", out)
        assert result.code == 1 and "Cannot write" in result.err


def test_an_own_number_of_validations_is_kept(tmp_path):
    (tmp_path / "own.toml").write_text("[train]\neval_every = 3\n")
    (found,) = parse(["mingru"], "params", "tiny", tmp_path / "own.toml", GIVEN)
    assert found.config.train.eval_every == 3


def test_widths_that_come_no_nearer_are_said(seqlm_command, corpus, at_once):
    given = ["compare", "--data", corpus, *SHAPE, "--cells", "mingru,lstm", "--out", "few"]
    assert "warning: The numbers of parameters differ from" in seqlm_command(*given).err
    assert "parameters differ" not in seqlm_command(*given[:-1], "same", "--match", "steps").err


def test_too_few_blocks_have_no_interval(tmp_path, at_once):
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(sentences(300, seed=i))
    folder = prepare(["texts"], documents="files")[0]
    _, rows = compared(folder, entries("mingru", "lstm"), 1)
    assert rows[1].behind > 0 and rows[1].low is rows[1].high is None


def test_an_error_of_a_training_is_said_by_the_comparison(corpus):
    found = entries("mingru", **{"optim.lr": 1e9, "optim.adam_lr": 1e9, "optim.clip": 0.0})
    with pytest.raises(lab.SeqlmError, match="mingru-s0: 10 steps in a row|mingru-s0: No valida"):
        compared(corpus, found, 1)


def test_a_figure_that_is_not_finite_is_an_error_and_no_outcome(corpus, at_once, monkeypatch):
    real = evaluate.blocks
    monkeypatch.setattr(
        evaluate, "blocks", lambda *given: [s._replace(nats=float("nan")) for s in real(*given)]
    )
    with pytest.raises(Diverged, match="mingru-s0: The figure of its best step is not a finite"):
        compared(corpus, entries("mingru"), 1)
    assert not Path("checkpoints/both/mingru-s0.json").exists()


@pytest.mark.parametrize("documents", ["none", "lines"])
def test_blocks_sum_to_the_score(text_file, documents):
    corpus = open_corpus(prepare([str(text_file)], documents=documents)[0])
    setup = launch.start(str(corpus.path), preset="tiny", settings=GIVEN, run="one")
    model, tokenizer = setup.trainer.model.eval(), corpus.tokenizer
    passage = passage_of_split(corpus, "train", tokenizer)
    with torch.inference_mode():
        whole = evaluate.score(model, tokenizer, passage).nats
        blocks = evaluate.blocks(model, passage, 100)
    assert sum(block.nats for block in blocks) == pytest.approx(whole, rel=1e-6)
    assert len(blocks) >= len(passage.symbols) // 130


def test_the_command_writes_table_numbers_and_picture(seqlm_command, corpus, at_once):
    cells = "mingru,lem:recurrence=diagonal"
    given = ["compare", "--data", corpus, "--cells", cells, *SHAPE, "--out", "both"]
    result = seqlm_command(*given, "--json")
    assert result.code == 0, result.err
    valid("compare", result.json)
    assert (result.json["match"], result.json["split"]) == ("params", "val")
    assert [set(row) for row in result.json["rows"]] >= [
        {
            *("cell", "width", "params", "bits_per_char", "chars_per_second"),
            *("decode_chars_per_second", "peak_memory_bytes", "state_bytes"),
        }
    ]
    out = Path("checkpoints/both")
    assert json.loads((out / "compare.json").read_text())["rows"] == result.json["rows"]
    rows = [*csv.DictReader((out / "compare.csv").read_text().splitlines())]
    assert [row["cell"] for row in rows] == [row["cell"] for row in result.json["rows"]]
    lines = (out / "compare.md").read_text().splitlines()
    assert lines[0].startswith("| cell | width x layers |") and len(lines) == 4
    assert (out / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "<svg" in (out / "compare.svg").read_text()
    assert seqlm_command(*given, "-q").out.strip() == result.json["rows"][0]["cell"]


OWN = """
from seqlm.cells import Recurrence
from seqlm.ops import Linear


class Average(Recurrence):
    def __init__(self, width, *, rate=0.9):
        super().__init__()
        self.width, self.rate, self.inputs = width, rate, Linear(width, width)

    def initial_state(self, batch):
        return (self.zeros(batch, self.width),)

    def project(self, x):
        return self.inputs(x)

    def recur(self, drive, state):
        h = self.rate * state[0] + drive
        return h, (h,)
"""


def test_a_cell_file_is_compared_in_folders_that_show_and_again_when_it_changed(
    seqlm_command, corpus, at_once, tmp_path
):
    (tmp_path / "ema.py").write_text(OWN)
    given = ["compare", "--data", corpus, "--cells", "./ema.py,./ema.py:rate=0.5", *SHAPE]
    given += ["--out", "own"]
    result = seqlm_command(*given)
    assert result.code == 0, result.err
    assert "seqlm eval --run checkpoints/own/ema.py-s0 --cell ./ema.py --split" in result.err
    names = {path.name for path in Path("checkpoints/own").iterdir()}
    assert {"ema.py-s0", "ema.py-s0.json", "ema.py-rate=0.5-s0"} <= names
    assert not any(name.startswith((".", "-")) for name in names)
    Path("checkpoints/own/ema.py-s0.json").unlink()  # as if it was interrupted before its end
    again = seqlm_command(*given)
    assert again.code == 0, again.err
    (tmp_path / "ema.py").write_text(OWN.replace("return self.inputs(x)", "return -self.inputs(x)"))
    assert "has another configuration, corpus or split" in seqlm_command(*given).err


def test_cells_whose_folders_would_be_one_are_refused(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "ema.py").write_text(OWN)
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "ema.py").write_text(OWN)
    with pytest.raises(UsageError, match="two cells would have the same file names"):
        entries("./ema.py", "../ema.py")


def test_without_matplotlib_there_is_all_but_the_picture(
    seqlm_command, corpus, monkeypatch, at_once
):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    result = seqlm_command(
        "compare", "--data", corpus, "--cells", "mingru", *SHAPE, "--out", "plain"
    )
    assert result.code == 0 and "pip install -e '.[plot]'" in result.err
    assert Path("checkpoints/plain/compare.md").is_file()
    assert not Path("checkpoints/plain/compare.png").exists()


def test_what_compare_refuses_ends_with_code_2(seqlm_command, corpus):
    result = seqlm_command("compare", "--data", corpus, "--cells", "mingru,mingru")
    assert result.code == 2 and "each only once" in result.err
    result = seqlm_command("compare", "--data", corpus, *SHAPE, "--split", "train")
    assert result.code == 2 and "Unknown value of --split 'train'." in result.err
    assert not Path("checkpoints").exists()


@needs_shakespeare
def test_figures_of_one_cell_do_not_depend_on_the_others():
    alone = entries("lem")[0].config
    assert entries("mingru", "lem", match="steps")[1].config == alone
