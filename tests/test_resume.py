"""Nothing is lost: what is killed and resumed is, byte for byte, what was never stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import KINDS, SMALL, TRAINED, run_files, scored, start
from killing import kills

import seqlm
from seqlm import cells, temporary
from seqlm.errors import Diverged, InputError, SeqlmError, UsageError
from seqlm.files import locked
from seqlm.store import checkpoint, history, runs
from seqlm.temporary import PREFIX, remove_folder
from seqlm.text.prepare import prepare
from seqlm.training import launch

WAYS = [  # every pair of a cell, a state, a number of micro-batches and a dtype
    ("mingru", "carry", 2, "float32"),
    ("mingru", "reset", 1, "bfloat16"),
    ("mingru", "reset", 1, "float16"),
    ("minlstm", "carry", 1, "float32"),
    ("minlstm", "carry", 2, "bfloat16"),
    ("minlstm", "reset", 2, "float16"),
    ("lem", "reset", 2, "float32"),
    ("lem", "carry", 2, "bfloat16"),
    ("lem", "carry", 1, "float16"),
    ("cfc", "reset", 1, "float32"),
    ("cfc", "carry", 2, "bfloat16"),
    ("cfc", "carry", 1, "float16"),
    *((cell, "carry", 2, "bfloat16") for cell in KINDS if cell not in ("mingru", "lem")),
]


@pytest.mark.parametrize("cell, state, accumulate, dtype", WAYS)
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
    assert resumed.trainer.progress.step == 4 and resumed.warnings == []
    assert [report.step for report in resumed.reports()] == [5, 6]
    assert run_files(broken.run, 6) == run_files(whole.run, 6)


def wait_for(running, happened):
    """Fails if the process ends before, or needs more than a minute."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.005)


