"""Nothing is lost: what is killed and resumed is, byte for byte, what was never stopped."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import SMALL, run_files, start

import seqlm
from seqlm import cells, runs
from seqlm.errors import InputError, UsageError
from seqlm.prepare import prepare
from seqlm.storage import locked


@pytest.mark.parametrize("cell", cells.names())
@pytest.mark.parametrize("state", ["carry", "reset"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_uninterrupted_one_byte_for_byte(
    corpus, cell, state, accumulate, dtype
):
    """Weights, optimizer, carried state, best value and metrics; with dropout and a convolution."""
    options = dict(
        cell__name=cell,
        train__state=state,
        train__accumulate=accumulate,
        model__dropout=0.2,
        model__conv=3,
        runtime__dtype=dtype,
    )
    whole = start(corpus, "whole", **options)
    list(whole.reports())
    broken = start(corpus, "broken", **options)
    reports = broken.reports()
    for _ in range(5):  # the last save was at step 4
        next(reports)
    reports.close()
    resumed = start(corpus, "broken", resume=True)
    assert resumed.learner.progress.step == 4 and resumed.warnings == []
    assert [report.step for report in resumed.reports()] == [5, 6]
    assert run_files(broken.run, 6) == run_files(whole.run, 6)


@pytest.mark.parametrize("cell", cells.names())
def test_a_run_killed_by_the_system_goes_on_as_if_it_had_not_been(corpus, cell):
    options = f"--preset tiny --width 16 --layers 1 --batch 4 --length 16 --threads 1 --cell {cell}"
    options += " --steps 1500 --set train.save_every=2 --set train.eval_every=3 --run killed"
    command = [sys.executable, "-m", "seqlm", "train", "--data", str(corpus), *options.split()]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    metrics, deadline = runs.RUNS / "killed" / "metrics.jsonl", time.monotonic() + 60
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 7:
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    saved, warnings = runs.load(runs.RUNS / "killed", "last")
    seen = metrics.read_bytes().count(b"\n")
    # the last save, or the one before if it was killed in it
    assert warnings == [] and seen - 4 <= saved.step <= seen

    def rest(name, resume):
        given = dict(runtime__threads=1, train__save_every=2, cell__name=cell)
        setup = start(corpus, name, resume=resume, train__steps=1500, **given)
        stop = saved.step + 4
        list(setup.reports(interrupted=lambda: setup.learner.progress.step == stop))
        return run_files(setup.run, stop)

    killed, whole = rest("killed", True), rest("whole", False)
    for name in ("model", "optimizer", "state"):
        assert killed[f"{name}.safetensors"] == whole[f"{name}.safetensors"]
    assert (killed["metrics.jsonl"], killed["state"]) == (whole["metrics.jsonl"], whole["state"])


def test_a_second_signal_stops_at_once(corpus):
    """A step takes some seconds; without a second signal it would be finished and saved."""
    options = "--preset tiny --cell lem --width 32 --layers 24 --batch 4 --length 900 --threads 1"
    command = [sys.executable, "-m", "seqlm", "train", "--data", str(corpus), *options.split()]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "backend" not in running.stderr.readline():
        pass
    time.sleep(1)
    running.send_signal(signal.SIGINT)
    while "once more to stop at once" not in running.stderr.readline():
        pass
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=20) == -signal.SIGINT
    running.stderr.close()


def test_a_kill_before_the_first_pointer_leaves_a_run_that_resumes(corpus, monkeypatch):
    def killed(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("seqlm.runs.write_file", killed)
        list(start(corpus, "young").reports())
    assert not (runs.RUNS / "young" / "last").exists()
    resumed = start(corpus, "young", resume=True)
    assert resumed.learner.progress.step == 0
    assert [report.step for report in resumed.reports()] == [1, 2, 3, 4, 5, 6]


def test_what_a_kill_left_is_cleared_away_when_the_run_goes_on(corpus):
    setup = start(corpus, "left")
    reports = setup.reports()
    for _ in range(4):
        next(reports)
    reports.close()
    (setup.run / ".tmp-step-00000005-abc").mkdir()
    (setup.run / ".tmp-step-00000005-abc" / "model.safetensors").write_bytes(b"half")
    (setup.run / ".tmp-last").write_text("step-0")
    list(start(corpus, "left", resume=True).reports())
    assert not list(setup.run.glob(".tmp-*"))


def test_a_run_that_another_process_trains_is_left_alone(corpus, seqlm_command):
    setup = start(corpus, "taken")
    reports = setup.reports()
    next(reports)
    with pytest.raises(UsageError, match="Another process is training into checkpoints/taken"):
        next(start(corpus, "taken", resume=True).reports())
    result = seqlm_command("train", "--run", "taken", "--force", "--preset", "tiny", "--steps", 1)
    assert result.code == 2 and "Another process is training into checkpoints/taken" in result.err
    reports.close()
    with locked(setup.run):
        pass


def test_going_on_in_another_environment_is_said(corpus, monkeypatch):
    list(start(corpus, "moved", runtime__threads=1).reports())
    given = dict(train__steps=8, runtime__dtype="float32", train__batch=4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    warnings = start(corpus, "moved", resume=True, **given).warnings
    assert (
        "not to the last bit as it would have" in warnings[0] and "threads 3, was 1" in warnings[0]
    )


def test_a_save_that_would_not_fit_is_refused_before_it_is_written(corpus, monkeypatch):
    from collections import namedtuple

    list(start(corpus, "full").reports())
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 5000, 5000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(Exception, match=r"Cannot write .* MB to checkpoints/full: only 0.0 MB are"):
        list(start(corpus, "full", resume=True, train__steps=8).reports())
    assert runs.load(runs.RUNS / "full", "last")[0].step == 6


def test_steps_that_are_not_finite_do_not_push_out_those_that_are(corpus):
    """Saved at every step: the weights that gave ten infinite losses take no good step's place."""
    setup = start(corpus, "far", optim__lr=1e20, train__save_every=1, train__eval_every=0)
    with pytest.raises(Exception, match="not finite"):
        list(start(corpus, "far", optim__lr=1e20, train__save_every=1, train__steps=30).reports())
    lines = [json.loads(line) for line in (setup.run / "metrics.jsonl").read_text().splitlines()]
    finite = [line["step"] for line in lines if line["loss"] is not None]
    assert runs.load(setup.run, "last")[0].step == finite[-1]


