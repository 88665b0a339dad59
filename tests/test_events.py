"""What a training writes for other programs: event files for TensorBoard, a bar in a notebook."""

import json
import sys
import warnings
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
from conftest import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from tqdm import TqdmWarning

import seqlm

RUN = Path("checkpoints/story-mingru")
GIVEN = ["--preset", "tiny", "--width", 8, "--layers", 1, "--batch", 4, "--length", 16]


def events() -> dict[tuple[str, int], float]:
    reader = EventAccumulator(str(RUN / "tensorboard"))
    reader.Reload()
    names = reader.Tags()["scalars"]
    found = [(name, one.step, one.value) for name in names for one in reader.Scalars(name)]
    assert len(found) == len({(name, step) for name, step, _ in found}), "one value for each step"
    return {(name, step): value for name, step, value in found}


def metrics() -> dict[tuple[str, int], float]:
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    return {
        (name, row["step"]): float(np.float32(value))
        for row in rows
        for name, value in row.items()
        if name != "step"
    }


def test_the_events_are_the_metrics_also_after_a_killed_and_a_new_training(corpus, seqlm_command):
    new = ["train", "--data", corpus, *GIVEN, "--tensorboard", "--set", "train.eval_every=2"]
    assert seqlm_command(*new, "--steps", 3).code == 0
    first = events()
    assert first == metrics() and ("val_bits_per_char", 2) in first
    # a training that was killed after its last save leaves events of later steps
    with SummaryWriter(str(RUN / "tensorboard")) as writer:
        for step in range(4, 9):
            writer.add_scalar("loss", 99, step)
    result = seqlm_command("train", "--resume", "--steps", 6, "--tensorboard")
    assert result.code == 0, result.err
    resumed = events()
    assert resumed == metrics() and first.items() < resumed.items()
    assert seqlm_command(*new, "--steps", 2, "--force").code == 0
    assert events() == metrics() and len(events()) < len(first)


def test_a_training_without_tensorboard_writes_no_events(run):
    assert not (run.path / "tensorboard").exists()


def test_events_are_not_written_through_a_link(run, seqlm_command, tmp_path):
    (run.path / "tensorboard").symlink_to(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = seqlm_command("train", "--resume", "--steps", 6, "--tensorboard")
    assert result.code == 3 and "tensorboard is a link" in result.err
    assert sorted(tmp_path.iterdir()) == before


def test_without_the_library_the_error_names_the_extra(corpus, seqlm_command, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    result = seqlm_command("train", "--data", corpus, *GIVEN, "--steps", 2, "--tensorboard")
    assert result.code == 1 and "pip install -e '.[tensorboard]'" in result.err
    assert not RUN.exists()


def test_in_a_notebook_without_widgets_the_bar_is_plain_and_nothing_warns(
    corpus, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", object())
    monkeypatch.setitem(sys.modules, "IPython", MagicMock())
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    for name in ("auto", "autonotebook", "notebook"):
        monkeypatch.delitem(sys.modules, f"tqdm.{name}", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seqlm.train(corpus, run="new", progress=True, **SMALL)
    assert [one.message for one in caught if issubclass(one.category, TqdmWarning)] == []
    assert "step 4 loss" in capsys.readouterr().err
