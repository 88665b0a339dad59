"""Kill training at random moments, during saves too, and see that nothing is ever lost; start two
processes together again and again, and see that they end in order.

    python tests/soak.py --kills 200 --together 40

A run of every cell in turn is killed (SIGKILL) over and over and resumed each time, while the same
run trains once without a stop.  After every kill the run must resume; at the end all files of both
runs must be equal, byte for byte.  Not part of the suite: it takes minutes.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import sentences

from seqlm import cells
from seqlm.errors import SeqlmError
from seqlm.store import checkpoint, history, runs
from seqlm.temporary import PREFIX
from seqlm.text.prepare import prepare
from seqlm.training import launch

STEPS_A_KILL = 20  # more than come between two kills, so that the run does not end before
GIVEN = {
    "model.width": 96,
    "model.layers": 2,
    "model.conv": 3,
    "model.dropout": 0.1,
    "train.batch": 4,
    "train.length": 32,
    "train.eval_every": 7,
    "train.save_every": 1,  # so that most kills fall into a save
    "runtime.threads": 1,
}


def train(corpus: Path, run: str, cell: str, steps: int) -> None:
    """Go on with the run, or begin it."""
    if runs.is_run(runs.place(run)):
        setup = launch.start(run=run, resume=True)
    else:
        given = {**GIVEN, "cell.name": cell, "train.steps": steps}
        setup = launch.start(str(corpus), run=run, preset="tiny", settings=given)
    for _ in setup.reports():
        pass


def killed(delay: float, *arguments) -> bool:
    """Train in a process of its own, which is killed after the delay; whether it came to that."""
    child = os.fork()
    if child == 0:
        ended = 1
        try:
            train(*arguments)
            ended = 0
        except SeqlmError as error:
            print(f"error: {error}", file=sys.stderr)
        finally:
            os._exit(ended)  # whatever it was, nothing of the parent's is to be cleared away
    time.sleep(delay)
    ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        sys.exit("A run could not be resumed.")
    return os.WIFSIGNALED(status)


def contents(run: Path, step: int) -> dict[str, object]:
    """Every file of the run's step and its metrics, without the clock."""
    folder = run / checkpoint.folder_name(step)
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    progress = json.loads((folder / checkpoint.PROGRESS).read_text())
    del progress["elapsed"]
    found |= {name: (run / name).read_bytes() for name in (history.METRICS, history.SAMPLES)}
    return found | {"progress": progress, "best": (run / "best").read_bytes()}


def soak(cell: str, kills: int, random_: random.Random) -> tuple[int, int, int]:
    """Kills done, of which in a save, and the steps trained; exits where a run does not survive."""
    corpus, steps = Path("data/story"), STEPS_A_KILL * kills
    done = in_save = 0
    while done < kills:
        if killed(random_.uniform(0.02, 0.6), corpus, f"killed-{cell}", cell, steps):
            done += 1
            leftovers = list((runs.RUNS / f"killed-{cell}").glob(f"{PREFIX}*"))
            in_save += bool(leftovers)
        elif runs.load(runs.RUNS / f"killed-{cell}", "last")[0].step == steps:
            break
    train(corpus, f"killed-{cell}", cell, steps)
    train(corpus, f"whole-{cell}", cell, steps)
    a, b = (contents(runs.RUNS / f"{name}-{cell}", steps) for name in ("killed", "whole"))
    different = [name for name in a if a[name] != b[name]]
    if different:
        sys.exit(f"{cell}: after {done} kills these differ: {', '.join(different)}")
    return done, in_save, steps


def together(times: int) -> None:
    """Train in two processes under torchrun; exits where one does not end with its figure."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += "--nproc-per-node 2 -m -- seqlm train --preset tiny --width 16 --layers 1".split()
    command += "--batch 4 --length 16 --steps 3 --data data/story --run together --force -q".split()
    for time_ in range(times):
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode or not 0 < float(ran.stdout or 0) < 10:
            sys.exit(f"Training {time_ + 1} under torchrun failed:\n{ran.stdout}{ran.stderr}")
    print(f"{times} trainings of two processes under torchrun: all ended with 0 and their figure")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="over all cells")
    parser.add_argument("--together", type=int, default=40, help="trainings of two processes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random_ = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        Path("story.txt").write_text(sentences(4000))
        prepare(["story.txt"])
        together(arguments.together)
        total = in_saves = 0
        for cell in cells.names():
            done, in_save, steps = soak(cell, arguments.kills // len(cells.names()), random_)
            total, in_saves = total + done, in_saves + in_save
            print(f"{cell}: {done} kills ({in_save} while saving), {steps} steps, all files equal")
        print(f"{total} kills, {in_saves} of them while a step was being saved: nothing lost")


if __name__ == "__main__":
    main()
