"""The text that each validation of a training keeps in samples.jsonl."""

import json
from pathlib import Path

import pytest
from conftest import scored, start

import seqlm
from seqlm.config import read_toml
from seqlm.errors import SeqlmError, UsageError
from seqlm.generation.generate import generate
from seqlm.store import history
from seqlm.training import loop


def samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / history.SAMPLES).read_text("utf-8").splitlines()]


def test_generate_writes_a_sample_again_with_its_step_and_seed(corpus, seqlm_command):
    setup = start(corpus, "kept", train__sample_chars=30, train__save_every=3)
    shown = [report.sample for report in setup.reports()]
    rows = samples(setup.run)
    assert [row["step"] for row in rows] == [3, 6]
    assert shown == [None, None, rows[0]["text"], None, None, rows[1]["text"]]
    for row in rows:
        given = dict(chars=30, seed=row["seed"], temperature=row["temperature"])
        assert seqlm.load(setup.run, row["step"]).generate(**given) == row["text"]
        words = [word for key, value in given.items() for word in (f"--{key}", value)]
        written = seqlm_command("generate", "--run", "kept", "--step", row["step"], "-q", *words)
        assert written.out == row["text"]


def test_without_characters_no_sample_is_made_and_no_file(corpus, monkeypatch):
    monkeypatch.setattr(loop, "generate", lambda *_, **__: pytest.fail("a text was sampled"))
    setup = start(corpus, "none", train__sample_chars=0)
    assert [report.sample for report in setup.reports()] == [None] * 6
    assert not (setup.run / history.SAMPLES).exists()


def test_a_validation_that_is_not_finite_has_no_sample(corpus, monkeypatch):
    setup = start(corpus, "wild", train__sample_chars=5)
    values = iter([float("inf"), 3.0])
    monkeypatch.setattr(setup.trainer, "validate", lambda: scored(next(values)))
    assert [bool(report.sample) for report in setup.reports()] == [False] * 5 + [True]


def test_a_model_that_cannot_be_sampled_trains_on(corpus, monkeypatch):
    """Its loss on the text may be finite, and its logits behind its own text not."""

    def fails(*_, **__):
        raise SeqlmError("The model's weights are not finite.")
        yield

    monkeypatch.setattr(loop, "generate", fails)
    setup = start(corpus, "own")
    reports = list(setup.reports())
    assert reports[-1].step == 6 and reports[-1].val and reports[-1].sample is None


def test_verbose_training_shows_its_samples_and_other_training_does_not(
    corpus, seqlm_command, monkeypatch
):
    monkeypatch.setattr(loop, "generate", generate)  # not a shorter text, as in other tests
    words = ["--preset", "tiny", "--width", 8, "--layers", 1, "--steps", 2, "--batch", 2]
    loud, plain = (
        seqlm_command("train", "--data", "story", "--run", name, *words, *more)
        for name, more in (("loud", ["-v"]), ("plain", []))
    )
    assert loud.code == plain.code == 0
    text = samples(Path("checkpoints/loud"))[0]["text"]
    assert len(text) == 200 and text in loud.err and text not in plain.err


def test_a_configuration_of_the_setting_before_is_read(tmp_path):
    """train.sample_every changed nothing of a training, so every number of it is left out."""
    for value, kept in (("500", {}), ("0", {})):
        (tmp_path / "old.toml").write_text(f"[train]\nsample_every = {value}\n")
        assert read_toml(tmp_path / "old.toml") == kept


@pytest.mark.parametrize("chars", [-1, 4097])
def test_a_sample_has_a_length_that_a_line_can_hold(corpus, chars):
    with pytest.raises(UsageError, match="train.sample_chars is .*; it must be at"):
        start(corpus, "long", train__sample_chars=chars)


def test_the_longest_sample_is_a_line_that_resuming_reads(tmp_path):
    line = {"step": 1, "temperature": 0.8, "seed": 2**63 - 1, "text": "\U0001f600" * 4096}
    history.append(tmp_path, {history.SAMPLES: line})
    assert len((tmp_path / history.SAMPLES).read_bytes()) < history.LONGEST_LINE
