"""Training while its streams, its corpus or its memory fail, and what it says of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import start

import seqlm
from seqlm.cli import train as command
from seqlm.errors import InputError
from seqlm.evaluation import evaluate
from seqlm.evaluation.passage import passage_of_split
from seqlm.lab import check
from seqlm.model import LanguageModel
from seqlm.text.corpus import open_corpus
from seqlm.text.prepare import prepare

TRAIN = "train --preset tiny --width 16 --layers 1 --batch 4 --length 16 --steps 3 --run hard"
TRAIN += " --set runtime.backend=torch"


def test_training_goes_on_where_standard_error_is_full(corpus):
    line = f"{sys.executable} -m seqlm {TRAIN} --json 2> /dev/full"
    ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert ended.returncode == 0 and json.loads(ended.stdout)["steps"] == 3
    assert seqlm.load("hard").step == 3


def test_the_closing_figure_is_that_of_the_corpus_trained_on(corpus, seqlm_command, monkeypatch):
    """Another text is prepared in its place before the closing evaluation."""
    old = open_corpus(corpus)
    trained = command._train

    def train_then_replace(*arguments):
        last = trained(*arguments)
        Path("story.txt").write_text("0123456789 " * 400)
        prepare(["story.txt"], force=True)
        return last

    monkeypatch.setattr(command, "_train", train_then_replace)
    ended = seqlm_command(*TRAIN.split(), "--json")
    assert ended.code == 0, ended.err
    expected = seqlm.load("hard").evaluate(data=old)
    # the sums are in another order where the number of threads is another
    assert ended.json["val_bits_per_char"] == pytest.approx(expected["bits_per_char"], rel=1e-6)
    assert expected["own_corpus"] and open_corpus(corpus).fingerprint != old.fingerprint


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_corpus_that_is_cut_in_training_ends_it_in_one_sentence(corpus, split):
    """Reading the lost part of a mapped file would end the process with SIGBUS."""
    setup = start(corpus, "cut", train__eval_every=2)
    with pytest.raises(InputError, match=rf"{split}\.bin was cut or changed"):
        for report in setup.reports():
            if report.step == 1:
                os.truncate(corpus / f"{split}.bin", 0)


READERS = {
    "stream": lambda model, tokenizer, passage: evaluate.score(model, tokenizer, passage),
    "window": lambda model, tokenizer, passage: evaluate.score(model, tokenizer, passage, "window"),
    "validation": lambda model, tokenizer, passage: evaluate.validate(model, passage),
    "blocks": lambda model, tokenizer, passage: evaluate.blocks(model, passage, 50),
}


@pytest.mark.parametrize(
    "documents, reader",
    [*(("none", reader) for reader in READERS), ("lines", "stream"), ("lines", "blocks")],
)
def test_a_corpus_that_is_cut_in_evaluation_ends_it_in_one_sentence(
    text_file, monkeypatch, documents, reader
):
    """The next chunk would be read from the lost part of the mapped file."""
    corpus = open_corpus(prepare([str(text_file)], documents=documents)[0])
    model = LanguageModel(corpus.tokenizer.vocab_size, width=8, layers=1).eval()
    passage = passage_of_split(corpus, "val", corpus.tokenizer)
    judged = evaluate._judged

    def judge_and_cut(*arguments):
        os.truncate(corpus.path / "val.bin", 0)
        return judged(*arguments)

    monkeypatch.setattr(evaluate, "_judged", judge_and_cut)
    monkeypatch.setattr(evaluate, "AT_ONCE", 32)
    with pytest.raises(InputError, match=r"val\.bin was cut or changed"):
        READERS[reader](model, corpus.tokenizer, passage)


def test_check_reports_a_corpus_that_is_cut_meanwhile(run, monkeypatch, seqlm_command):
    looked = check._text

    def cut_and_look(tokenizer, corpus):
        os.truncate(corpus.path / "val.bin", 0)
        return looked(tokenizer, corpus)

    monkeypatch.setattr(check, "_text", cut_and_look)
    result = seqlm_command("check", "--json")
    failed = {
        row["name"]: row["detail"] for row in result.json["checks"] if row["status"] == "fail"
    }
    assert result.code == 3 and set(failed) == {check.TEXT_BACK, check.RESUME, check.PLAUSIBLE}
    assert all("val.bin was cut or changed" in detail for detail in failed.values())


GREEDY = """
import numpy, torch
from torch import nn
from seqlm.cells import Recurrence

class Greedy(Recurrence):
    def __init__(self, width):
        super().__init__()
        self.width, self.inputs = width, nn.Linear(width, width)

    def initial_state(self, batch):
        return (self.zeros(batch, self.width),)

    def project(self, x):
        if len(x) == 4:
            ALLOCATE
        return self.inputs(x)

    def recur(self, drive, state):
        h = drive.tanh() + state[0] / 2
        return h, (h,)
"""


@pytest.mark.parametrize("allocate", ["torch.empty(1 << 50)", "numpy.empty(1 << 50)"])
def test_memory_that_is_full_in_training_names_what_to_lower(corpus, seqlm_command, allocate):
    Path("greedy.py").write_text(GREEDY.replace("ALLOCATE", allocate))
    ended = seqlm_command(*TRAIN.split(), "--cell", "./greedy.py")
    assert ended.code == 1
    assert "Lower --batch (4 now), --length (16) or --width (16)" in ended.err.splitlines()[-1]


def test_ctrl_c_before_training_begins_says_that_no_step_was_saved(
    corpus, seqlm_command, monkeypatch
):
    monkeypatch.setattr("seqlm.training.launch.start", Mock(side_effect=KeyboardInterrupt))
    ended = seqlm_command(*TRAIN.split())
    assert ended.code == 130 and "No step was saved" in ended.err
    assert not Path("checkpoints").exists()


def test_the_library_warns_of_what_the_commands_print(run):
    """At the line that called it, of a damaged step that is passed over."""
    run_on = dict(run="story-mingru", resume=True)
    seqlm.train(**run_on, steps=6)
    (run.path / "step-00000006" / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="step-00000006") as loaded:
        seqlm.load("story-mingru", "last")
    with pytest.warns(UserWarning, match="step-00000006") as resumed:
        seqlm.train(**run_on, steps=8)
    assert {warning.filename for warning in [*loaded, *resumed]} == {__file__}
