import random
import unicodedata

import numpy as np
import pytest
from conftest import sentences

from seqlm.errors import InputError
from seqlm.files import to_json
from seqlm.text.tokenizer import (
    LONGEST_SENTENCE,
    SMALLEST_VOCABULARY,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)

HARD = "plain\r\ntabs\t\x00NUL \ufeff é e\u0301 日本語 🙂👩‍👩‍👧 \u2581 \u2028 \x85 \U0010ffff\n"
SPACES = "  two  three   \u2581\u2581 \u3000\u00a0\u202f \t \n\n \r \r\n  \u2581\n"
LITERALS = "<s></s><unk><pad><0x41><0x0A>▁<unk>▁</s>"
NEWLINES = "a\nb\rc\r\nd\x0be\x0cf\x1cg\x1dh\x1ei\x85j\u2028k\u2029l\n\n\n"


def random_text(seed: int) -> str:
    draw = random.Random(seed)
    points = (draw.choice([draw.randrange(0x80), draw.randrange(0x110000)]) for _ in range(300))
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


TEXTS = [HARD, SPACES, LITERALS, NEWLINES, "", "\n", "\u2581", *map(random_text, range(20))]


def trained(text: str, model_type: str = "unigram", size: int = 400) -> SentencePieceTokenizer:
    points, counts = np.unique([ord(c) for c in text], return_counts=True)
    alphabet = points[np.argsort(-counts, kind="stable")]
    return SentencePieceTokenizer(train_sentencepiece([text.encode()], alphabet, size, model_type))


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def pieces(request) -> SentencePieceTokenizer:
    return trained(sentences(20_000) + HARD, request.param)


def tokenizer_for(unit: str, text: str, pieces: Tokenizer) -> Tokenizer:
    if unit == "char":
        return CharTokenizer("".join(sorted(set(text) | {"\n"})))
    return ByteTokenizer() if unit == "byte" else pieces