# --init-from


def test_init_from_begins_with_the_weights_and_nothing_else(corpus, run):
    setup = start(corpus, "next", train__init_from=str(run.path), train__length=8)
    fresh = setup.learner
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], tensor)
    assert fresh.progress.step == 0 and not fresh.optimizer.state
    vocab = run.model.vocab_size
    assert setup.notes == [
        f"Beginning with the weights of {run.path}/step-00000004: {vocab} of {vocab} symbols keep "
        "theirs."
    ]
    assert [report.step for report in setup.reports()] == [1, 2, 3, 4, 5, 6]
    resumed = start(corpus, "next", resume=True, train__steps=7)
    assert [report.step for report in resumed.reports()] == [7]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("unit", ["char", "byte", "sentencepiece"])
def test_init_from_another_vocabulary_keeps_the_rows_of_shared_symbols(tmp_path, corpus, unit, tie):
    run = seqlm.train(corpus, **SMALL, set={"model.tie": tie})
    (tmp_path / "other.txt").write_text("Zoë said: the cat is a dog.\n" * 100, encoding="utf-8")
    other, manifest, _ = prepare(["other.txt"], unit=unit)
    setup = start(other, "other", train__init_from=run.path.name)
    old, new = run.model.state_dict(), setup.learner.model.state_dict()
    theirs, ours = run.tokenizer.texts, setup.learner.corpus.tokenizer.texts
    shared = set(theirs) & set(ours)
    assert b"t" in shared and "ë".encode() not in shared
    last = {text: symbol for symbol, text in enumerate(ours)}
    tables = ["embedding.weight"] if tie else ["embedding.weight", "head.weight", "head.bias"]
    for text in shared:
        for name in tables:
            assert torch.equal(new[name][last[text]], old[name][theirs.index(text)])
    assert torch.equal(new["embedding.weight"][len(ours)], old["embedding.weight"][len(theirs)])
    for name in old.keys() - set(tables):
        assert torch.equal(new[name], old[name])
    assert f"{len(shared)} of {manifest['vocab_size']} symbols keep theirs" in setup.notes[0]
    assert list(setup.reports())[-1].step == 6


def test_the_end_of_a_file_keeps_its_row_too(tmp_path):
    for name, word in (("one", "cat"), ("two", "dog")):
        (tmp_path / name).mkdir()
        for i in range(40):
            (tmp_path / name / f"{i:02}.txt").write_text(f"{word} {i} " * 9)
        prepare([name], documents="files")
    run = seqlm.train("data/one", **SMALL)
    learner = start("data/two", "other", train__init_from=str(run.path)).learner
    new = learner.model.embedding.weight[learner.corpus.tokenizer.end]
    assert torch.equal(new, run.model.embedding.weight[run.tokenizer.end])


def test_init_from_takes_over_the_architecture_and_refuses_another(corpus, run, seqlm_command):
    train = ["train", "--init-from", run.path, "--steps", 2, "--batch", 2, "--length", 16]
    result = seqlm_command(*train, "--run", "new", "--dropout", 0.1)  # of the preset small
    assert result.code == 0 and "symbols keep theirs" in result.err
    assert seqlm.load("new").config.model.width == 16
    for given, key in (["--width", 8], "model.width"), (["--cell", "lem"], "cell.name"):
        result = seqlm_command(*train, "--run", "other", *given)
        assert result.code == 2 and f"The run was trained with {key} = " in result.err
    result = seqlm_command("train", "--resume", "--init-from", run.path)
    assert result.code == 2 and "Choose one." in result.err
    result = seqlm_command("train", "--init-from", "nothing", "--steps", 1)
    assert result.code == 3 and "neither nothing nor checkpoints/nothing is a run" in result.err


def test_a_run_whose_tokenizer_is_not_its_corpus_is_not_resumed(run):
    from fuzz import reseal

    folder = run.path / "step-00000004"
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace(".", "!"))
    reseal(folder, "MANIFEST.json")
    with pytest.raises(InputError, match="The tokenizer in .* is not that of its corpus"):
        start(None, "story-mingru", resume=True)
