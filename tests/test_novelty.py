"""How much of a text stands in the training text, against a brute force."""

import random
from pathlib import Path

import pytest

import seqlm
from seqlm.evaluation import novelty
from seqlm.evaluation.novelty import matches
from seqlm.text.corpus import open_corpus
from seqlm.text.prepare import prepare

SMALL = dict(preset="tiny", width=8, layers=1, batch=4, length=16, steps=2)


def strings(words: random.Random, alphabet: str, count: int, size: int) -> list[str]:
    return ["".join(words.choices(alphabet, k=words.randrange(size))) for _ in range(count)]


@pytest.mark.parametrize("alphabet", ["a", "ab", "abcd", "aé日😀"])
def test_the_matches_are_those_of_a_brute_force(alphabet):
    """The source comes in pieces, and a match may reach over their borders."""
    words = random.Random(0)
    for _ in range(200):
        texts, source = strings(words, alphabet, 3, 20), strings(words, alphabet, 3, 15)
        whole = "".join(source)
        expected = [
            [max(n for n in range(i + 1) if t[i - n : i] in whole) for i in range(1, len(t) + 1)]
            for t in texts
        ]
        assert matches(texts, source) == expected


def test_the_automaton_has_at_most_two_states_for_each_symbol():
    for text in ("a" * 500, "ab" * 250, "".join(random.Random(1).choices("ab", k=500))):
        assert len(novelty._Automaton(text).sizes) <= 2 * len(text)


def brute(texts: list[str], train: str) -> dict:
    """The figures of a text, by searching for every part of it."""
    parts = {t[i:j] for t in texts for i in range(len(t)) for j in range(i + 1, len(t) + 1)}
    new = {}
    for n in novelty.SIZES:
        grams = [t[i : i + n] for t in texts for i in range(len(t) - n + 1)]
        new[str(n)] = sum(gram not in train for gram in grams) / len(grams) if grams else None
    return {
        "chars": sum(map(len, texts)),
        "longest_chars": max((len(part) for part in parts if part in train), default=0),
        "new": new,
    }


def splits_of(corpus) -> dict[str, str]:
    return {name: corpus.tokenizer.decode(corpus.symbols(name)) for name in ("train", "val")}


@pytest.mark.parametrize("unit", ["char", "byte"])
def test_the_figures_are_those_of_a_brute_force(text_file, unit):
    corpus = open_corpus(prepare([str(text_file)], unit=unit)[0])
    splits = splits_of(corpus)
    for texts in (["the cat sees a dog.\nthe old", "king"], ["the old king likes\n"], [""]):
        found = {name: one.to_dict() for name, one in novelty.of_texts(texts, corpus).items()}
        held_out = splits["val"][: sum(map(len, texts))]
        for name, given in (("text", texts), ("held_out", [held_out])):
            expected = brute(given, splits["train"])
            longest, new = found[name].pop("longest"), found[name].pop("new")
            assert new == pytest.approx(expected.pop("new")) and found[name] == expected
            assert len(longest) == expected["longest_chars"] and longest in splits["train"]


def test_the_training_text_itself_is_not_new(corpus):
    train = splits_of(open_corpus(corpus))["train"]
    found = novelty.of_texts([train[100:200]], open_corpus(corpus))["text"]
    assert found.longest == train[100:200] and set(found.new.values()) == {0.0}


def test_only_the_first_characters_of_a_long_text_are_searched_for(corpus, monkeypatch):
    monkeypatch.setattr(novelty, "MOST", 30)
    found = novelty.of_texts(["the cat " * 3, "a dog " * 9], open_corpus(corpus))
    assert found["text"].chars == found["held_out"].chars == 30


def test_lines_that_are_documents_are_one_text_as_in_the_corpus(text_file):
    corpus = open_corpus(prepare([str(text_file)], documents="lines")[0])
    lines = splits_of(corpus)["train"].splitlines()[:2]
    found = novelty.of_texts(lines, corpus)["text"]
    assert found.longest == "".join(f"{line}\n" for line in lines)


# The commands


def test_eval_novelty_tells_of_a_generated_text_or_of_a_given_one(seqlm_command, run, monkeypatch):
    monkeypatch.setattr("seqlm.run.SAMPLE", 300)
    found = seqlm_command("eval", "--novelty", "--json").json["novelty"]
    generated = run.novelty([run.generate(chars=300, seed=0)])
    assert found == {name: one.to_dict() for name, one in generated.items()}
    Path("a.txt").write_text("the cat sees a xylophone\n", encoding="utf-8")
    given = ("eval", "--text", "a.txt", "--on-unknown", "skip", "--novelty")
    assert seqlm_command(*given, "--json").json["novelty"]["text"]["longest"] == "the cat sees a "
    table = seqlm_command(*given).out
    assert "novelty\ttext\tval split\ncharacters\t25\t25\nlongest part from train\t15\t" in table


def test_generate_novelty_tells_of_the_texts_beside_them(seqlm_command, run):
    given = ("generate", "--chars", 60, "--samples", 2, "--seed", 3, "--novelty")
    shown = seqlm_command(*given)
    plain = seqlm_command(*given[:-1])
    assert shown.out == plain.out and "longest part from train" in shown.err
    found = seqlm_command(*given, "--json").json
    assert found["novelty"]["text"]["chars"] == 120
    expected = run.novelty(found["texts"])["text"].to_dict()
    assert found["novelty"]["text"] == expected


def test_a_run_on_documents_generates_as_many_as_it_needs(text_file, monkeypatch):
    monkeypatch.setattr("seqlm.run.SAMPLE", 100)
    run = seqlm.train(prepare([str(text_file)], documents="lines")[0], **SMALL)
    assert run.novelty()["text"].chars >= 100


@pytest.mark.parametrize(
    "given, said",
    [
        (["eval", "accuracy", "--novelty"], "--novelty gives more figures, and accuracy"),
        (["generate", "-q", "--novelty"], "--novelty prints beside the text, and --quiet hides"),
    ],
)
def test_novelty_that_cannot_be_shown_is_an_error(seqlm_command, run, given, said):
    result = seqlm_command(*given)
    assert result.code == 2 and said in result.err


def test_novelty_needs_the_corpus_before_anything_is_generated(seqlm_command, run):
    Path("data/story").rename("elsewhere")
    result = seqlm_command("generate", "--novelty")
    assert result.code == 3 and result.out == "" and "data/story" in result.err
