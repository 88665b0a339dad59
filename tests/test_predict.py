"""The next character's probabilities, and a predictor that holds a state."""

import os

import numpy as np
import pytest
import torch

import seqlm
from seqlm.errors import InputError, SeqlmError, UsageError

TEXT = "the old king sees a d"


def test_the_probabilities_sum_to_1_and_are_those_of_score(run):
    scores = run.score(TEXT)
    predictor = run.predictor()
    symbols = predictor.symbols
    for character, p in zip(TEXT, scores.probability, strict=True):
        following = predictor.probabilities()
        assert following.sum() == pytest.approx(1, abs=1e-12)
        assert following[symbols.index(character)] == pytest.approx(p, rel=1e-4)
        predictor.feed(character)


def test_a_text_may_be_fed_in_any_parts(run):
    whole = run.predictor().feed(TEXT).probabilities()
    parts = run.predictor().feed(TEXT[:7]).feed("").feed(TEXT[7:8]).feed(TEXT[8:])
    assert np.allclose(parts.probabilities(), whole, rtol=1e-4)


def test_a_text_of_a_large_vocabulary_is_fed_in_smaller_pieces(run, monkeypatch):
    sizes = []
    predictor = run.predictor(rows=2)
    hook = predictor.model.register_forward_pre_hook(
        lambda _, inputs: sizes.append(tuple(inputs[0].shape))
    )
    monkeypatch.setattr("seqlm.model.LOGITS", 20 * predictor.model.vocab_size)
    predictor.feed(TEXT)
    hook.remove()
    assert sizes == [(2, 10), (2, 10), (2, 1)]


def test_a_copy_goes_on_by_itself(run):
    first = run.predictor().feed("the ")
    before = first.probabilities()
    second = first.copy().feed("cat")
    assert np.array_equal(first.probabilities(), before)
    assert np.allclose(
        second.probabilities(), run.predictor().feed("the cat").probabilities(), rtol=1e-4
    )


def test_a_model_that_is_not_finite_predicts_nothing(run):
    torch.nn.init.constant_(run.model.head.weight, float("nan"))
    with pytest.raises(SeqlmError, match="weights are not finite. Choose another step with --step"):
        run.predictor().feed("the").probabilities()


def test_rows_read_texts_side_by_side(run):
    both = run.predictor(rows=2).feed("the ").feed(["cat", "dog"])
    for row, text in zip(both.probabilities(), ("the cat", "the dog"), strict=True):
        assert np.allclose(row, run.predictor().feed(text).probabilities(), rtol=1e-4)
    swapped = both.take([1, 0, 1])
    assert np.array_equal(swapped.probabilities(), both.probabilities()[[1, 0, 1]])
    assert np.allclose(
        swapped.feed([".", ".", " "]).probabilities()[2],
        run.predictor().feed("the dog ").probabilities(),
        rtol=1e-4,
    )


def test_texts_that_do_not_fit_the_rows_are_an_error(run):
    with pytest.raises(InputError, match="The texts have 1, 2 symbols. Give 2 texts of equal"):
        run.predictor(rows=2).feed(["a", "do"])
    with pytest.raises(InputError, match="The texts have 1 symbols. Give 2 texts"):
        run.predictor(rows=2).feed(["a"])
    with pytest.raises(UsageError, match="at least 1 row, and rows is 0"):
        run.predictor(rows=0)
    with pytest.raises(InputError, match="is not in the vocabulary"):
        run.predictor().feed("€")


