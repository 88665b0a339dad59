"""Dynamic evaluation: the text is scored first and then learned, and the run stays as it was."""

import random
from math import log

import numpy as np
import pytest
import torch

from seqlm.errors import SeqlmError
from seqlm.evaluation import dynamic, evaluate, score
from seqlm.evaluation.dynamic import Learning
from seqlm.evaluation.evaluate import loss_and_hit
from seqlm.evaluation.passage import passage_of_text
from seqlm.model import LanguageModel
from seqlm.progress import silent
from seqlm.text.tokenizer import ByteTokenizer, CharTokenizer

WORDS = ["the cat ", "a dog\n", "one or two ", "nobody "]


def model_of(cell: str = "mingru") -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(257, 16, 1, cell).eval()  # bytes, and the end of a file


def passage_of(size: int, documents: str = "none", seed: int = 0):
    words = random.Random(seed).choices(WORDS, k=size)
    return passage_of_text(["".join(words).encode()], ByteTokenizer(documents))


def weights(model) -> list:
    return [weight.clone() for weight in model.state_dict().values()]


def values(model, passage, learning: Learning) -> np.ndarray:
    """(2, N) what each symbol costs, in the text's order."""
    found = [*dynamic.each_symbol(model, passage, loss_and_hit, learning)]
    assert np.array_equal(np.concatenate([places for places, _ in found]), counted(passage))
    return torch.cat([part for _, part in found], dim=1).numpy()


def score_of(model, passage, learning: Learning, tick=silent) -> evaluate.Score:
    found = dynamic.each_symbol(model, passage, loss_and_hit, learning, tick)
    return evaluate.scored(found, passage)


def counted(passage) -> np.ndarray:
    places = np.arange(len(passage.symbols))
    return places[passage.counts(places)]


@pytest.mark.parametrize("cell", ["mingru", "lem"])
@pytest.mark.parametrize("documents", ["none", "lines"])
def test_without_learning_the_figures_are_those_of_the_protocol_stream(cell, documents):
    model, passage = model_of(cell), passage_of(60, documents)
    found = score_of(model, passage, Learning(lr=0.0))
    expected = evaluate.score(model, ByteTokenizer(documents), passage)
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    assert found[1:] == expected[1:]


def test_where_answers_count_only_answers_are_scored_and_learned():
    """At a rate of 0 the figures are those of the protocol answers."""
    tokenizer = CharTokenizer("\n0123456789=", "lines", mark="=")
    text = "".join(f"{n}={n * n}\n" for n in range(40)).encode()
    passage, model = passage_of_text([text], tokenizer), LanguageModel(12, 16, 1, "mingru").eval()
    still = score_of(model, passage, Learning(lr=0.0))
    expected = evaluate.score(model, tokenizer, passage)
    assert still.nats == pytest.approx(expected.nats, rel=1e-6) and still[1:] == expected[1:]
    learned = score_of(model, passage, Learning(lr=1e-2))
    assert learned.tokens == passage.tokens and learned.nats < still.nats


@pytest.mark.parametrize("per", score.UNITS)
@pytest.mark.parametrize("documents", ["none", "lines", "files"])
def test_the_bits_of_all_rows_are_those_of_the_text(documents, per):
    model, tokenizer, passage = model_of(), ByteTokenizer(documents), passage_of(40, documents)
    learning = Learning(lr=1e-3)
    chunks = score.chunks(model, passage, 0, learning)
    rows = score.rows(chunks, tokenizer, passage, per)
    expected = score_of(model, passage, learning).bits
    assert sum(row.surprisal_bits for row in rows) == pytest.approx(expected, rel=1e-6)


def test_a_segment_is_scored_before_it_is_learned():
    """The first segment costs what it costs without learning, and the second does not."""
    model, passage = model_of(), passage_of(60)
    first, second = slice(0, dynamic.SEGMENT), slice(dynamic.SEGMENT, 2 * dynamic.SEGMENT)
    learned, static = (values(model, passage, Learning(lr=lr))[0] for lr in (1e-3, 0.0))
    assert np.array_equal(learned[first], static[first])
    assert (learned[second] != static[second]).all()


def test_a_symbol_costs_the_same_whatever_comes_after_its_segment():
    whole, start = passage_of(120), dynamic.SEGMENT * 3
    part = passage_of_text([bytes(whole.symbols[:start].astype("u1"))], ByteTokenizer())
    found = values(model_of(), whole, Learning(lr=1e-3))[:, :start]
    assert np.array_equal(found, values(model_of(), part, Learning(lr=1e-3)))


@pytest.mark.parametrize("trained_on", [None, passage_of(100, seed=1)], ids=["text", "train"])
def test_a_text_that_repeats_itself_costs_less_with_learning(trained_on):
    model, passage = model_of(), passage_of(300)
    static = score_of(model, passage, Learning(lr=0.0)).nats
    assert score_of(model, passage, Learning(3e-3, trained_on)).nats < 0.9 * static


def test_each_document_begins_from_a_fresh_state_and_with_what_was_learned():
    """A document that comes twice costs less the second time, from its first symbol on."""
    passage = passage_of_text([b"the cat\nthe cat\n"], ByteTokenizer("lines"))
    first, second = values(model_of(), passage, Learning(lr=1e-3))[0].reshape(2, -1)
    assert (second < first).all()
    first, second = values(model_of(), passage, Learning(lr=0.0))[0].reshape(2, -1)
    assert np.allclose(first, second)


