"""Several processes: the steps of one, one writer, an end on which all agree.  Two, by gloo."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import chdir, closing
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import run_files, scored, sentences, start
from safetensors.torch import load_file

import seqlm
from seqlm.cli._app import app
from seqlm.errors import PeerLost, UsageError
from seqlm.store import runs
from seqlm.text.prepare import prepare
from seqlm.training import parallel

LONGEST = 300  # seconds, of any process; they take 40 on two cores that seven others share
TORCH = dict(runtime__backend="torch")  # nothing to compile in every process
PLAIN = dict(TORCH, runtime__dtype="float32", train__batch=8, model__conv=3)
CASES = {  # the corpus, and options
    "carry": ("data/story", dict(cell__name="minlstm")),
    "reset": ("data/story", dict(train__state="reset")),
    "accumulate": ("data/story", dict(cell__name="lem", train__accumulate=2)),
    "documents": ("data/names", dict(train__length=8)),
    "parts": ("data/names", dict(train__accumulate=2, train__length=24)),
    "answers": ("data/sums", dict(train__length=12)),
}
RESUMED = {
    "story": ("data/story", dict(TORCH, model__dropout=0.2, train__accumulate=2)),
    "names": ("data/names", dict(TORCH, model__dropout=0.2, train__length=8)),
}
# a cell that looks at its process from inside
HIT = """
import atexit, os, signal, time
from pathlib import Path
from torch import nn
from test_parallel import threads
from seqlm.cells import Recurrence

rank = os.environ["RANK"]
Path(f"during-{rank}").write_text(" ".join(threads()))
atexit.register(lambda: Path(f"after-{rank}").write_text(" ".join(threads())))

class Hit(Recurrence):
    passes = 0  # in training; three come before the first step: two to try the cell, one to warm up

    def __init__(self, width):
        super().__init__()
        self.width, self.inputs = width, nn.Linear(width, width)

    def initial_state(self, batch):
        if rank == "0" and Path("checkpoints/hit/step-00000003").exists():
            time.sleep(0.5)  # in the closing evaluation: time for the other process to end
            assert not Path("after-1").exists()
        return (self.zeros(batch, self.width),)

    def project(self, x):
        Hit.passes += self.training
        if Hit.passes == 9 and rank == "1":
            os.kill(os.getpid(), signal.SIGINT)
        return self.inputs(x)

    def recur(self, drive, state):
        h = drive.tanh() + state[0] / 2
        return h, (h,)
