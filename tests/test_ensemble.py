"""Several runs as one: the mean of their probabilities."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL

import seqlm
from seqlm import cells
from seqlm.errors import UsageError
from seqlm.evaluation.ensemble import Ensemble
from seqlm.model import LanguageModel


def test_the_probabilities_are_the_mean_and_a_sequence_equals_its_steps():
    models = [LanguageModel(5, width=6, layers=2), LanguageModel(5, width=4, layers=1, cell="lem")]
    both, tokens = Ensemble(models).eval(), torch.randint(5, (2, 7))
    with torch.no_grad():
        logits, _ = both(tokens)
        mean = sum(model(tokens)[0].softmax(-1) for model in models) / 2
        torch.testing.assert_close(logits.exp(), mean)
        state = both.initial_state(2)
        for t in range(7):
            at_t, state = both.step(tokens[:, t], state)
            torch.testing.assert_close(at_t, logits[:, t], rtol=1e-4, atol=1e-5)


def test_a_model_that_is_there_twice_is_tempered_once():
    model, tokens = LanguageModel(5, width=6, layers=2).eval(), torch.randint(5, (2, 7))
    with torch.no_grad():
        expected = (model(tokens)[0] / 1.5).softmax(-1)
        both = Ensemble([model, model]).eval()
        both.temper(1.5)
        torch.testing.assert_close(both(tokens)[0].exp(), expected)


def test_eval_mixes_runs_and_says_so(corpus, seqlm_command):
    for name, cell in (("one", "mingru"), ("two", "lem")):
        seqlm.train(corpus, cell=cell, run=name, **SMALL)
    one, two = seqlm.load("one"), seqlm.load("two")
    mixed = one.mixed_with(two).evaluate()
    found = seqlm_command("eval", "--run", "one", "--with", "two", "--json").json
    assert found["bits_per_char"] == mixed["bits_per_char"]
    assert found["bits_per_char"] < max(r.evaluate()["bits_per_char"] for r in (one, two))
    assert (found["protocol"], found["others"]) == ("stream, ensemble of 2", ["checkpoints/two"])
    assert found["params"] == sum(r.evaluate()["params"] for r in (one, two))
    alone = one.evaluate()
    assert one.mixed_with(one).evaluate()["nats_per_char"] == pytest.approx(alone["nats_per_char"])
    at_once = one.mixed_with(one, two).evaluate()
    for again in (one.mixed_with(one).mixed_with(two), one.mixed_with(one.mixed_with(two))):
        figures = again.evaluate()  # each run weighs the same
        for key in ("nats_per_char", "protocol", "others"):
            assert figures[key] == at_once[key]
    assert len(one.mixed_with(two).generate("the ", chars=9, seed=1)) == 9
    for odd in (two.tempered(2.0), seqlm.load("two", dtype="bfloat16")):
        with pytest.raises(UsageError, match="Load all runs with one dtype, and call `tempered`"):
            one.mixed_with(odd)
    with pytest.raises(UsageError, match="Inspect one run"):
        one.mixed_with(two).inspect("the old king")
    dynamic = one.mixed_with(two).evaluate(dynamic_lr=1e-3)["dynamic"]
    assert dynamic["protocol"] == "dynamic, ensemble of 2"


def test_runs_of_different_alphabets_are_not_mixed(corpus, tmp_path):
    (tmp_path / "other.txt").write_text("abcab" * 400)
    one = seqlm.train(corpus, run="one", **SMALL)
    other = seqlm.train("other.txt", run="other", **SMALL)
    with pytest.raises(UsageError, match="other has another tokenizer than .*one, so"):
        one.mixed_with(other)


@pytest.mark.parametrize("first, other", [("own", "lem"), ("lem", "own")])
def test_a_run_of_an_own_cell_is_read_beside_one_of_seqlm(corpus, seqlm_command, first, other):
    source = Path(cells.__file__).with_name("lem.py").read_text(encoding="utf-8")
    Path("mine.py").write_text(source)
    seqlm.train(corpus, cell="./mine.py", run="own", **SMALL)
    seqlm.train(corpus, cell="lem", run="lem", **SMALL)
    file = ("--run", first, "--cell", "./mine.py")
    assert seqlm_command("eval", "--with", other, *file).code == 0
    assert seqlm_command("score", "story.txt", "--per", "line", "--against", other, *file).code == 0
    refused = seqlm_command("eval", "--run", "lem", "--with", "lem", "--cell", "./mine.py")
    assert refused.code == 2
    assert "checkpoints/lem was trained with lem, a cell of seqlm, and needs no file. Remove" in (
        " ".join(refused.err.split())
    )
    for command in ("eval", "check"):
        assert seqlm_command(command, "--run", "lem", "--cell", "./mine.py").code == 2