def test_the_end_of_a_document_is_a_symbol_too(seqlm_command, tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text("the cat " * (i + 1))
    seqlm_command("prepare", *(f"{i}.txt" for i in range(40)), "--documents", "files")
    small = dict(preset="tiny", width=8, layers=1, batch=4, length=16, steps=2)
    predictor = seqlm.train(**small).predictor()
    assert predictor.symbols[-1] == "" and len(predictor.symbols) == len(predictor.probabilities())


def test_a_row_begins_again_after_the_end_of_a_document(seqlm_command, text_file):
    seqlm_command("prepare", text_file, "--documents", "lines", "--out", "data/lines")
    run = seqlm.train("data/lines", preset="tiny", width=8, layers=1, batch=4, length=16, steps=2)
    expected = [run.predictor().feed(text).probabilities() for text in ("a dog", " sees")]
    both = run.predictor(rows=2).feed(["the cat\na dog", "a\na dog likes"])
    assert np.allclose(both.probabilities()[0], expected[0], rtol=1e-4)
    one = run.predictor()
    for character in "my friend\n sees":
        one.feed(character)
    assert np.allclose(one.probabilities(), expected[1], rtol=1e-4)


def test_predict_prints_the_ten_likeliest_symbols_and_json_has_all(seqlm_command, run):
    size, ten = run.tokenizer.vocab_size, seqlm_command("predict", "the ca")
    every = seqlm_command("predict", "the ca", "--top", "0")
    assert ten.out.splitlines() == every.out.splitlines()[:11]
    assert f"The 10 likeliest of {size} are shown. To show all: --top 0" in ten.err
    assert "are shown" not in every.err
    assert len(seqlm_command("predict", "the ca", "--json").json["next"]) == size


def test_predict_prints_every_symbol_the_likeliest_first(seqlm_command, run):
    result = seqlm_command("predict", "the ca", "--top", "0")
    rows = [line.split("\t") for line in result.out.splitlines()]
    assert rows[0] == ["next", "probability", "bits"]
    p = [float(row[1]) for row in rows[1:]]
    assert p == sorted(p, reverse=True) and sum(p) == pytest.approx(1, abs=1e-4)
    assert float(rows[1][2]) == pytest.approx(-np.log2(p[0]), abs=1e-3)
    assert len(rows) == 1 + run.tokenizer.vocab_size


def test_symbols_with_the_same_text_are_one_with_the_sum_of_their_probabilities(
    seqlm_command, text_file
):
    pieces = ["--unit", "sentencepiece", "--vocab-size", "300", "--out", "data/pieces"]
    seqlm_command("prepare", "story.txt", *pieces)
    small = dict(preset="tiny", width=8, layers=1, batch=4, length=16, steps=2)
    run = seqlm.train("data/pieces", **small)
    symbols, p = run.predictor().symbols, run.predictor().probabilities()
    found = {
        row["symbol"]: row["probability"] for row in seqlm_command("predict", "--json").json["next"]
    }
    assert len(found) == len({*symbols}) < len(symbols)
    assert sum(found.values()) == pytest.approx(1)
    assert found["a"] == pytest.approx(sum(x for s, x in zip(symbols, p, strict=True) if s == "a"))


def test_a_character_is_predicted_by_all_pieces_that_begin_with_it(seqlm_command, text_file):
    pieces = ["--unit", "sentencepiece", "--vocab-size", "320", "--out", "data/pieces"]
    seqlm_command("prepare", "story.txt", *pieces)
    run = seqlm.train("data/pieces", preset="tiny", width=8, layers=1, batch=4, length=16, steps=2)
    symbols, p = run.predictor().symbols, run.predictor().probabilities()
    long = next(symbol for symbol in symbols if len(symbol) > 1 and symbol[0] != "\\")
    first, other = long[0], "e" if long[0] != "e" else "a"
    a, b = (sum(p[i] for i, text in enumerate(symbols) if text[:1] == c) for c in (first, other))
    chosen = seqlm_command("predict", "--symbols", first + other, "--json").json["next"]
    assert {row["symbol"]: row["probability"] for row in chosen} == {
        first: pytest.approx(a / (a + b)),
        other: pytest.approx(b / (a + b)),
    }


def test_symbols_restrict_the_choice_and_renormalise(seqlm_command, run):
    everything = seqlm_command("predict", "the ca", "--json").json["next"]
    p = {row["symbol"]: row["probability"] for row in everything}
    chosen = seqlm_command("predict", "the ca", "--symbols", "tsx"[:2], "--json").json["next"]
    assert {row["symbol"] for row in chosen} == {"t", "s"}
    assert sum(row["probability"] for row in chosen) == pytest.approx(1, abs=1e-12)
    ratio = chosen[0]["probability"] / chosen[1]["probability"]
    assert ratio == pytest.approx(p[chosen[0]["symbol"]] / p[chosen[1]["symbol"]])


def test_the_only_choice_takes_no_bits(seqlm_command, run):
    rows = seqlm_command("predict", "the ca", "--symbols", "t").out.splitlines()
    assert rows[1].split("\t") == ["'t'", "1.000000", "0.000"]


def test_top_nats_quiet_and_standard_input(seqlm_command, run, monkeypatch):
    nats = seqlm_command("predict", "the", "--nats", "--top", "1").out.splitlines()
    bits = seqlm_command("predict", "the", "--top", "1").out.splitlines()
    assert len(nats) == 2 and nats[0].endswith("nats")
    share = float(nats[1].split("\t")[2]) / float(bits[1].split("\t")[2])
    assert share == pytest.approx(np.log(2), abs=1e-2)
    best = seqlm_command("predict", "the", "--json").json["next"][0]["symbol"]
    assert seqlm_command("predict", "the", "-q").out == f"{best}\n"


def test_only_the_last_document_of_the_text_is_read(seqlm_command, tmp_path):
    lines = "\n".join(f"line {i} of the cat" for i in range(300))
    (tmp_path / "lines.txt").write_text(lines)
    seqlm_command("prepare", "lines.txt", "--documents", "lines")
    seqlm.train(preset="tiny", width=8, layers=1, batch=4, length=32, steps=2)
    one = seqlm_command("predict", "line 1\nli", "--json").json["next"]
    assert one == seqlm_command("predict", "li", "--json").json["next"]


@pytest.mark.parametrize(
    "given, code, said",
    [
        (
            ["the", "--symbols", "t€"],
            3,
            "--symbols: no symbol of the run's vocabulary begins with '€'.",
        ),
        (["the", "--symbols", ""], 2, "--symbols is empty."),
        (["the", "--top", "-1"], 2, "--top -1: it must be at least 1, or 0 for all."),
        ([os.fsdecode(b"th\xff")], 3, "The text is not UTF-8: byte 0xff at offset 2."),
        (["th€"], 3, "Character '€' (U+20AC) at position 2 is not in the vocabulary"),
    ],
)
def test_predict_says_what_is_wrong(seqlm_command, run, given, code, said):
    result = seqlm_command("predict", *given)
    assert result.code == code and said in result.err
    assert "--on-unknown" not in result.err  # an option that predict does not have