"""
TRAIN = "train --preset tiny --width 16 --layers 1 --batch 4 --length 16 --run hit"
TRAIN += " --set runtime.backend=torch"
ON_STORY = f"{TRAIN} --data data/story"
STOPPED = f"{ON_STORY} --cell ./hit.py --steps 4000 --set train.eval_every=0"
COMMANDS = {  # of the first process and of the second
    "signal": [STOPPED, STOPPED],
    "error": [f"{TRAIN} --run new --data nowhere", f"{ON_STORY} --run new"],
}


needs_thread_names = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="only Linux shows the names of threads"
)


def told(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells its processes; the store is the test's own."""
    where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
    own = dict(RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    return {**where, **own, "TORCHELASTIC_USE_AGENT_STORE": "True"}


def store() -> dist.TCPStore:
    """Where two processes find each other, at a port that the system chooses."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """The folder in which two processes trained every case; they leave what they saw, by rank."""
    folder = tmp_path_factory.mktemp("pair")
    with chdir(folder):
        Path("story.txt").write_text(sentences(4000))
        lines = [f"name {i} of {i * i}" for i in range(300)]
        lines[::50] = [f"a long line {i} " * 7 for i in range(6)]
        Path("names.txt").write_text("\n".join(lines))
        prepare(["story.txt"])
        prepare(["names.txt"], documents="lines")
        Path("sums.txt").write_text("\n".join(f"{i}+{i}={2 * i}" for i in range(300)))
        prepare(["sums.txt"], answers="=")
        Path("hit.py").write_text(HIT)
    meetings = [store() for _ in (*COMMANDS, work)]
    ports = [meeting.port for meeting in meetings]
    server = get_context("forkserver")
    server.set_forkserver_preload(["torch", "pytest"])  # once for both
    both = [server.Process(target=work, args=(rank, ports, folder)) for rank in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        # gloo logs, too, that a peer has gone, if it notices before Python does
        patch.setenv("TORCH_CPP_LOG_LEVEL", "FATAL")
        for process in both:
            process.start()
    for process in both:
        process.join(LONGEST)
        process.kill()
    assert [process.exitcode for process in both] == [-signal.SIGKILL, 0]
    return folder


def work(rank: int, ports: list[int], folder: Path) -> None:
    """A process of two, which ends as the first of them is killed."""
    os.chdir(folder)
    commands = {}
    for name, port in zip(COMMANDS, ports, strict=False):
        os.environ.update(told(rank, port))
        commands[name] = ran(rank, name)
    os.environ.update(told(rank, ports[-1]))
    try:
        with parallel.joined():
            for name, (corpus, given) in CASES.items():
                list(start(corpus, name, **PLAIN, **given).reports())
            list(start("data/story", "dropout", **PLAIN, model__dropout=0.5).reports())
            for name, (corpus, given) in RESUMED.items():
                stop_and_resume(name, corpus, given)
            seen = commands | {name: ending(rank) for name, ending in ENDINGS.items()}
            Path(f"{rank}.json").write_text(json.dumps(seen))
            killed(rank)
    except PeerLost as error:
        Path("lost").write_text(f"{error.exit_code} {error}")
        Path("threads").write_text(" ".join(threads()))


def ran(rank: int, name: str) -> list:
    """The exit code of a command in this process, and what it said."""
    said, kept = Path(f"{name}-{rank}"), [os.dup(stream) for stream in (1, 2)]
    with said.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        app(COMMANDS[name][rank].split(), prog_name="seqlm")
    except SystemExit as end:
        Path(f"after-{rank}").write_text(" ".join(threads()))
        return [end.code, said.read_text()]
    finally:
        for stream, own in enumerate(kept, 1):
            os.dup2(own, stream)
            os.close(own)


def threads() -> list[str]:
    """The names of this process's threads that belong to a process group."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def stop_and_resume(name: str, corpus: str, given: dict) -> None:
    list(start(corpus, f"{name}-whole", **given).reports())
    stop_behind(start(corpus, f"{name}-broken", **given), 5)  # saved at 4
    with parallel.writer_first():
        if parallel.is_writer():
            shutil.copytree(runs.RUNS / f"{name}-broken", runs.RUNS / f"{name}-alone")
    list(start(corpus, f"{name}-broken", resume=True).reports())


def killed(rank: int) -> None:
    """The writer dies in the fourth step, of which every one is saved."""
    setup = start("data/story", "killed", **TORCH, train__save_every=1)
    for report in setup.reports():
        if report.step == 3 and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def stop_behind(setup, step: int) -> None:
    with closing(setup.reports()) as reports:
        for report in reports:
            if report.step == step:
                return


def skipped(rank: int) -> list:
    """Rank 1 alone meets a number that is not finite, in step 3."""
    setup = start("data/story", "skipped", **TORCH)
    trainer = setup.trainer

    def broken(model, inputs, out):
        bad = rank == 1 and model.training and trainer.progress.step == 2
        return (out[0] * math.nan if bad else out[0], out[1])

    trainer.model.register_forward_hook(broken)
    losses = [report.loss for report in setup.reports()]
    weight = trainer.model.head.weight.detach().double().sum().item()
    return [trainer.progress.skipped, [math.isfinite(loss) for loss in losses], weight]


def stopped(rank: int) -> list:
    setup = start("data/story", "stopped", **TORCH, train__save_every=0)
    progress = setup.trainer.progress
    last = list(setup.reports(interrupted=lambda: rank == 1 and progress.step == 3))[-1]
    return [last.step, last.stopped]


def timed(rank: int) -> list:
    """A step takes one second by the clock of rank 0, and two by that of rank 1."""
    ticks = iter(range(0, 1000, rank + 1))
    setup = start("data/story", "timed", **TORCH, train__time_limit=6.0, train__steps=0)
    reports = list(setup.reports(clock=lambda: next(ticks)))
    return [[report.seconds for report in reports], [report.lr for report in reports]]


def patient(rank: int) -> list:
    setup = start("data/story", "patient", **TORCH, train__eval_every=1, train__early_stop=2)
    values = iter([3.0, 2.0, 2.5, 2.5])
    setup.trainer.validate = lambda: scored(next(values))
    reports = list(setup.reports())
    return [[report.best for report in reports], reports[-1].stopped]


def uneven(rank: int) -> str:
    with pytest.raises(UsageError) as error:
        start("data/story", "uneven", train__batch=6, train__accumulate=2)
    return str(error.value)


ENDINGS = dict(skipped=skipped, stopped=stopped, timed=timed, patient=patient, uneven=uneven)


def lines(run: str) -> list[dict]:
    return [*map(json.loads, (runs.RUNS / run / "metrics.jsonl").read_text().splitlines())]


def column(run: str, key: str) -> list:
    return [line[key] for line in lines(run)]


def assert_same_steps(run: str, other: str) -> None:
    """The same to the rounding of sums in another order."""
    for key in ("step", "chars", "lr"):
        assert column(run, key) == column(other, key)
    np.testing.assert_allclose(column(run, "loss"), column(other, "loss"), rtol=1e-5)
    np.testing.assert_allclose(column(run, "grad_norm"), column(other, "grad_norm"), rtol=1e-4)
    for kind in ("model", "state"):
        found, expected = (
            load_file(runs.RUNS / name / "step-00000006" / f"{kind}.safetensors")
            for name in (run, other)
        )
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(pair, monkeypatch, case):
    monkeypatch.chdir(pair)
    corpus, given = CASES[case]
    list(start(corpus, f"{case}-one", **PLAIN, **given).reports())
    assert_same_steps(case, f"{case}-one")


def test_dropout_is_that_of_one_process_with_twice_the_micro_batches(pair, monkeypatch):
    monkeypatch.chdir(pair)
    given = dict(PLAIN, model__dropout=0.5, train__accumulate=2)
    list(start("data/story", "dropout-one", **given).reports())
    assert_same_steps("dropout", "dropout-one")


@pytest.mark.parametrize("case", RESUMED)
def test_two_processes_that_are_resumed_go_on_byte_for_byte(pair, monkeypatch, case):
    monkeypatch.chdir(pair)
    broken, whole = (runs.RUNS / f"{case}-{name}" for name in ("broken", "whole"))
    assert run_files(broken, 6) == run_files(whole, 6)


def test_one_process_goes_on_from_two_to_rounding_and_says_so(pair, monkeypatch):
    monkeypatch.chdir(pair)
    alone = start(None, "story-alone", resume=True, train__accumulate=4)
    assert alone.trainer.progress.step == 4 and "processes 1, was 2" in alone.warnings[0]
    list(alone.reports())
    assert_same_steps("story-alone", "story-whole")


def test_one_process_writes_each_step_once(pair, monkeypatch):
    monkeypatch.chdir(pair)
    assert column("carry", "step") == [1, 2, 3, 4, 5, 6]
    saved, warnings = runs.load(runs.RUNS / "carry", "last")
    assert (saved.step, warnings, saved.environment["processes"]) == (6, [], 2)
    assert seqlm.load("carry").evaluate()["bits_per_char"] > 0


def test_a_process_that_is_killed_ends_the_other_and_the_last_step_is_whole(pair, monkeypatch):
    monkeypatch.chdir(pair)
    lost = Path("lost").read_text()
    assert lost.startswith("1 Another process of this training ended, or does not answer. ")
    assert lost.endswith("start all processes again with --resume.")
    saved, warnings = runs.load(runs.RUNS / "killed", "last")
    assert (saved.step, warnings) == (3, [])


@needs_thread_names
def test_no_thread_of_the_group_is_left_after_a_process_was_lost(pair):
    assert (pair / "threads").read_text() == ""


@pytest.fixture
def endings(pair) -> dict[str, list]:
    """What rank 0 and rank 1 saw of every ending."""
    both = [json.loads((pair / f"{rank}.json").read_text()) for rank in range(2)]
    return {name: [seen[name] for seen in both] for name in both[0]}


def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(endings):
    one, other = endings["skipped"]
    assert one == other and one[:2] == [1, [True, True, False, True, True, True]]


def test_one_process_that_is_interrupted_stops_all_at_the_same_step(endings, pair, monkeypatch):
    monkeypatch.chdir(pair)
    assert endings["stopped"] == [[3, "interrupted"]] * 2
    assert runs.load(runs.RUNS / "stopped", "last")[0].step == 3


def test_the_slowest_clock_is_that_of_all(endings):
    one, other = endings["timed"]
    assert one == other and one[0] == [2, 4, 6]


def test_the_writers_validation_decides_for_all(endings):
    expected = [[True, True, False, False], "no better validation in 2"]
    assert endings["patient"] == [expected, expected]


def test_a_batch_that_cannot_be_shared_is_refused_in_all(endings):
    one, other = endings["uneven"]
    assert one == other and "need a multiple of 4" in one


# The command


def assert_no_thread_is_left() -> None:
    """The threads of the group ended before their process did, in both processes."""
    for rank in range(2):
        during, after = (Path(f"{when}-{rank}").read_text() for when in ("during", "after"))
        assert "gloo" in during or not Path("/proc/self/task").exists()
        assert not after


def test_a_signal_to_one_process_saves_once_and_ends_all_with_130(endings, pair, monkeypatch):
    monkeypatch.chdir(pair)
    (code, said), other = endings["signal"]
    assert code == 130 and other == [130, ""], said
    assert_no_thread_is_left()
    assert column("hit", "step") == [1, 2, 3, 4, 5, 6]
    assert runs.load(runs.RUNS / "hit", "last")[0].step == 6
    assert said.count("Saved step 6. To continue:") == 1
    assert "2 processes, with 2 sequences of each batch per process" in said


def test_an_error_of_the_writer_ends_the_others_in_order(endings):
    (code, said), (other, lost) = endings["error"]
    assert [code, other] == [3, 1], said + lost
    assert said.startswith("error: ") and "nowhere" in said
    assert (
        lost.startswith("error: Another process of this training ended") and lost.count("\n") == 1
    )


def test_torchrun_trains_and_gives_one_answer(corpus, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    Path("hit.py").write_text(HIT)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m -- seqlm"
    train = f"{ON_STORY} --cell ./hit.py --steps 3 --json"
    command = [sys.executable, *torchrun.split(), *train.split()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    assert (answer["steps"], answer["processes"]) == (3, 2)
    assert ran.stderr.count("Stopped: the last step is done.") == 1
    assert column("hit", "step") == [1, 2, 3]
    assert_no_thread_is_left()


def test_one_process_alone_leaves_torch_distributed_as_it_is(corpus, monkeypatch):
    def used(*_, **__):
        raise AssertionError("torch.distributed is used")

    for name in ("init_process_group", "all_reduce", "all_gather"):
        monkeypatch.setattr(dist, name, used)
    with parallel.joined():
        list(start(corpus, "alone", **TORCH).reports())
    assert runs.load(runs.RUNS / "alone", "last")[0].environment["processes"] == 1