def test_a_run_killed_by_the_system_goes_on_as_if_it_had_not_been(corpus):
    """Here once; `make soak` kills each cell often."""
    options = "--preset tiny --width 16 --layers 1 --batch 4 --length 16 --threads 1"
    options += " --steps 1500 --set train.save_every=2 --set train.eval_every=3 --run killed"
    command = [sys.executable, "-m", "seqlm", "train", "--data", str(corpus), *options.split()]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    metrics = runs.RUNS / "killed" / "metrics.jsonl"
    wait_for(running, lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") >= 7)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    saved, warnings = runs.load(runs.RUNS / "killed", "last")
    seen = metrics.read_bytes().count(b"\n")
    # the last save, or the one before if it was killed in it
    assert warnings == [] and seen - 4 <= saved.step <= seen

    def rest(name, resume):
        given = dict(runtime__threads=1, train__save_every=2)
        setup = start(corpus, name, resume=resume, train__steps=1500, **given)
        stop = saved.step + 4
        list(setup.reports(interrupted=lambda: setup.trainer.progress.step == stop))
        return run_files(setup.run, stop)

    killed, whole = rest("killed", True), rest("whole", False)
    for name in ("model", "optimizer", "state"):
        assert killed[f"{name}.safetensors"] == whole[f"{name}.safetensors"]
    for ours, theirs in zip(
        *(r["metrics.jsonl"].splitlines() for r in (killed, whole)), strict=True
    ):
        assert ours == theirs
    assert killed["state"] == whole["state"]


def test_a_second_signal_stops_at_once(corpus):
    """A step takes some seconds; without a second signal it would be finished and saved."""
    options = "--preset tiny --cell lem --width 32 --layers 24 --batch 4 --length 900 --threads 1"
    options += " --run stopped"
    command = [sys.executable, "-m", "seqlm", "train", "--data", str(corpus), *options.split()]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    # the first step begins when step 0 is saved
    wait_for(running, (runs.RUNS / "stopped" / runs.LAST).exists)
    running.send_signal(signal.SIGINT)
    assert any("Interrupt again to stop at once" in line for line in running.stderr)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == -signal.SIGINT
    running.stderr.close()


def test_a_kill_before_the_first_pointer_leaves_a_run_that_resumes(corpus, monkeypatch):
    def killed(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("seqlm.store.runs.write_file", killed)
        list(start(corpus, "young").reports())
    assert not (runs.RUNS / "young" / "last").exists()
    resumed = start(corpus, "young", resume=True)
    assert resumed.trainer.progress.step == 0
    assert [report.step for report in resumed.reports()] == [1, 2, 3, 4, 5, 6]


def test_what_a_kill_left_is_cleared_away_when_the_run_goes_on(corpus):
    setup = start(corpus, "left")
    reports = setup.reports()
    for _ in range(4):
        next(reports)
    reports.close()
    aside = setup.run / f"{PREFIX}00000000/step-00000005/new"
    aside.mkdir(parents=True)
    (aside / "model.safetensors").write_bytes(b"half")
    (setup.run / f"{PREFIX}00000001").write_text("step-0")
    list(start(corpus, "left", resume=True).reports())
    assert not list(setup.run.glob(".tmp-*"))


def test_a_run_that_another_process_trains_is_left_alone(corpus, seqlm_command):
    setup = start(corpus, "taken")
    reports = setup.reports()
    next(reports)
    with pytest.raises(UsageError, match="Another process is writing to checkpoints/taken"):
        next(start(corpus, "taken", resume=True).reports())
    result = seqlm_command("train", "--run", "taken", "--force", "--preset", "tiny", "--steps", 1)
    assert result.code == 2 and "Another process is writing to checkpoints/taken" in result.err
    reports.close()
    with locked(setup.run):
        pass


def test_a_run_that_another_process_begins_is_said_to_be_in_use(corpus):
    """A run without a step was called a folder that is no run."""
    folder = Path("checkpoints/begun")
    folder.mkdir(parents=True)
    (folder / "config.toml").touch()
    with locked(folder), pytest.raises(UsageError, match="Another process is writing to"):
        start(corpus, "begun")


def test_going_on_in_another_environment_is_said(corpus, monkeypatch):
    list(start(corpus, "moved").reports())
    given = dict(train__steps=8, runtime__dtype="float32", train__batch=4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    warnings = start(corpus, "moved", resume=True, **given).warnings
    assert (
        "results may differ in the last bits" in warnings[0] and "threads 3, was 1" in warnings[0]
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


def test_after_a_kill_between_the_pointers_best_is_what_the_run_goes_on_from(corpus, monkeypatch):
    """Step 4 was best, 6 was better, and the run was killed before `last` named it.  Resumed from
    4 with other options, 6 comes out worse: 4 is the best, and is kept."""
    best_of = {1: 4.0, 2: 3.0, 3: 2.0}
    values = iter(best_of.values())
    setup = start(corpus, "killed", train__eval_every=2)
    monkeypatch.setattr(setup.trainer, "validate", lambda: scored(next(values)))
    real = runs.write_file

    def killed_at_last(path, text):
        if path.name == "last" and "00000006" in text:
            raise KeyboardInterrupt
        real(path, text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("seqlm.store.runs.write_file", killed_at_last)
        list(setup.reports())
    assert runs.load(setup.run, "best")[0].step == 6
    given = dict(train__steps=12, train__eval_every=2, train__save_every=1)
    resumed = start(corpus, "killed", resume=True, **given)
    monkeypatch.setattr(resumed.trainer, "validate", lambda: scored(9.0))
    list(resumed.reports())
    saved, warnings = runs.load(setup.run, "best")
    assert (saved.step, warnings, saved.progress.best_bits_per_char) == (4, [], 3.0)


def test_a_run_that_was_trained_on_in_the_meantime_is_not_set_back(corpus):
    list(start(corpus, "twice").reports())
    one = start(corpus, "twice", resume=True, train__steps=8)
    two = start(corpus, "twice", resume=True, train__steps=10)
    assert list(one.reports())[-1].step == 8
    with pytest.raises(UsageError, match="Another process has trained checkpoints/twice in the"):
        next(two.reports())
    assert runs.load(one.run, "last")[0].step == 8


def test_the_first_step_is_never_written_twice(corpus, monkeypatch):
    reports = start(corpus, "first", train__save_every=0, train__eval_every=0).reports()
    next(reports)
    reports.close()
    real = checkpoint.save
    saved = []

    def noted(run, config, tokenizer, progress, *rest):
        saved.append(progress.step)
        return real(run, config, tokenizer, progress, *rest)

    monkeypatch.setattr(checkpoint, "save", noted)
    list(start(corpus, "first", resume=True).reports())
    assert saved == [6]


def test_a_step_that_was_being_replaced_when_the_kill_came_comes_back(corpus):
    list(start(corpus, "between").reports())
    run = runs.RUNS / "between"
    aside = run / f"{PREFIX}00000000/step-00000006"
    aside.mkdir(parents=True)
    (run / "step-00000006").rename(aside / "old")
    resumed = start(corpus, "between", resume=True, train__steps=8)
    list(resumed.reports())
    assert [path.name for path in runs.steps(run)] == ["step-00000006", "step-00000008"]


def test_names_and_files_are_on_the_disk_before_they_are_pointed_to(corpus, monkeypatch):
    """Every new folder up to the current one, and the step before `last` names it."""
    from seqlm import files, temporary

    done = []
    real_sync, real_replace = temporary.sync, Path.replace

    def sync(path):
        done.append(str(path))
        real_sync(path)

    def replace(path, other):
        done.append(f"-> {other.name}")
        real_replace(path, other)

    monkeypatch.setattr(files, "sync", sync)
    monkeypatch.setattr(temporary, "sync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    next(start(corpus, "synced").reports())
    assert {".", "checkpoints", "checkpoints/synced"} <= set(done)
    last = done.index("-> last")
    written = [path for path in done[:last] if "/step-00000000/new/" in path]
    assert {Path(path).name for path in written} >= {"model.safetensors", "MANIFEST.json"}
    assert done[done.index("-> config.toml") - 1].startswith(f"checkpoints/synced/{PREFIX}")
    assert max(done.index(path) for path in written) < done.index("checkpoints/synced", 1) < last


def test_an_empty_folder_behind_a_link_is_trained_into(corpus, tmp_path):
    (tmp_path / "large-disk").mkdir()
    runs.RUNS.mkdir()
    (runs.RUNS / "linked").symlink_to(tmp_path / "large-disk")
    list(start(corpus, "linked").reports())
    assert (runs.RUNS / "linked").is_symlink() and runs.steps(tmp_path / "large-disk")


def test_force_deletes_what_seqlm_wrote_and_nothing_else(corpus, seqlm_command):
    list(start(corpus, "again").reports())
    (runs.RUNS / "again" / "notes.txt").write_text("mine")
    train = "train --run again --force --preset tiny --steps 1 --batch 2 --length 16".split()
    assert seqlm_command(*train).code == 0
    assert [path.name for path in runs.steps(runs.RUNS / "again")] == [
        "step-00000000",
        "step-00000001",
    ]
    assert (runs.RUNS / "again" / "notes.txt").read_text() == "mine"


def everything(run: Path) -> dict[str, bytes]:
    """Every file of a run by its name, without its lock and what a killed process left."""
    names = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    names = [str(name) for name in names if not str(name).startswith((".lock", PREFIX))]
    return {name: (run / name).read_bytes() for name in names}


def test_wherever_train_force_is_killed_the_old_run_or_a_new_one_that_learned_is_there(run):
    """Whoever names the run next finds the old one byte for byte, or the new one from step 1 on."""
    saved, _ = runs.load(run.path)
    tensors = {"model": saved.weights(saved.config), "optimizer": {}, "state": {}}
    shutil.copytree(run.path, "before")
    old = everything(run.path)

    def afresh():
        shutil.rmtree(run.path)
        shutil.copytree("before", run.path)

    def save(step, best):
        progress = checkpoint.Progress(step=step, best_step=step)
        runs.save(run.path, saved.config, saved.tokenizer, progress, {}, tensors, best)

    def replace():
        with runs.opened(run.path):
            runs.set_aside(run.path)
            save(0, best=False)
            history.append(run.path, {name: {"step": 1} for name in history.FILES})
            save(1, best=True)
            runs.drop_replaced(run.path)

    new = 0
    for k in kills(afresh, replace):
        found = runs.find(run.path.name) if k % 2 else runs.find(None)
        if everything(found) != old:
            new += 1
            assert runs.load(found, "best")[0].step == runs.load(found, "last")[0].step == 1, k
        with runs.opened(found):
            pass
        names = {path.name for path in found.iterdir()} - {".lock"}
        assert not any(name.startswith(".") for name in names), k
    assert k > 50 and 0 < new < k // 3


@pytest.mark.parametrize("way", ["exchange", "two renames"])
@pytest.mark.parametrize("step", [4, 6])
def test_wherever_a_save_is_killed_a_whole_step_is_last_and_best(run, monkeypatch, step, way):
    """A new step, which deletes the oldest, or one that is saved again over itself."""
    if way == "two renames":
        monkeypatch.setattr(temporary, "_exchange", lambda one, other: False)
    saved, _ = runs.load(run.path)
    tensors = {"model": saved.weights(saved.config), "optimizer": {}, "state": {}}
    shutil.copytree(run.path, "before")

    def afresh():
        shutil.rmtree(run.path)
        shutil.copytree("before", run.path)

    def save():
        progress = checkpoint.Progress(step=step, best_step=step)
        runs.save(run.path, saved.config, saved.tokenizer, progress, {}, tensors, best=True)

    for k in kills(afresh, save):
        for which in ("best", "last"):
            found, warnings = runs.load(run.path, which, "model")
            assert (found.step in (4, step), warnings) == (True, []), k
        with runs.opened(run.path):
            assert not list(run.path.glob(f"{PREFIX}*")), k
    names = {"step-00000004", f"step-{step:08d}"} | ({"step-00000000"} if step == 4 else set())
    assert {path.name for path in runs.steps(run.path)} == names


def test_restoring_a_replaced_run_may_be_killed_too(run):
    """At every operation; the run is the old one in the end."""
    old = everything(run.path)

    def replaced():
        with runs.opened(run.path):
            runs.set_aside(run.path)
            shutil.copytree(run.path / ".replaced/step-00000000", run.path / "step-00000000")
            (run.path / "last").write_text("step-00000000")

    for _ in kills(replaced, lambda: runs.settle(run.path)):
        assert everything(runs.find(run.path.name)) == old
    assert everything(run.path) == old


def test_a_full_disk_leaves_the_run_that_was_to_be_replaced(corpus, run, monkeypatch):
    from collections import namedtuple

    old = everything(run.path)
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 5000, 5000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    setup = launch.start(str(corpus), run=run.path.name, settings=TRAINED, force=True)
    with pytest.raises(SeqlmError, match="only 0.0 MB are free"):
        list(setup.reports())
    assert everything(run.path) == old


@pytest.mark.parametrize("every", [0, 1])
def test_a_diverged_training_leaves_the_run_that_was_to_be_replaced(corpus, run, every):
    """Also where steps with a finite loss were saved, and none was validated."""
    old = everything(run.path)
    given = {**TRAINED, "optim.lr": 1e30, "train.save_every": every, "train.eval_every": 0}
    setup = launch.start(str(corpus), run=run.path.name, settings=given, force=True)
    with pytest.raises(Diverged, match="The old run .* was restored"):
        list(setup.reports())
    assert everything(run.path) == old


def test_a_training_that_is_given_up_before_its_first_save_leaves_the_old_run(corpus, run):
    old = everything(run.path)
    setup = launch.start(str(corpus), run=run.path.name, settings=TRAINED, force=True)
    reports = setup.reports()
    next(reports)
    assert runs.steps(run.path) == [run.path / "step-00000000"]
    reports.close()
    assert everything(run.path) == old
    setup = launch.start(str(corpus), run=run.path.name, settings=TRAINED, force=True)
    reports = setup.reports()
    assert [next(reports).step for _ in range(2)] == [1, 2]  # saved, and not validated yet
    assert (run.path / ".replaced").is_dir()
    reports.close()
    assert runs.load(run.path, "last")[0].step == 2 and not (run.path / ".replaced").exists()


def test_a_folder_whose_steps_were_deleted_is_not_trained_over_without_force(corpus, run):
    for step in runs.steps(run.path):
        shutil.rmtree(step)
    lines = (run.path / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match="exists. Continue it with --resume, replace it with"):
        start(corpus, run.path.name)
    assert (run.path / "metrics.jsonl").read_bytes() == lines
    setup = launch.start(str(corpus), run=run.path.name, settings=TRAINED, force=True)
    assert list(setup.reports())[-1].step == 6


def test_a_link_in_the_place_of_a_replaced_run_is_not_followed(corpus, run):
    (run.path / ".replaced").symlink_to(Path(shutil.copytree(run.path, "other")).resolve())
    other = everything(Path("other"))
    assert runs.find(run.path.name) == run.path
    with pytest.raises(InputError, match=".replaced is a link, which seqlm never makes"):
        runs.bring_back(run.path)
    list(start(corpus, run.path.name, resume=True, train__steps=8).reports())
    assert everything(Path("other")) == other


def test_a_step_that_training_deletes_while_it_is_read_is_not_called_damaged(corpus, monkeypatch):
    list(start(corpus, "live").reports())
    real, calls = checkpoint.Saved.read, []

    def deleted(self, kind):
        if not calls:  # as if training had saved two more in the meantime
            remove_folder(self.folder)
            runs.point(self.folder.parent, "last", self.folder.with_name("step-00000004"))
        calls.append(self.step)
        return real(self, kind)

    monkeypatch.setattr(checkpoint.Saved, "read", deleted)
    run = seqlm.load("live", "last")
    assert run.step == 4 and run.warnings == [] and calls[:2] == [6, 4]


def test_a_run_in_training_is_not_checked(corpus, seqlm_command):
    reports = start(corpus, "busy").reports()
    next(reports)
    result = seqlm_command("check", "--run", "busy")
    assert result.code == 2 and "checkpoints/busy is being trained" in result.err
    reports.close()


def test_a_model_that_cannot_fit_is_refused_with_its_size(corpus, seqlm_command):
    huge = "--preset tiny --width 65536 --layers 50 --batch 2 --length 16".split()
    result = seqlm_command("train", *huge)
    assert result.code == 2 and "parameters, and training them takes" in result.err
    assert not runs.RUNS.exists()


def test_a_short_run_that_diverges_ends_with_4_too(corpus, seqlm_command):
    result = seqlm_command(
        "train", *"--preset tiny --batch 2 --length 16 --steps 3 --lr 1e30".split()
    )
    assert result.code == 4 and "was a finite number" in result.err


def test_names_that_are_not_utf8_are_refused_before_anything_is_written(corpus, seqlm_command):
    name = os.fsdecode(b"n\xff")
    result = seqlm_command("train", "--preset", "tiny", "--steps", 1, "--run", name)
    assert result.code == 2 and "the name is not UTF-8" in result.err
    corpus.rename(corpus.with_name(name))
    result = seqlm_command("train", "--steps", 1, "--data", f"data/{name}", "--run", "named")
    assert result.code == 3 and "is not UTF-8, and cannot be written" in result.err
    assert not runs.RUNS.exists()


def test_a_cell_file_that_was_changed_after_training_is_said(corpus, seqlm_command):
    source = Path(cells.__file__).with_name("lem.py").read_text()
    Path("mine.py").write_text(source)
    train = "--preset tiny --width 8 --layers 1 --batch 2 --length 16 --cell ./mine.py".split()
    assert seqlm_command("train", *train, "--steps", 1).code == 0
    assert "has changed since" not in seqlm_command("eval", "--cell", "./mine.py").err
    Path("mine.py").write_text(source + "\n# changed\n")
    evaluated = seqlm_command("eval", "--cell", "./mine.py")
    assert "The file of cell mine has changed since the training." in evaluated.err
    resumed = seqlm_command("train", "--resume", "--steps", 2, "--cell", "./mine.py")
    assert "of an uninterrupted run: cell mine" in resumed.err


# --init-from


def test_init_from_begins_with_the_weights_and_nothing_else(corpus, run):
    setup = start(corpus, "next", train__init_from=str(run.path), train__length=8)
    fresh = setup.trainer
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], tensor)
    assert fresh.progress.step == 0 and not any(o.state for o in fresh.optimizers)
    vocab = run.model.vocab_size
    assert setup.notes == [
        f"Starting with the weights of {run.path}/step-00000004; {vocab} of the {vocab} symbols "
        "have trained weights."
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
    old, new = run.model.state_dict(), setup.trainer.model.state_dict()
    theirs, ours = run.tokenizer.texts, setup.trainer.corpus.tokenizer.texts
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
    assert (
        f"{len(shared)} of the {manifest['vocab_size']} symbols have trained weights"
        in setup.notes[0]
    )
    assert list(setup.reports())[-1].step == 6


def test_the_end_of_a_file_keeps_its_row_too(tmp_path):
    for name, word in (("one", "cat"), ("two", "dog")):
        (tmp_path / name).mkdir()
        for i in range(40):
            (tmp_path / name / f"{i:02}.txt").write_text(f"{word} {i} " * 9)
        prepare([name], documents="files")
    run = seqlm.train("data/one", **SMALL)
    trainer = start("data/two", "other", train__init_from=str(run.path)).trainer
    new = trainer.model.embedding.weight[trainer.corpus.tokenizer.end]
    assert torch.equal(new, run.model.embedding.weight[run.tokenizer.end])


def test_init_from_a_damaged_run_says_which_step_it_takes_instead(corpus, run):
    (run.path / "step-00000004" / "model.safetensors").write_bytes(b"")
    setup = start(corpus, "next", train__init_from=str(run.path))
    assert "Skipping step-00000004" in setup.warnings[0]
    assert "step-00000000" in setup.notes[0]


def test_init_from_pieces_takes_the_row_that_a_text_is_written_with(tmp_path):
    """A piece of one character has the text of a byte, too, which training never uses."""
    (tmp_path / "one.txt").write_text("the cat sees a dog, and the dog a cat.\n" * 200)
    pieces, _, _ = prepare(["one.txt"], unit="sentencepiece", vocab_size=320)
    run = seqlm.train(pieces, **SMALL)
    texts = run.tokenizer.texts
    assert texts.count(b"t") == 2
    chars, _, _ = prepare(["one.txt"], unit="char")
    trainer = start(chars, "chars", train__init_from=str(run.path)).trainer
    piece = max(symbol for symbol, text in enumerate(texts) if text == b"t")
    ours = trainer.corpus.tokenizer.texts.index(b"t")
    assert torch.equal(trainer.model.embedding.weight[ours], run.model.embedding.weight[piece])


def test_init_from_takes_over_the_architecture_and_refuses_another(corpus, run, seqlm_command):
    train = ["train", "--init-from", run.path, "--steps", 2, "--batch", 2, "--length", 16]
    result = seqlm_command(*train, "--run", "new", "--dropout", 0.1)  # of the preset small
    assert result.code == 0 and "symbols have trained weights" in result.err
    assert seqlm.load("new").config.model.width == 16
    for given, key in (["--width", 8], "model.width"), (["--cell", "lem"], "cell.name"):
        result = seqlm_command(*train, "--run", "other", *given)
        said = f"The run of --init-from, {run.path}, was trained with {key} = "
        assert result.code == 2 and said in " ".join(result.err.split())
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
