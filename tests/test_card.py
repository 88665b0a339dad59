"""The data card: counts, entropy, repeats, mojibake and xz, by a plain count of the same text."""

import lzma
import math
import random
from collections import Counter
from pathlib import Path

import pytest
from conftest import SHAKESPEARE, needs_shakespeare, sentences

from seqlm.text import card as module
from seqlm.text.card import Repeats, measure, xz
from seqlm.text.staging import Draft


@pytest.fixture
def card_of(tmp_path):
    def card(text: str | bytes, **options):
        draft = Draft(tmp_path / "draft")
        draft.append(text.encode() if isinstance(text, str) else text)
        measured = measure(draft, lambda share, word: None, **options)
        figures = measured.to_dict(xz(draft.path))
        draft.close()
        return figures

    return card


def test_characters_bytes_lines_and_alphabet_are_counted(card_of, monkeypatch):
    monkeypatch.setattr("seqlm.text.staging.BYTES_AT_ONCE", 16)
    figures = card_of("aé日\n🙂b\nlast")
    assert (figures["chars"], figures["bytes"], figures["lines"]) == (11, 17, 3)
    assert figures["alphabet"] == len(set("aé日\n🙂blst"))
    assert card_of("one line\n")["lines"] == 1


def test_the_unigram_entropy_is_that_of_the_characters(card_of):
    text = sentences(5000) + "日本語"
    shares = [count / len(text) for count in Counter(text).values()]
    entropy = -sum(p * math.log2(p) for p in shares)
    assert card_of(text)["unigram_bits_per_char"] == pytest.approx(entropy, abs=1e-6)


def test_the_rarest_characters_come_with_their_counts(card_of):
    assert card_of("aaab🙂🙂")["rarest"] == [["b", 1], ["🙂", 2], ["a", 3]]


def test_what_is_not_text_is_counted_in_bytes(card_of):
    figures = card_of(b"\xff\xff\x00" * 10)
    assert figures["chars"] is None and figures["rarest"] == [["0x00", 10], ["0xff", 20]]
    assert figures["unigram_bits_per_char"] == pytest.approx(0.918296, abs=1e-6)
    assert card_of("é", as_text=False)["alphabet"] == 2, "as is what the literature counts so"


@pytest.mark.parametrize(
    "text", ["Ã©", "donâ€™t", "Ð–Ð¸", "Ã¼ber", "ä\x80", "\ufffd", "å\x9b\xbd", "â€œyesâ€\x9d"]
)
def test_text_read_in_a_wrong_encoding_is_suspected(card_of, text):
    assert card_of(f"It says {text} here.")["suspected_mojibake"] > 0


@pytest.mark.parametrize(
    "text",
    [
        *("naïve café", "ÜBER ÄRGER", "Жизнь", "日本語", "þú ert"),
        *("não há ações Ã", "“quoted” – it’s €5"),
    ],
)
def test_good_text_is_not_suspected(card_of, text):
    assert card_of(text)["suspected_mojibake"] == 0


def test_repeated_lines_are_a_share_of_the_bytes(card_of):
    assert card_of("abcd\nabcd\nxy\nzz\n")["duplicate_share"] == pytest.approx(4 / 12)
    assert card_of("a\nb\nc\n")["duplicate_share"] == 0


@pytest.mark.parametrize("kept", [1 << 18, 256])
def test_repeats_are_found_across_chunks_and_in_constant_memory(monkeypatch, kept):
    monkeypatch.setattr(module, "LINES_KEPT", kept)
    draw = random.Random(0)
    lines = [b"line %d" % draw.randrange(3000) for _ in range(6000)]
    data = b"\n".join(lines) + b"\n"
    repeats = Repeats()
    for start in range(0, len(data), 1000):
        repeats.read(data[start : start + 1000])
    again = sum(map(len, lines)) - sum(map(len, set(lines)))
    tolerance = 1e-9 if kept > 3000 else 0.05
    assert repeats.share == pytest.approx(again / sum(map(len, lines)), abs=tolerance)
    assert len(repeats._sizes) <= kept


def test_xz_is_what_xz_makes_of_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "XZ_BYTES", 5000)
    path = Path(tmp_path / "t")
    path.write_text(sentences(9000))
    found = xz(path)
    assert (found.bytes, found.chars) == (5000, 5000)
    assert found.packed == len(lzma.compress(sentences(5000).encode(), preset=9))


@needs_shakespeare
def test_the_card_of_tiny_shakespeare(card_of):
    text = SHAKESPEARE.read_text()
    figures = card_of(text)
    shares = [count / len(text) for count in Counter(text).values()]
    assert figures["alphabet"] == 65 and figures["rarest"][0] == ["$", 1]
    entropy = -sum(p * math.log2(p) for p in shares)
    assert figures["unigram_bits_per_char"] == pytest.approx(entropy, abs=1e-6)
    assert 2.5 < figures["xz_bits_per_char"] < 3.2
