"""Texts that ask what a cell can remember, and the answers that alone are learned and counted."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from seqlm.errors import InputError, UsageError
from seqlm.evaluation import evaluate
from seqlm.evaluation.passage import passage_of_split, passage_of_text
from seqlm.model import LanguageModel
from seqlm.text.corpus import open_corpus
from seqlm.text.prepare import prepare
from seqlm.text.synthetic import DIAGNOSTICS
from seqlm.text.tokenizer import CharTokenizer
from seqlm.training import launch
from seqlm.training.batches import IGNORED

SMALL = {
    "selective-copying": "length=20,symbols=5",
    "copy-first": "distance=7",
    "brackets": "depth=3,length=9",
}
PAIRS = dict(zip("([{<", ")]}>", strict=True))


def lines(name: str, options: str, split: str = "train", documents: int = 200) -> list[list[str]]:
    """[question, answer] of every document."""
    diagnostic = DIAGNOSTICS[name]
    chosen = diagnostic.options(f"{options},documents={documents}")
    text = b"".join(diagnostic.texts(chosen, split)).decode()
    assert text.endswith("\n")
    return [line.split("=") for line in text.splitlines()]


def test_selective_copying_asks_for_the_letters_in_their_order():
    for question, answer in lines("selective-copying", "length=20,symbols=5"):
        assert (len(question), len(answer)) == (20, 5)
        assert question.replace(".", "") == answer


def test_the_letters_of_selective_copying_stand_anywhere():
    found = [question for question, _ in lines("selective-copying", "length=6,symbols=2")]
    assert {tuple(i for i in range(6) if q[i] != ".") for q in found} == {
        (i, j) for i in range(6) for j in range(i + 1, 6)
    }


def test_copy_first_asks_for_the_first_letter_from_behind_so_many_others():
    for question, answer in lines("copy-first", "distance=7"):
        assert len(question) == 8 and answer == question[0]


def test_brackets_ask_for_what_closes_them():
    for question, answer in lines("brackets", "depth=3,length=9"):
        open_ones, deepest = [], 0
        for bracket in question:
            if bracket in PAIRS:
                open_ones.append(PAIRS[bracket])
            else:
                assert open_ones.pop() == bracket
            deepest = max(deepest, len(open_ones))
        assert (len(question), deepest) == (9, 3)
        assert answer == "".join(reversed(open_ones)) and len(answer) == 3


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_a_text_is_a_function_of_its_options_and_its_splits_are_different(name):
    assert lines(name, SMALL[name]) == lines(name, SMALL[name])
    assert lines(name, SMALL[name])[:100] == lines(name, SMALL[name], documents=100)
    assert lines(name, SMALL[name]) != lines(name, SMALL[name], "val")[:200]
    assert len(lines(name, SMALL[name], "test")) == 1000


@pytest.mark.parametrize(
    "source, words",
    [
        ("brackets:dept=3", "Unknown option of brackets 'dept'. Did you mean 'depth'?"),
        ("copy-first:distance=far", "copy-first:distance=far: give a whole number from 1 on"),
        ("copy-first:distance=0", "give a whole number from 1 on, distance=N"),
        ("brackets:depth=3,length=8", "Give a length that is the depth and an even number more"),
        ("brackets:depth=9,length=7", "of 7 brackets 9 cannot stay open"),
        ("selective-copying:length=4,symbols=5", "5 symbols do not fit into length 4"),
        ("copy-first:distance=2000000", "a line has at most 1,048,576 characters"),
    ],
)
def test_an_option_that_cannot_be_is_refused(source, words, tmp_path):
    with pytest.raises(UsageError) as refused:
        prepare([source])
    assert words in str(refused.value)
    assert not [*(tmp_path / "data").glob("*")]


def test_a_diagnostic_has_a_form_of_its_own():
    for option in ({"split": "90,10"}, {"documents": "files"}, {"answers": ">"}, {"unit": "byte"}):
        with pytest.raises(UsageError, match="brackets.* is a fixed corpus .* Remove --"):
            prepare(["brackets:documents=10"], **option)


def test_what_is_prepared_says_what_it_is():
    folder, manifest, _ = prepare(["copy-first:distance=4,documents=50"])
    assert folder.name == "copy-first-distance=4-documents=50"
    assert manifest["label"] == "copy-first:distance=4,documents=50"
    counts = {split: counts["documents"] for split, counts in manifest["splits"].items()}
    assert counts == {"train": 50, "val": 1000, "test": 1000}


# Answers in a text of one's own


@pytest.fixture
def sums(tmp_path):
    """data/sums: 400 additions, of which only what stands behind the equals sign counts."""
    pairs = [(i, j) for i in range(20) for j in range(20)]
    (tmp_path / "sums.txt").write_text("".join(f"{i}+{j}={i + j}\n" for i, j in pairs))
    return prepare(["sums.txt"], answers="=")[0]


def test_only_answers_and_the_ends_of_lines_are_learned(sums):
    given = {"model.width": 8, "train.batch": 4, "train.length": 32, "train.steps": 2}
    trainer = launch.start(str(sums), preset="tiny", settings=given).trainer
    decode = trainer.corpus.tokenizer.decode
    for step in range(5):
        for rows in trainer.batches.at(step):
            for x, y, size in zip(rows.inputs, rows.targets, rows.sizes, strict=True):
                if size:
                    question, answer = decode(x[1:size]).split("=")
                    assert sum(map(int, question.split("+"))) == int(answer)
                    assert decode(y[y != IGNORED]) == f"{answer}\n"


def test_what_was_read_is_counted_and_not_only_what_was_learned(sums):
    given = {"model.width": 8, "train.batch": 4, "train.length": 32, "train.steps": 2}
    given |= {"train.state": "carry"}
    setup = launch.start(str(sums), preset="tiny", settings=given)
    *_, report = setup.reports()
    read = sum(int(rows.sizes.sum()) for step in (0, 1) for rows in setup.trainer.batches.at(step))
    assert report.chars == read > 2 * 100


def test_accuracy_is_the_share_of_answered_symbols_that_were_the_likeliest(sums):
    corpus = open_corpus(sums)
    passage = passage_of_split(corpus, "val", corpus.tokenizer)
    model = LanguageModel(corpus.tokenizer.vocab_size, width=8, layers=1).eval()
    score = evaluate.score(model, corpus.tokenizer, passage)
    right, count, nats = 0, 0, 0.0
    text = corpus.tokenizer.decode(passage.symbols)
    for line in text.splitlines():
        ids = torch.from_numpy(corpus.tokenizer.encode(line + "\n"))
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor([model.beginning]), ids])[None])[0][0]
        for place in range(line.index("=") + 1, len(line)):
            right += int(logits[place].argmax() == ids[place])
            nats -= float(torch.log_softmax(logits[place].double(), 0)[ids[place]])
            count += 1
    assert (score.tokens, score.chars, score.bytes) == (count, count, count)
    assert score.correct == right and score.nats == pytest.approx(nats, rel=1e-6)
    assert score.accuracy == right / count
    assert score.bits_per_char == pytest.approx(nats / math.log(2) / count, rel=1e-6)


def test_accuracy_of_a_text_is_that_of_its_next_symbols():
    model = LanguageModel(3, width=4, layers=1).eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, 2.0, 1.0]))
    symbols = np.array([1, 1, 0, 2, 1, 0, 1, 1], np.uint8)
    tokenizer = CharTokenizer("abc")
    passage = passage_of_text([tokenizer.decode_bytes(symbols)], tokenizer)
    assert evaluate.score(model, tokenizer, passage).accuracy == 5 / 8
    assert evaluate.score(model, tokenizer, passage, "window", 3).accuracy == 4 / 7
    assert evaluate.validate(model, passage).accuracy == 5 / 8


def test_eval_prints_the_accuracy_of_the_answers(sums, seqlm_command):
    small = ["--width", 8, "--batch", 4, "--length", 32, "--steps", 2]
    trained = seqlm_command("train", "--data", "sums", "--preset", "tiny", *small)
    assert trained.code == 0 and "answers, " in trained.err and "% right" in trained.err
    found = seqlm_command("eval", "--json").json
    assert found["protocol"] == "answers" and found["chars"] == found["tokens"]
    assert 0 <= found["accuracy"] <= 1
    assert seqlm_command("eval", "accuracy").out == f"{found['accuracy']:.6f}\n"
    assert "FAIL" not in seqlm_command("check").out.upper()
    own = seqlm_command("eval", "accuracy", "--text", "sums.txt")
    assert own.code == 0 and 0 <= float(own.out) <= 1
    lines = Path("checkpoints/sums-mingru/metrics.jsonl").read_text().splitlines()
    assert 0 <= json.loads(lines[-1])["val_accuracy"] <= 1


def test_a_line_without_an_answer_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text("1+1=2\n" * 50 + "1+2=\n" + "2+2=4\n" * 50)
    with pytest.raises(InputError, match=r"The line '1\+2=.n' has no answer behind a '='"):
        prepare(["t.txt"], answers="=")
    with pytest.raises(InputError, match="No line has an answer after a '>'"):
        prepare(["t.txt"], answers=">")
    with pytest.raises(UsageError, match="--answers '=>': give one character"):
        prepare(["t.txt"], answers="=>")
    with pytest.raises(UsageError, match="characters at the ends of lines"):
        prepare(["t.txt"], answers="=", documents="files")
    with pytest.raises(UsageError, match="--answers '': give one character"):
        prepare(["t.txt"], answers="")
    with pytest.raises(UsageError, match="stdlib-.* is a fixed corpus .* Remove --answers"):
        prepare(["stdlib"], answers="=")


def test_the_end_of_a_line_from_windows_is_no_part_of_an_answer(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"".join(b"%d+1=%d\r\n" % (i, i + 1) for i in range(50)))
    with pytest.raises(InputError, match="Lines end with a carriage return, which would become"):
        prepare(["t.txt"], answers="=")


def test_lines_longer_than_a_sequence_are_refused_where_answers_are_learned(sums):
    given = {"model.width": 8, "train.batch": 4, "train.steps": 2}
    with pytest.raises(UsageError, match="has 9 characters, and --length is 8.* Give --length 9"):
        launch.start(str(sums), preset="tiny", settings={**given, "train.length": 8})
    assert launch.start(str(sums), preset="tiny", settings={**given, "train.length": 9}).trainer


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_the_made_texts_can_be_learned_as_they_come(name):
    """Sequences become longer and fewer, until the longest line fits."""
    folder = prepare([f"{name}:documents=300"])[0]
    setup = launch.start(str(folder), settings={"model.width": 8, "model.layers": 1})
    train = setup.config.train
    assert train.batch * train.length == 64 * 64
    assert any(f"{train.batch} sequences of {train.length}" in note for note in setup.notes)
    parts = {"model.width": 8, "model.layers": 1, "train.accumulate": 64}
    with pytest.raises(UsageError, match="characters, and --length is 64"):
        launch.start(str(folder), settings=parts)


@pytest.mark.parametrize("mark", ["", "==", "x", 3])
def test_a_tokenizer_whose_mark_was_damaged_is_refused(sums, mark):
    from seqlm.text.tokenizer import load_tokenizer

    saved = json.loads((sums / "tokenizer.json").read_text())
    (sums / "tokenizer.json").write_text(json.dumps({**saved, "mark": mark}))
    if mark == "":
        assert load_tokenizer(sums).mark == ""
        return
    with pytest.raises(InputError, match="is damaged"):
        load_tokenizer(sums)
