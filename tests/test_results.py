"""seqlm results: the list, one result, and one that is trained again."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from reference import DOCS

from seqlm.config import merge_settings
from seqlm.lab import results
from seqlm.model import blueprint, parameter_count
from seqlm.training import launch

KNOWN = results.read()
TABLES = ("four-cells-three-minutes", "muon-five-minutes", "five-minutes", "long-trainings")
SYMBOLS = {"tinyshakespeare": 65, "ptb-char": 50}


@pytest.mark.parametrize("name", KNOWN)
def test_the_command_of_a_result_still_gives_its_model(name):
    """As many parameters as it says, with the alphabet of its text."""
    result = KNOWN[name]
    settings = merge_settings(result.set, result.flags)
    config, _ = launch.configuration(None, None, settings)
    model = blueprint(config, vocab_size=SYMBOLS[result.corpus])
    assert parameter_count(model) == result.params


def test_the_results_agree_with_the_tables_of_measurements():
    """Each figure stands in one of them, in bits or nats per character."""
    files = [json.loads((DOCS / "figures" / f"{name}.json").read_text()) for name in TABLES]
    cells = {cell for file in files for row in file["rows"] for cell in row}
    for run in (run for result in KNOWN.values() for run in result.runs):
        bits, nats = run.bits_per_char, run.bits_per_char * math.log(2)
        assert {f"{bits:.4f}", f"{bits:.3f}", f"{nats:.3f}"} & cells


def test_one_result_is_shown_with_its_command(seqlm_command):
    command = seqlm_command("results", "mingru-5m-adamw", "-q").out.strip()
    assert command == (
        "seqlm train --data tinyshakespeare --cell mingru --width 256 --batch 16 "
        "--length 256 --time-limit 5m --lr 0.006 --seed 0 --set optim.name=adamw "
        "--set optim.schedule=cosine"
    )
    lines = seqlm_command("results", "mingru-5m-w256").out.splitlines()
    shown = dict(line.split("\t") for line in lines)
    assert (shown["bits per char"], shown["spread"]) == ("2.1902", "0.0450")
    assert seqlm_command("results", "-q").out.split() == [*KNOWN]
    tied = replace(KNOWN["mingru-5m"], set={"model.tie": True})
    assert tied.command.endswith("--set model.tie=true")


SMALL = """[story]
corpus = "data/story"
split = "val"
protocol = "stream"
flags = { cell = "mingru", width = 8, layers = 1, batch = 2, length = 16, steps = 2 }
params = 1
machine = "a machine"
date = 2026-11-30
"""


@pytest.fixture
def story(corpus, monkeypatch):
    """Makes a result of two steps on the small corpus the only one; returns the file."""
    file = Path("results.toml").absolute()
    monkeypatch.setattr(results.read, "__defaults__", (file,))
    return file


def test_a_result_is_trained_again_and_compared(story, seqlm_command):
    one = "[[story.runs]]\nseed = 3\nbits_per_char = 5.0\nchars = 99\n"
    story.write_text(SMALL + one)
    first = seqlm_command("results", "story", "--run", "--json").json
    again = first["again"]
    assert again["run"] == "checkpoints/results-story" and again["within"] is None
    evaluated = seqlm_command("eval", "--run", again["run"], "--json").json
    assert evaluated["bits_per_char"] == again["bits_per_char"] == first["bits_per_char"]
    assert (again["seed"], again["chars"], again["chars_before"]) == (3, 64, 99)
    assert "results-story exists" in seqlm_command("results", "story", "--run").err

    bits = again["bits_per_char"]
    for mean, spread, verdict in ((bits, 1e-3, "within"), (bits + 1, 0.1, "not within")):
        two = f"[[story.runs]]\nseed = 3\nbits_per_char = {mean - spread}\n"
        two += f"[[story.runs]]\nseed = 4\nbits_per_char = {mean + spread}\n"
        story.write_text(SMALL + two)
        Path("checkpoints").rename(f"checkpoints before: {verdict}")
        result = seqlm_command("results", "story", "--run")
        assert f", {verdict} 2 x {spread * math.sqrt(2):.4f}" in result.out


def test_a_result_is_not_trained_on_another_text(story, seqlm_command):
    story.write_text(SMALL + 'split_sha256 = "0"\n[[story.runs]]\nseed = 0\nbits_per_char = 5.0\n')
    result = seqlm_command("results", "story", "--run")
    assert result.code == 3 and "story has another val split than story was measured" in result.err
    assert not Path("checkpoints/results-story").exists()


def test_an_unknown_result_and_run_without_a_name_are_refused(seqlm_command):
    assert "Did you mean 'mingru-5m'" in seqlm_command("results", "mingru-5").err
    assert "--run trains one result. Name it" in seqlm_command("results", "--run").err