def stop(share, what):
    raise KeyboardInterrupt


@pytest.mark.parametrize("end", ["whole", "interrupted", "abandoned", "diverged"])
def test_the_weights_of_the_model_stay_as_they_were(end):
    model, passage = model_of(), passage_of(60)
    before = weights(model)
    if end == "whole":
        score_of(model, passage, Learning())
    elif end == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            score_of(model, passage, Learning(), stop)
    elif end == "abandoned":
        next(dynamic.each_symbol(model, passage, loss_and_hit, Learning()))
    else:
        with pytest.raises(SeqlmError, match="Give a smaller --dynamic-lr"):
            score_of(model, passage, Learning(lr=1e30))
    assert all(map(torch.equal, weights(model), before))
    assert all(weight.grad is None for weight in model.parameters())


def test_learning_works_where_the_caller_needs_no_gradients():
    model, passage = model_of(), passage_of(60)
    expected = score_of(model, passage, Learning())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert score_of(model, passage, Learning()) == expected


def test_weights_stay_within_the_bounds_of_their_cell():
    """The recurrent weights of IndRNN are clamped after every step."""
    model = model_of("indrnn")
    learner = dynamic._Learner(model, lr=10.0)
    _, *read, _ = learner.read(passage_of(30), 0, 64, True, model.initial_state(1))
    learner.learn(*read)
    cell = learner.model.blocks[0].cell
    assert cell.u.detach().abs().max() == pytest.approx(cell.bound)


# The commands


def test_eval_dynamic_prints_both_figures_each_with_its_protocol(seqlm_command, run):
    given = ("eval", "--dynamic", "--dynamic-lr", "0.00002")
    shown = dict(line.split("\t") for line in seqlm_command(*given).out.splitlines())
    found = seqlm_command(*given, "--json").json
    static = seqlm_command("eval", "--json").json
    for name in ("protocol", "bits_per_char", "perplexity", "accuracy", "split_sha256"):
        assert found[name] == static[name]
    assert shown["bits per char"] == f"{static['bits_per_char']:.4f}"
    assert found["dynamic"]["protocol"] == "dynamic" and found["dynamic"]["gradients"] == "train"
    assert shown["dynamic: bits per char"] == f"{found['dynamic']['bits_per_char']:.4f}"
    assert (shown["dynamic: protocol"], shown["dynamic: gradients"]) == ("dynamic", "train")
    assert shown["dynamic: lr"] == "2e-05"
    assert found["dynamic"]["bits_per_char"] < static["bits_per_char"]


def test_score_dynamic_has_the_sum_of_eval_dynamic(seqlm_command, run, text_file):
    stated = run.evaluate(text=text_file.read_bytes(), dynamic_lr=1e-3)["dynamic"]
    given = ("score", text_file, "--dynamic", "--dynamic-lr", "0.001")
    found = seqlm_command(*given, "--json").json
    assert found["protocol"] == "dynamic"
    assert found["bits_per_char"] == pytest.approx(stated["bits_per_char"], rel=1e-6)
    result = seqlm_command(*given, "--per", "line")
    bits = [float(line.split("\t")[5]) for line in result.out.splitlines()[1:]]
    assert sum(bits) == pytest.approx(found["bits"], rel=1e-6)
    assert "Protocol dynamic: the model learned from each part after it was scored." in result.err


def test_run_score_can_learn_and_its_figures_are_those_of_the_command(run):
    text = "the cat sees a dog.\n" * 20
    bits = run.score(text, dynamic_lr=1e-3).surprisal_bits.sum()
    stated = run.evaluate(text=text.encode(), dynamic_lr=1e-3)["dynamic"]
    assert bits == pytest.approx(stated["nats_per_char"] * len(text) / log(2), rel=1e-6)


def test_without_its_corpus_a_run_takes_gradients_from_the_text(seqlm_command, run, text_file):
    (text_file.parent / "data" / "story").rename("elsewhere")
    found = seqlm_command("eval", "--text", text_file, "--dynamic", "--json").json["dynamic"]
    assert found["gradients"] == "text"


def test_a_damaged_train_split_is_said_and_not_replaced(seqlm_command, run, text_file):
    file = text_file.parent / "data" / "story" / "train.bin"
    file.write_bytes(b"\0\0\0" + file.read_bytes()[3:])
    result = seqlm_command("score", text_file, "--dynamic")
    assert result.code == 3 and "train.bin was cut or changed" in result.err


@pytest.mark.parametrize(
    "given, said",
    [
        (["eval", "--dynamic-lr", "1"], "--dynamic-lr 1 has an effect only with --dynamic."),
        (["eval", "--dynamic", "--dynamic-lr", "-1"], "--dynamic-lr -1: it must be a finite"),
        (
            ["eval", "accuracy", "--dynamic"],
            "--dynamic gives more figures, and accuracy",
        ),
        (
            ["eval", "-q", "--dynamic"],
            "--dynamic gives more figures, and --quiet prints one",
        ),
        (["eval", "--dynamic", "--protocol", "window"], "Remove --protocol window."),
        (["score", "story.txt", "--dynamic-lr", "1"], "has an effect only with --dynamic."),
    ],
)
def test_an_option_of_dynamic_without_effect_is_an_error(seqlm_command, run, given, said):
    result = seqlm_command(*given)
    assert result.code == 2 and said in result.err


def test_help_states_the_learning_rate(seqlm_command):
    assert f"Default: {dynamic.LR:.4f}" in seqlm_command("eval", "--help").out
