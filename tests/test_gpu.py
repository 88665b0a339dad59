"""Recorded steps on a GPU, where one is asked for: SEQLM_TEST_GPU=1 pytest tests/test_gpu.py."""

import pytest
import torch
from conftest import GPU, start

from seqlm import cells
from seqlm.generation.generate import generate_many
from seqlm.model import LanguageModel
from seqlm.text.tokenizer import CharTokenizer

if not GPU:
    pytest.skip("no GPU is asked for (SEQLM_TEST_GPU=1)", allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU here", allow_module_level=True)


def losses(corpus, graphs, **given) -> list[float]:
    """Of six steps."""
    setup = start(corpus, graphs, runtime__device="cuda", runtime__graphs=graphs, **given)
    assert setup.trainer.recorded == (graphs == "auto")
    return [report.loss for report in setup.reports()]


@pytest.mark.parametrize("cell", cells.names())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_steps_are_those_that_are_not_to_rounding(corpus, cell, dtype):
    """And all cells are recorded: a warning that one was not would be an error."""
    given = dict(cell__name=cell, runtime__dtype=dtype, model__dropout=0.3)
    plain = losses(corpus, "off", **given)
    assert losses(corpus, "auto", **given) == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("cell", cells.names())
def test_text_by_recorded_steps_is_the_same(monkeypatch, cell):
    tokenizer = CharTokenizer(" abcd")
    model = LanguageModel(tokenizer.vocab_size, 8, 2, cell, conv=3).eval().cuda()
    ours, plain = [], []
    for texts in (ours, plain):
        texts += generate_many(model, tokenizer, "a b", numbers=range(3), chars=9, stop=["c"])
        monkeypatch.setattr("seqlm.generation.generate.recorded", lambda function, _: function)
    assert ours == plain