@pytest.mark.parametrize("unit", ["char", "byte", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS, ids=lambda t: f"{t[:5]!r}")
def test_decoding_gives_the_text_back(unit, text, pieces):
    tokenizer = tokenizer_for(unit, text, pieces)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode("utf-8")
    assert np.array_equal(tokenizer.encode(text.encode("utf-8")), ids) and ids.dtype == np.int64
    assert not len(ids) or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
    piece = tokenizer.streamer()
    assert "".join(piece(int(i)) for i in ids) == text


def test_every_code_point_there_is_comes_back_from_pieces(pieces):
    every = [chr(p) for p in range(0x110000) if not 0xD800 <= p < 0xE000]
    for start in range(0, len(every), 100_000):
        text = " ".join(every[start : start + 100_000])
        assert pieces.decode(pieces.encode(text)) == text


def test_pieces_do_not_normalise(pieces):
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        text = unicodedata.normalize(form, "Å ﬁ ① e\u0301 가 ｶﾞ ½\u00a0\u2003x")
        assert pieces.decode(pieces.encode(text)) == text


def test_a_line_longer_than_sentencepiece_takes_comes_back(pieces):
    text = (
        "x" * (3 * LONGEST_SENTENCE + 7)
        + " " * (LONGEST_SENTENCE + 1)
        + "\n"
        + "é" * LONGEST_SENTENCE
    )
    assert pieces.decode(pieces.encode(text)) == text


def test_pieces_are_shorter_than_characters_and_bytes_come_first(pieces):
    text = sentences(2000)
    assert len(pieces.encode(text)) < 0.75 * len(text)
    assert pieces.decode_bytes(np.arange(256)) == bytes(range(256))
    assert 256 < pieces.vocab_size <= 400


def test_a_newline_is_always_a_symbol_of_its_own(pieces):
    ids = pieces.encode(sentences(2000))
    assert pieces.decode(ids[ids == pieces.newline]) == "\n" * sentences(2000).count("\n")
    others = np.setdiff1d(np.arange(pieces.vocab_size), [pieces.newline])
    assert b"\n" not in pieces.decode_bytes(others)


def test_an_alphabet_larger_than_the_vocabulary_is_written_in_bytes():
    text = "".join(chr(0x4E00 + i % 3000) for i in range(30_000))
    tokenizer = trained(text, size=SMALLEST_VOCABULARY)
    assert (
        tokenizer.vocab_size <= SMALLEST_VOCABULARY
        and tokenizer.decode(tokenizer.encode(text)) == text
    )


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_space_that_the_training_text_never_had_comes_back(model_type):
    tokenizer = trained("道可道非常道名可名\n" * 99, model_type)
    assert tokenizer.decode(tokenizer.encode(" 道 \u2581  x")) == " 道 \u2581  x"


def test_training_pieces_twice_gives_the_same():
    assert trained(sentences(20_000)).model == trained(sentences(20_000)).model


@pytest.mark.parametrize("text", ["", "\n\n", "\u2581"])
def test_a_text_without_anything_to_learn_is_refused(text):
    with pytest.raises(InputError, match="sentencepiece finds no 400 pieces in this text"):
        trained(text)


def test_symbols_are_the_code_points_in_order():
    assert CharTokenizer("\nabné").encode("banana").tolist() == [2, 1, 3, 1, 3, 1]


def test_any_bytes_come_back_from_the_byte_tokenizer():
    data = bytes(range(256)) * 2
    assert ByteTokenizer().decode_bytes(ByteTokenizer().encode(data)) == data


@pytest.mark.parametrize("unit", ["byte", "sentencepiece"])
def test_streamed_bytes_are_whole_characters_and_valid_utf8(unit, pieces):
    piece = tokenizer_for(unit, "", pieces).streamer()
    streamed = [piece(byte) for byte in "a🙂é".encode() + b"\xff" + b"z"]
    assert streamed == ["a", "", "", "", "🙂", "", "é", "\ufffd", "z"]


def test_an_unknown_character_is_named_with_its_place():
    tokenizer = CharTokenizer("abc")
    with pytest.raises(InputError, match=r"'é' \(U\+00E9\) at position 2 is not in the vocabulary"):
        tokenizer.encode("abéc")
    with pytest.raises(InputError, match=r"'!' .* at position 0"):
        tokenizer.encode("!abc")
    with pytest.raises(InputError, match=r"U\+10FFFF"):
        tokenizer.encode("\U0010ffff")


def test_unknown_characters_can_be_left_out_and_counted(pieces):
    assert CharTokenizer("abc").known_part("xaébc🙂".encode()) == (b"abc", 3)
    assert pieces.known_part("xaé🙂".encode()) == ("xaé🙂".encode(), 0)


def test_half_a_surrogate_pair_is_refused_with_its_place(pieces):
    for tokenizer in (CharTokenizer("abc"), ByteTokenizer(), pieces):
        with pytest.raises(InputError, match=r"U\+D83D at position 1 is half of a surrogate pair"):
            tokenizer.encode("a\ud83d")


def test_text_that_is_not_utf8_is_refused_with_the_offset(pieces):
    for tokenizer in (CharTokenizer("abc"), pieces):
        with pytest.raises(InputError, match="not UTF-8: byte 0xff at offset 1"):
            tokenizer.encode(b"a\xffb")


def with_documents(unit: str, documents: str, pieces: SentencePieceTokenizer) -> Tokenizer:
    if unit == "char":
        return CharTokenizer("\nabc", documents)
    if unit == "byte":
        return ByteTokenizer(documents)
    return SentencePieceTokenizer(pieces.model, documents)


@pytest.mark.parametrize("unit", ["char", "byte", "sentencepiece"])
def test_a_line_ends_with_its_newline_and_a_file_with_a_symbol_of_its_own(unit, pieces):
    plain, lines, files = (with_documents(unit, d, pieces) for d in ("none", "lines", "files"))
    assert plain.end is None
    assert lines.vocab_size == plain.vocab_size and lines.decode(np.array([lines.end])) == "\n"
    assert files.vocab_size == plain.vocab_size + 1 and files.end == plain.vocab_size
    assert lines.encode_document("ab\n").tolist() == plain.encode("ab\n").tolist()
    ids = files.encode_document("ab\n")
    assert ids.tolist() == [*plain.encode("ab\n"), files.end]
    assert files.decode_bytes(ids) == b"ab\n", "the end of a file stands for no text"
    assert "".join(map(files.streamer(), ids.tolist())) == "ab\n"


@pytest.mark.parametrize("unit", ["char", "byte", "sentencepiece"])
@pytest.mark.parametrize("documents", ["none", "lines", "files"])
def test_a_saved_tokenizer_is_the_same(tmp_path, unit, documents, pieces):
    tokenizer = with_documents(unit, documents, pieces)
    (tmp_path / "tokenizer.json").write_text(to_json(tokenizer.to_dict()), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert loaded.to_dict() == tokenizer.to_dict() and type(loaded) is type(tokenizer)
    assert (loaded.vocab_size, loaded.end) == (tokenizer.vocab_size, tokenizer.end)
    assert np.array_equal(loaded.encode("abc\nab"), tokenizer.encode("abc\nab"))


@pytest.mark.parametrize(
    "saved",
    [
        *("{}", "[", "[]"),
        '{"unit": "word"}',
        '{"unit": "char"}',
        '{"unit": "char", "symbols": "ba"}',
        '{"unit": "byte", "documents": "pages"}',
        '{"unit": "sentencepiece"}',
        '{"unit": "sentencepiece", "model": "not base64!"}',
        '{"unit": "sentencepiece", "model": "AAAA"}',
        '{"unit": "sentencepiece", "model": ""}',
    ],
)
def test_a_damaged_tokenizer_is_an_input_error(tmp_path, saved):
    (tmp_path / "tokenizer.json").write_text(saved)
    with pytest.raises(InputError, match="damaged"):
        load_tokenizer(tmp_path)


def test_what_interrupts_sentencepiece_is_raised_as_it_is():
    """SIGTERM while it reads the text was reported as a text that has no pieces, with code 3."""

    def interrupted():
        yield b"the cat sees the dog. " * 50
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        train_sentencepiece(interrupted(), np.array([*map(ord, "the cat")]), 300, "unigram")
