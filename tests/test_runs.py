"""The lab book: seqlm runs, its notes, the difference of two runs, and removing one."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, start

import seqlm
from seqlm import cells
from seqlm.config import Config
from seqlm.errors import UsageError
from seqlm.model import blueprint, parameter_count
from seqlm.store import book, checkpoint, runs
from seqlm.text.tokenizer import CharTokenizer
from seqlm.ui import Screen, fitting


@pytest.fixture
def three(run):
    """The run story-mingru of 4 steps, a copy of it, and one of LEM with 2 steps and a note."""
    shutil.copytree(run.path, "checkpoints/again")
    seqlm.train("data/story", run="other", cell="lem", **{**SMALL, "width": 8, "steps": 2})
    book.write_note(Path("checkpoints/other"), "half as wide")
    return run


def listed(result) -> list[str]:
    assert result.code == 0, result.err
    return [Path(name).name for name in result.out.split()]


def test_a_line_says_what_the_run_is_and_how_far_it_came(run, seqlm_command):
    seqlm_command("runs", "note", "story-mingru", "first try")
    (one,) = seqlm_command("runs", "--json").json["runs"]
    saved = runs.load(run.path, "last")[0]
    assert one["params"] == parameter_count(run.model)
    assert one["seconds"] == saved.progress.elapsed > 0
    assert one["chars_per_second"] == saved.progress.chars / saved.progress.elapsed
    assert one["val_bits_per_char"] == saved.progress.best_bits_per_char
    assert (one["corpus"], one["protocol"], one["steps"]) == ("story", "quick estimate", 4)
    heading, line = seqlm_command("runs").out.splitlines()
    assert heading.split("\t") == (
        "run cell params corpus steps time bits protocol chars/s when note".split()
    )
    shown = dict(zip(heading.split("\t"), line.split("\t"), strict=True))
    assert shown["bits"] == f"{one['val_bits_per_char']:.4f}" and shown["note"] == "first try"
    assert shown["when"] == one["saved_at"][:16].replace("T", " ")


@pytest.mark.parametrize("cell", cells.names())
@pytest.mark.parametrize("tie", [False, True])
def test_the_parameters_are_counted_without_reading_them(tmp_path, cell, tie):
    config = Config().updated(
        {"cell.name": cell, "model.width": 16, "model.layers": 1, "model.tie": tie}
    )
    from seqlm.model import build

    model = build(config, 3)
    checkpoint.save(
        tmp_path,
        config,
        CharTokenizer("abc"),
        checkpoint.Progress(),
        {},
        {"model": model.state_dict(), "optimizer": {}, "state": {}},
    )
    glance = checkpoint.glance(tmp_path / checkpoint.folder_name(0))
    assert glance.params == parameter_count(blueprint(config, 3))
    assert (glance.cell, glance.protocol) == (cell, "quick estimate")


@pytest.mark.parametrize(
    "options, protocol",
    [(["--documents", "lines"], "by document"), (["--answers", "="], "answers")],
)
def test_the_protocol_is_that_of_the_validations(seqlm_command, options, protocol):
    Path("sums.txt").write_text("".join(f"{i}+{j}={i + j}\n" for i in range(30) for j in range(9)))
    assert seqlm_command("prepare", "sums.txt", *options).code == 0
    seqlm.train("data/sums", **{**SMALL, "steps": 1})
    assert seqlm_command("runs", "--json").json["runs"][0]["protocol"] == protocol


def test_a_run_of_bytes_shows_its_bits_per_byte(seqlm_command):
    Path("t.bin").write_bytes(bytes(range(256)) * 200)
    assert seqlm_command("prepare", "t.bin", "--unit", "byte", "--out", "data/t").code == 0
    seqlm.train("data/t", **{**SMALL, "steps": 1})
    (one,) = seqlm_command("runs", "--json").json["runs"]
    assert one["val_bits_per_char"] is None
    line = seqlm_command("runs").out.splitlines()[1].split("\t")
    assert line[6:8] == [f"{one['val_bits_per_byte']:.4f}", "quick estimate, per byte"]


def test_the_list_is_sorted_by_any_column(three, seqlm_command):
    assert listed(seqlm_command("runs", "-q")) == ["again", "other", "story-mingru"]
    assert listed(seqlm_command("runs", "-q", "--sort", "params"))[0] == "other"
    assert listed(seqlm_command("runs", "-q", "--sort", "val_bits_per_char"))[2] == "other"
    assert listed(seqlm_command("runs", "-q", "--sort", "note"))[2] == "other"


def test_filters_all_have_to_fit(three, seqlm_command):
    def kept(*filters):
        words = [word for text in filters for word in ("--filter", text)]
        return listed(seqlm_command("runs", "-q", *words))

    assert kept("cell=lem") == ["other"]
    assert kept("cell=mingru") == ["again", "story-mingru"]
    assert kept("cell=mingru", "run=*again") == ["again"]
    assert kept("steps=4", "note=*wide*") == []
    assert kept("run=again") == kept("run=checkpoints/again") == ["again"]
    when = seqlm_command("runs", "--filter", "run=other").out.splitlines()[1].split("\t")[9]
    assert "other" in kept(f"when={when}")
    result = seqlm_command("runs", "--filter", "cell=gru")
    assert result.code == 0 and "None of the 3 runs fits cell=gru." in result.err


def test_tabs_separate_all_fields_of_the_json(three, seqlm_command):
    rows = [line.split("\t") for line in seqlm_command("runs", "--tsv").out.splitlines()]
    as_json = seqlm_command("runs", "--json").json["runs"]
    assert rows[0] == [*as_json[0]] and len(rows) == 4
    assert [row[0] for row in rows[1:]] == [one["run"] for one in as_json]
    assert seqlm_command("runs", "--tsv", "--filter", "cell=no").out.startswith("run\tcell\t")


ERRORS = [
    (["--sort", "tim"], 2, "Unknown column of --sort 'tim'. Did you mean 'time'?"),
    (["--filter", "lem"], 2, "--filter lem: write it as COLUMN=VALUE, such as --filter cell=lem."),
    (["--filter", "cel=lem"], 2, "Unknown column of --filter 'cel'. Did you mean 'cell'?"),
    (["--tsv", "--json"], 2, "Both --tsv and --json are given. Keep one of them."),
    (["show"], 2, "Unknown action of runs 'show'. Known: diff, note, remove."),
    (["diff", "story-mingru"], 2, "Write it as: seqlm runs diff A B"),
    (["diff", "story-mingru", "b"], 3, "seqlm runs diff b: neither b nor checkpoints/b is a run."),
    (["diff", "a", "b", "--sort", "run"], 2, "--sort, --filter and --tsv are of the list."),
    (["diff", "a", "b", "--yes"], 2, "--yes has an effect only with remove. Remove it."),
    (["note", "story-mingru"], 2, "Write it as: seqlm runs note RUN TEXT"),
    (["note", "story-mingru", "x" * 1001], 2, "The note has 1,001 characters; it may have 1,000"),
    (["remove", "nothing", "--yes"], 3, "neither nothing nor checkpoints/nothing is a run."),
    (["remove", "data/story", "--yes"], 3, "data/story is a corpus, not a run."),
    (
        ["remove", "story-mingru"],
        2,
        "Removing checkpoints/story-mingru cannot be undone. Add --yes",
    ),
]


@pytest.mark.parametrize("words, code, message", ERRORS, ids=lambda value: str(value)[:40])
def test_a_wrong_line_is_refused_with_what_is_right(run, seqlm_command, words, code, message):
    result = seqlm_command("runs", *words)
    assert (result.code, result.out) == (code, "") and message in result.err, result.err
    assert runs.is_run(run.path) and Path("data/story").is_dir()


def test_a_damaged_step_is_passed_over_with_its_reason(run, seqlm_command):
    (run.path / "step-00000004" / "train_state.json").write_text("{}")
    result = seqlm_command("runs", "--json")
    assert result.json["runs"][0]["steps"] == 0
    assert "Skipping step-00000004" in result.err
    assert "--step" not in result.err  # an option that runs does not have


def test_a_run_without_any_whole_step_is_left_out_of_the_list(three, seqlm_command):
    for step in runs.steps(three.path):
        (step / "config.toml").write_text("[cell]\nname = 3\n")
    result = seqlm_command("runs", "-q")
    assert listed(result) == ["again", "other"]
    assert "checkpoints/story-mingru has no undamaged step" in result.err


def test_listing_hashes_nothing_and_needs_no_torch(run, monkeypatch):
    code = (
        "import hashlib, sys\n"
        "from seqlm.store import book\n"
        "hashlib.sha256 = hashlib.file_digest = None\n"
        "assert len(book.entries()[0]) == 1\n"
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "False\n", ran.stderr


def test_a_narrow_terminal_gets_fewer_columns_and_one_line_a_run(three, monkeypatch):
    from seqlm.cli import runs as listing

    rows = [[*listing.HEADINGS], *map(listing._row, book.entries()[0])]
    for width, gone in ((300, set()), (90, {"params", "when"}), (20, set(listing.SPARED))):
        fitted = fitting(rows, listing.SPARED, width)
        assert {*rows[0]} - {*fitted[0]} >= gone and {"run", "cell", "bits"} <= {*fitted[0]}
        if width > 20:
            assert all(sum(len(str(cell)) + 2 for cell in row) <= width + 2 for row in fitted)


# Notes


def test_train_keeps_a_note_and_a_later_one_replaces_it(run, seqlm_command):
    words = "--preset tiny --width 8 --layers 1 --steps 2 --data story --run noted".split()
    assert seqlm_command("train", *words, "--note", "one\n  two").code == 0
    assert book.read_note(Path("checkpoints/noted")) == "one two"
    assert seqlm_command("train", *words, "--force").code == 0  # another run, without a note
    assert book.read_note(Path("checkpoints/noted")) == ""
    resumed = ["train", "--resume", "--run", "noted", "--steps", 3]
    assert seqlm_command(*resumed, "--note", "three steps").code == 0
    assert seqlm_command(*resumed).code == 0  # finished, and keeps its note
    assert book.read_note(Path("checkpoints/noted")) == "three steps"
    assert seqlm_command(*resumed, "--note", "done").code == 0
    assert seqlm_command("runs", "note", "noted", "it is done", "-q").out == "it is done\n"
    assert seqlm_command("runs", "note", "noted", "").code == 0
    assert not Path("checkpoints/noted/note.txt").exists()


def test_a_note_that_cannot_be_kept_is_refused_before_training(corpus, seqlm_command):
    result = seqlm_command("train", "--data", "story", "--note", "x" * 1001)
    assert result.code == 2 and "it may have 1,000" in result.err
    with pytest.raises(UsageError, match="in UTF-8"):
        book.checked_note("\udcff")
    assert not Path("checkpoints").exists()


def test_a_note_from_elsewhere_cannot_break_the_list(run, seqlm_command):
    (run.path / "note.txt").write_bytes(b"a\tb\n\x1b[2Jc\xff" + b"x" * 5000)
    result = seqlm_command("runs")
    assert result.code == 0 and len(result.out.splitlines()) == 2 and "\x1b" not in result.out
    assert "a b \\x1b[2Jc\N{REPLACEMENT CHARACTER}xx" in result.out
    (run.path / "note.txt").unlink()
    (run.path / "note.txt").mkdir()
    result = seqlm_command("runs", "-q")
    assert listed(result) == ["story-mingru"] and "note.txt is not a plain file" in result.err


def test_a_run_whose_weights_are_cut_is_not_listed_with_0_parameters(run, seqlm_command):
    for weights in run.path.glob("step-*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:100])
    result = seqlm_command("runs", "-q")
    assert listed(result) == [] and "model.safetensors was cut or changed" in result.err


# Two runs


def test_the_difference_has_what_differs_and_the_figures_of_both(three, seqlm_command):
    result = seqlm_command("runs", "diff", "story-mingru", "other", "--json").json
    settings = result["settings"]
    assert settings["cell.name"] == ["mingru", "lem"] and settings["model.width"] == [16, 8]
    assert settings["cell.lem.dt"] == [None, 1.0] and "model.layers" not in settings
    assert result["figures"]["steps"] == [4, 2]
    assert result["figures"]["note"] == ["", "half as wide"]
    table = seqlm_command("runs", "diff", "story-mingru", "other").out
    assert "\ntrain.steps\t4\t2\n" in table and "\nprotocol\tquick estimate\t" in table
    same = seqlm_command("runs", "diff", "story-mingru", "again", "--json").json
    assert same["settings"] == {} and same["differing"] == ""


def test_small_settings_are_not_rounded_to_the_same(corpus, seqlm_command):
    for rate in ("0.00031", "0.00032"):
        seqlm.train("data/story", run=rate, lr=float(rate), **{**SMALL, "steps": 1})
    assert (
        "\noptim.lr\t0.00031\t0.00032\n" in seqlm_command("runs", "diff", "0.00031", "0.00032").out
    )


# Removing


def test_a_removed_run_is_gone_and_the_others_stay(three, seqlm_command):
    result = seqlm_command("runs", "remove", "again", "--yes", "--json")
    assert result.json == {"run": "checkpoints/again", "left": []}
    assert sorted(path.name for path in runs.RUNS.iterdir()) == ["other", "story-mingru"]


def test_files_that_are_not_of_the_run_stay(run, seqlm_command):
    (run.path / "plot.svg").write_text("mine")
    (run.path / "deeper").mkdir()
    result = seqlm_command("runs", "remove", "story-mingru", "--yes")
    assert result.code == 0 and "not of the run: deeper, plot.svg." in result.err
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "deeper", "plot.svg"]
    assert (run.path / "plot.svg").read_text() == "mine"


def test_a_run_that_is_being_trained_is_not_removed(corpus, seqlm_command):
    setup = start(corpus, "busy")
    reports = setup.reports()
    next(reports)
    result = seqlm_command("runs", "remove", "busy", "--yes")
    assert (
        result.code == 2 and "busy is being trained. Wait for the training, or stop" in result.err
    )
    assert [report.step for report in reports] == [2, 3, 4, 5, 6]


def test_a_link_to_a_run_is_not_followed(run, seqlm_command):
    Path("checkpoints/link").symlink_to(run.path.resolve())
    result = seqlm_command("runs", "remove", "link", "--yes")
    assert (
        result.code == 2 and "checkpoints/link is a link. Remove the run by its own" in result.err
    )
    assert runs.is_run(run.path)


@pytest.mark.parametrize("answer, code", [("y\n", 0), ("n\n", 1), ("\n", 1)])
def test_on_a_terminal_it_asks(run, seqlm_command, monkeypatch, answer, code):
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(Screen, "note", lambda *_: None)  # drawn as on a terminal
    result = seqlm_command("runs", "remove", "story-mingru")
    assert result.code == code
    assert "Remove checkpoints/story-mingru with its 2 saved steps?" in result.err
    assert runs.is_run(run.path) == (code == 1)


def test_the_json_of_the_list_says_nothing_of_other_actions(run, seqlm_command):
    assert {*json.loads(seqlm_command("runs", "--json").out)} == {"runs", "names"}
