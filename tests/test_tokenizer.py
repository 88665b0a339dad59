import random

import numpy as np
import pytest

from seqlm.errors import InputError, UsageError
from seqlm.storage import to_json
from seqlm.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer, train_tokenizer

HARD = "plain\r\ntabs\t\x00NUL \ufeff é e\u0301 日本語 🙂👩‍👩‍👧 \u2581 \u2028 \x85 \U0010ffff\n"


def random_text(seed: int) -> str:
    draw = random.Random(seed)
    points = (draw.choice([draw.randrange(0x80), draw.randrange(0x110000)]) for _ in range(300))
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


@pytest.mark.parametrize("unit", ["char", "byte"])
@pytest.mark.parametrize("text", [HARD, *map(random_text, range(20))], ids=lambda t: f"{t[:5]!r}")
def test_decoding_gives_the_text_back(unit, text):
    tokenizer = train_tokenizer(unit, [text.encode("utf-8")])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode("utf-8")
    assert ids.max() < tokenizer.vocab_size
    piece = tokenizer.streamer()
    assert "".join(piece(int(i)) for i in ids) == text


def test_symbols_are_the_code_points_in_order():
    assert CharTokenizer.trained_on([b"banana", "é\n".encode()]).symbols == "\nabné"


def test_any_bytes_come_back_from_the_byte_tokenizer():
    data = bytes(range(256)) * 2
    assert ByteTokenizer().decode_bytes(ByteTokenizer().encode(data)) == data


def test_streamed_bytes_are_whole_characters_and_valid_utf8():
    piece = ByteTokenizer().streamer()
    pieces = [piece(byte) for byte in "a🙂é".encode() + b"\xff" + b"z"]
    assert pieces == ["a", "", "", "", "🙂", "", "é", "\ufffd", "z"]


def test_an_unknown_character_is_named_with_its_place():
    tokenizer = CharTokenizer("abc")
    with pytest.raises(InputError, match=r"'é' \(U\+00E9\) at position 2 is not in the vocabulary"):
        tokenizer.encode("abéc")
    with pytest.raises(InputError, match=r"'!' .* at position 0"):
        tokenizer.encode("!abc")


def test_unknown_characters_can_be_left_out_and_counted():
    assert CharTokenizer("abc").known_part("xaébc🙂".encode()) == (b"abc", 3)


def test_half_a_surrogate_pair_is_refused_with_its_place():
    for tokenizer in (CharTokenizer("abc"), ByteTokenizer()):
        with pytest.raises(InputError, match=r"U\+D83D at position 1 is half of a surrogate pair"):
            tokenizer.encode("a\ud83d")


def test_text_that_is_not_utf8_is_refused_with_the_offset():
    with pytest.raises(InputError, match="not UTF-8: byte 0xff at offset 1"):
        CharTokenizer("abc").encode(b"a\xffb")


@pytest.mark.parametrize("unit", ["char", "byte"])
def test_a_saved_tokenizer_is_the_same(tmp_path, unit):
    tokenizer = train_tokenizer(unit, [HARD.encode()])
    (tmp_path / "tokenizer.json").write_text(to_json(tokenizer.to_dict()), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert loaded.to_dict() == tokenizer.to_dict()
    assert np.array_equal(loaded.encode(HARD), tokenizer.encode(HARD))


@pytest.mark.parametrize(
    "saved",
    ["{}", '{"unit": "word"}', '{"unit": "char"}', '{"unit": "char", "symbols": "ba"}', "[", "[]"],
)
def test_a_damaged_tokenizer_is_an_input_error(tmp_path, saved):
    (tmp_path / "tokenizer.json").write_text(saved)
    with pytest.raises(InputError, match="damaged"):
        load_tokenizer(tmp_path)


def test_an_unknown_unit_is_refused():
    with pytest.raises(UsageError, match="Unknown unit 'chars'. Did you mean 'char'"):
        train_tokenizer("chars", [b"a"])
