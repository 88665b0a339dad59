"""A model mixed with an online context model, which learns each symbol after it was scored."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import seqlm
from seqlm.evaluation import dynamic, evaluate, mix, ppm
from seqlm.evaluation.evaluate import loss_and_hit
from seqlm.evaluation.mix import Mixing
from seqlm.evaluation.passage import Passage, passage_of_text
from seqlm.model import LanguageModel
from seqlm.text.tokenizer import CharTokenizer

TRAIN = np.array([0, 1, 0, 2, 1, 0, 1, 0, 2, 0])


def passage_of(symbols, ends=None) -> Passage:
    return Passage(np.asarray(symbols), len(symbols), len(symbols), "", ends=ends)


def test_the_probabilities_of_all_next_symbols_have_the_sum_1():
    """After every beginning of a text, for several lengths, and over the border of a document."""
    for order, size in product((1, 2, 5), range(1, len(TRAIN))):
        begins = np.array([0, 4]) if size > 4 else np.array([0])
        texts = (np.append(TRAIN[:size], last) for last in range(3))
        p = [np.exp(-ppm.costs(text, begins, 3, order)[-1]) for text in texts]
        assert sum(p) == pytest.approx(1, abs=1e-12) and min(p) > 0


def test_the_costs_are_those_of_counts_in_a_table():
    """The same formula, symbol by symbol."""
    symbols = np.random.default_rng(0).integers(3, size=200)
    counts: dict[tuple, dict[int, int]] = {}
    for at, (symbol, cost) in enumerate(zip(symbols, ppm.costs(symbols, [0], 3, 3), strict=True)):
        contexts = [tuple(symbols[at - k : at]) for k in range(min(at, 3) + 1)]
        p = 1 / 3
        for known in (counts[context] for context in contexts if context in counts):
            own = max(known.get(symbol, 0) - ppm.DISCOUNT, 0)
            p = (own + ppm.DISCOUNT * len(known) * p) / sum(known.values())
        assert cost == pytest.approx(-np.log(p))
        for context in reversed(contexts):
            known = counts.setdefault(context, {})
            known[symbol] = known.get(symbol, 0) + 1
            if known[symbol] > 1:
                break


def test_a_symbol_costs_the_same_whatever_comes_after_it():
    whole = ppm.costs(TRAIN, [0], 3, 4)
    for size in range(1, len(TRAIN)):
        assert np.array_equal(ppm.costs(TRAIN[:size], [0], 3, 4), whole[:size])


def test_the_probabilities_of_all_texts_have_the_sum_1():
    """Of all texts of 4 symbols: a weight that knew the text could not keep this."""
    torch.manual_seed(0)
    model, total = LanguageModel(3, 8, 1).double().eval(), 0.0
    for text in product(range(3), repeat=4):
        passage = passage_of(text)
        judged = evaluate.each_symbol(model, passage, _exact)
        mixed = mix.score(judged, passage, 3, Mixing(2, passage_of(TRAIN)))
        total += np.exp(-mixed.score.nats)
    assert total == pytest.approx(1, abs=1e-9)


def _exact(logits, targets):
    """`loss_and_hit` in float64."""
    cost = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return torch.stack([cost, torch.zeros_like(cost)])


def test_the_mixture_costs_at_most_5_bits_more_than_the_better_part():
    text = np.tile(TRAIN, 20)
    passage, expected = passage_of(text), ppm.costs(text, [0], 3, 5).sum()
    for cost in (0.01, 9.0):  # of each symbol, by the model
        judged = [(np.arange(len(text)), torch.full((2, len(text)), cost))]
        mixed = mix.score(judged, passage, 3, Mixing(5))
        assert mixed.alone.nats == pytest.approx(expected)
        better = min(cost * len(text), expected) - len(text) * np.log(mix.WEIGHTS[-1])
        assert mixed.score.nats < better + 5 * evaluate.NATS_PER_BIT
        assert (mixed.weight > 0.9) == (cost < 1)


def test_only_answers_cost_and_documents_begin_anew():
    tokenizer = CharTokenizer("\n0123456789=", "lines", mark="=")
    text = "".join(f"{n % 3}={n % 3}\n" for n in range(60)).encode()
    passage, model = passage_of_text([text], tokenizer), LanguageModel(12, 8, 1).eval()
    judged = [*evaluate.each_symbol(model, passage, loss_and_hit)]
    mixed = mix.score(judged, passage, 12, Mixing(3, passage))
    assert mixed.score.tokens == 60 and mixed.alone.bits_per_char < 0.1
    costs = mix.costs(passage, 12, Mixing(3))
    assert mixed.alone.nats < costs[passage.counts(np.arange(len(costs)))].sum()


def test_of_a_long_training_text_the_last_symbols_are_counted(monkeypatch):
    text = passage_of([1, 2, 0, 1])
    part = Mixing(2, passage_of(TRAIN[-4:], ends=np.array([1, 4])))
    whole = Mixing(2, passage_of(TRAIN, ends=np.array([2, 7, 10])))
    assert not np.array_equal(mix.costs(text, 3, part), mix.costs(text, 3, whole))
    monkeypatch.setattr(mix, "START", 4)
    assert np.array_equal(mix.costs(text, 3, part), mix.costs(text, 3, whole))


# The command


def test_eval_mix_prints_both_figures_each_with_its_protocol(seqlm_command, run):
    found = seqlm_command("eval", "--mix", "ppm:3", "--json").json
    static, mixed = seqlm_command("eval", "--json").json, found["mixed"]
    assert found["bits_per_char"] == static["bits_per_char"] > mixed["bits_per_char"]
    assert (mixed["protocol"], mixed["start"]) == ("stream, ppm:3", "train")
    result = seqlm_command("eval", "--mix", "ppm:3", "--dynamic")
    shown = dict(line.split("\t") for line in result.out.splitlines())
    assert shown["mixed: protocol"] == "dynamic, ppm:3"
    both = run.mixed_with(run).evaluate(mix="ppm:3", dynamic_lr=dynamic.LR)
    assert both["mixed"]["protocol"] == "dynamic, ensemble of 2, ppm:3"


def test_where_bytes_are_not_text_the_context_model_has_bits_per_byte(seqlm_command):
    Path("noise.bin").write_bytes(bytes(range(256)) * 20)
    seqlm_command("prepare", "noise.bin", "--unit", "byte")
    shape = {"preset": "tiny", "width": 8, "layers": 1, "batch": 2, "length": 16, "steps": 1}
    figures = seqlm.train("data/noise.bin-byte", **shape).evaluate(mix="ppm:3")["mixed"]
    assert figures["alone_bits_per_char"] is None and figures["alone_bits_per_byte"] < 8


def test_without_its_corpus_a_run_mixes_with_counts_of_the_text_alone(run, text_file):
    (text_file.parent / "data" / "story").rename("elsewhere")
    assert run.evaluate(text=text_file.read_bytes(), mix="ppm:3")["mixed"]["start"] == "none"


@pytest.mark.parametrize(
    "given, said",
    [
        (["--mix", "ppm"], "--mix ppm: it must be ppm:N, with N the length of the longest context"),
        (["--mix", "ppm:33"], "--mix ppm:33: it must be ppm:N"),
        (["accuracy", "--mix", "ppm:5"], "--mix gives more figures, and accuracy prints one"),
        (["--mix", "ppm:5", "--protocol", "window"], "--mix reads the text as one stream. Remove"),
        (["--mix", "ppm:5", "--split", "train"], "--mix ppm:5 counts the train split first, so it"),
    ],
)
def test_what_cannot_be_mixed_is_refused(given, said, seqlm_command, run):
    result = seqlm_command("eval", *given)
    assert result.code == 2 and said in result.err
