"""generate --regex: every text matches, as a whole, and what cannot match is an error at once."""

import itertools
import random
import re

import numpy as np
import pytest

import seqlm
from seqlm.errors import InputError, UsageError
from seqlm.generation import automaton, pattern
from seqlm.generation.generate import generate
from seqlm.generation.pattern import Match, Pattern
from seqlm.model import LanguageModel
from seqlm.text.tokenizer import ByteTokenizer, CharTokenizer

SMALL = dict(preset="tiny", width=8, layers=1, batch=4, length=16, steps=2)


def any_regex(depth: int, choose: random.Random) -> str:
    kind = choose.randrange(6) if depth else 0
    parts = [any_regex(depth - 1, choose) for _ in range(2)] if kind else []
    if kind == 0:
        return choose.choice(["a", "b", "\u00e9", ".", "[ab]", "[^a]", "\\w"])
    if kind == 1:
        return f"({parts[0]}|{parts[1]})"
    if kind == 2:
        return f"({parts[0]}){choose.choice(['*', '?', '+', '{2}', '{0,2}', '*?', '??'])}"
    return "".join(parts)


def test_the_automaton_accepts_what_pythons_re_matches():
    """Every text of up to 5 characters, for 40 regexes: also those that go on after a match."""
    choose = random.Random(1)
    texts = ["".join(t) for n in range(6) for t in itertools.product("ab\u00e9", repeat=n)]
    for _ in range(40):
        regex = any_regex(3, choose)
        table = automaton.table(regex)
        for text in texts:
            state = 0
            for byte in text.encode("utf-8"):
                state = table[state, byte] if state >= 0 else -1
            accepted = state >= 0 and table[state, automaton.BYTES] == 1
            assert accepted == bool(re.fullmatch(regex, text)), (regex, text)


def made(regex: str, texts: list[str], banned: str = "") -> Pattern:
    refused = np.array([text in banned for text in texts] + [False])
    return Pattern(regex, [t.encode() for t in texts], len(texts), refused)


def test_symbols_that_lead_nowhere_are_not_allowed():
    """x lacks a way to its end, and with 2 characters left only the short way is open."""
    found = made("a(x\u20ac|bb)?|b", ["a", "b", "x"])
    assert Match(found, 9).allowed().tolist() == [True, True, False, False]
    match = Match(found, 9)
    match.take(0)
    assert match.allowed().tolist() == [False, True, False, True], "or the document ends"
    match = Match(found, 2)
    match.take(0)
    assert match.allowed().tolist() == [False, False, False, True]
    assert found.shortest == 1
    assert made("a(x\u20ac|bb)?|b", ["a", "b", "x"], banned="b").shortest == 1
    with pytest.raises(InputError, match="no text of the symbols that are allowed matches"):
        made("b+", ["a", "b", "x"], banned="b")


@pytest.mark.parametrize("regex", ["[a-z]{2,7} \u20ac+", "[0-9]+(\\.[0-9]+)?", "(x|yz)*", "^ab$"])
@pytest.mark.parametrize("chars", [7, 30])
def test_every_text_of_a_model_of_bytes_matches(regex, chars):
    model = LanguageModel(256, width=8, layers=1).eval()
    for number in range(5):
        options = dict(regex=regex, chars=chars, numbers=[number])
        written = "".join(generate(model, ByteTokenizer(), **options))
        assert re.fullmatch(regex, written) and len(written) <= chars


def test_pieces_of_several_characters_match_too(seqlm_command, text_file):
    prepared = seqlm_command("prepare", "story.txt", "--unit", "sentencepiece", "--vocab-size", 300)
    assert prepared.code == 0
    run = seqlm.train(**SMALL)
    assert max(map(len, run.tokenizer.texts)) > 2
    regex = "the (old king|cat|\u00e9t\u00e9) [a-z ]{3,9}\\."
    texts = dict.fromkeys(range(20), "")
    for number, piece, _ in run.samples(count=20, chars=30, regex=regex):
        texts[number] += piece
    assert all(re.fullmatch(regex, text) for text in texts.values())


def test_a_document_ends_in_a_match_and_only_there(seqlm_command, tmp_path):
    lines = [f"{word}{n}" for n in range(30) for word in ("ab", "ba", "abba")]
    (tmp_path / "words.txt").write_text("\n".join(lines))
    seqlm_command("prepare", "words.txt", "--documents", "lines")
    run = seqlm.train(**SMALL)
    found = [*run.items(20, regex="[ab]+7", new=False, unique=False)]
    assert all(re.fullmatch("[ab]+7", text) for text in found)
    assert len({len(text) for text in found}) > 2


@pytest.mark.parametrize(
    "given, code, said",
    [
        (["--regex", "(a"], 2, "--regex (a: missing ), unterminated subpattern at position 0."),
        (["--regex", "\\p{Foo}"], 2, "--regex \\p{Foo}: Failed to build DFA"),
        (["--regex", "a)|(?:b"], 2, "--regex a)|(?:b: unbalanced parenthesis at position 1."),
        (["--regex", "(?=a)b"], 2, "It takes the syntax of Rust's regex, without look-around"),
        (["--regex", "\u20ac+"], 3, "no text of the symbols that are allowed matches."),
        (["--regex", "a+", "--ban", "a"], 3, "no text of the symbols that are allowed matches."),
        (["--regex", "a{9}", "--chars", "8"], 2, "its shortest text has 9 characters, and --chars"),
        (["--regex", "a", "--stop", "b"], 2, "--stop would cut a text that --regex has completed."),
        (["--regex", ""], 2, "--regex is empty."),
    ],
)
def test_what_cannot_match_is_an_error_before_anything_is_generated(
    seqlm_command, run, given, code, said
):
    result = seqlm_command("generate", *given)
    assert result.code == code and said in result.err and result.out == ""


def test_a_text_ends_where_no_symbol_goes_on(seqlm_command, run):
    result = seqlm_command("generate", "the ", "--regex", "cat|dog", "--seed", "1", "-q")
    assert result.out in ("the cat", "the dog")
    assert seqlm_command("generate", "--regex", "\u20ac?", "-q").out == "", "the empty text"
    both = seqlm_command("generate", "--regex", "[a-z]+", "--ban", "e", "--chars", "30", "-q").out
    assert re.fullmatch("[a-df-z]{30}", both), "it goes on to --chars"


def test_a_regex_that_is_too_large_is_an_error(monkeypatch):
    monkeypatch.setattr(pattern, "LARGEST_TABLE", 100)
    with pytest.raises(UsageError, match="has more than 14 states, the most for 7 symbols"):
        Pattern("a{50}", CharTokenizer("abcdefg").texts, None, np.zeros(7, dtype=bool))
    monkeypatch.setattr(pattern, "SECONDS", 0.001)
    with pytest.raises(UsageError, match="its automaton was not complete after 0 s"):
        made("a{51}", ["a"])


def test_a_missing_library_is_named(seqlm_command, run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "outlines_core", None)
    result = seqlm_command("generate", "--regex", "a")
    assert result.code == 1 and "pip install -e '.[regex]'" in result.err
