import io
import sys
import tarfile

import pytest
from conftest import SHAKESPEARE, SHARED, needs_shakespeare, sentences

from seqlm import corpora
from seqlm.errors import InputError, UsageError


def whole(text: corpora.Text) -> bytes:
    return b"".join(text.splits.values())


def test_own_files_are_read_as_they_are_in_the_order_given(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"second\r\n\x00 no newline at the end")
    (tmp_path / "a.txt").write_bytes("first é\n".encode())
    text = corpora.read(["b.txt", "a.txt"])
    assert whole(text) == b"second\r\n\x00 no newline at the end" + "first é\n".encode()
    assert text.name == "b"


def test_the_split_is_90_5_5_by_characters():
    splits = corpora.split_by_position(("é" * 50 + "a" * 50).encode())
    assert splits == {"train": ("é" * 50 + "a" * 40).encode(), "val": b"aaaaa", "test": b"aaaaa"}


def test_bytes_that_are_not_text_are_split_by_bytes():
    splits = corpora.split_by_position(b"\xff" * 100)
    assert [len(part) for part in splits.values()] == [90, 5, 5]


def test_a_folder_is_read_in_a_stable_order_without_what_is_hidden_or_no_text(tmp_path):
    folder = tmp_path / "letters"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "2.txt").write_text("two ")
    (folder / "sub" / "3.txt").write_text("three")
    (folder / "1.txt").write_text("one ")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    (folder / ".git" / "config").write_text("hidden")
    text = corpora.read(["letters"])
    assert whole(text) == b"one two three"
    assert text.left_out == ["letters/picture.png"]
    assert text.name == "letters"


def test_a_glob_is_expanded_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert whole(corpora.read(["*.txt"])) == b"a.txtb.txt"


def test_standard_input_is_a_dash(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    text = corpora.read(["-"])
    assert (whole(text), text.name) == (b"from a pipe", "stdin")


def test_another_encoding_becomes_utf8(tmp_path):
    (tmp_path / "old.txt").write_bytes("Жизнь".encode("cp1251"))
    assert whole(corpora.read(["old.txt"], encoding="cp1251")).decode() == "Жизнь"
    (tmp_path / "wide.txt").write_bytes("wide".encode("utf-16"))
    assert whole(corpora.read(["wide.txt"], encoding="utf-16")) == b"wide"


@pytest.mark.parametrize(
    "content, encoding, message",
    [
        (b"good \xff bad", None, "t.txt is not UTF-8: byte 0xff at offset 5."),
        (b"cut off \xe2\x82", None, "t.txt is not UTF-8: byte 0xe2 at offset 8."),
        ("UTF-16".encode("utf-16"), None, "It starts like UTF-16: try --encoding utf-16."),
        (b"\x81", "cp1252", "t.txt is not cp1252: byte 0x81 at offset 0."),
    ],
)
def test_text_that_cannot_be_read_names_the_byte_and_the_ways_out(
    tmp_path, content, encoding, message
):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(InputError) as error:
        corpora.read(["t.txt"], encoding=encoding)
    assert message in str(error.value) and "--unit byte" in str(error.value)


def test_any_bytes_are_taken_where_bytes_are_wanted(tmp_path):
    (tmp_path / "t.bin").write_bytes(b"\xff\x00\xfe")
    assert whole(corpora.read(["t.bin"], any_bytes=True)) == b"\xff\x00\xfe"


def test_what_is_not_there_names_the_known_corpora():
    with pytest.raises(InputError, match="nor a known corpus.*stdlib, tinyshakespeare, ptb-char"):
        corpora.read(["nowhere.txt"])


def test_a_folder_without_files_or_without_text_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="The folder empty has no files"):
        corpora.read(["empty"])
    (tmp_path / "empty" / "a.png").write_bytes(b"\xff")
    with pytest.raises(InputError, match="empty holds no text: none of its 1 files is UTF-8"):
        corpora.read(["empty"])


def test_a_path_that_cannot_be_read_is_named():
    with pytest.raises(InputError, match="Cannot read /proc/self/mem"):
        corpora.read(["/proc/self/mem"])


def test_usage_that_makes_no_sense_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(UsageError, match="which is prepared alone"):
        corpora.read(["stdlib", "t.txt"])
    with pytest.raises(UsageError, match="name the file itself: seqlm prepare x"):
        corpora.read(["t.txt"], given=corpora.Path("x"))
    with pytest.raises(UsageError, match="--encoding klingon is not an encoding"):
        corpora.read(["t.txt"], encoding="klingon")
    with pytest.raises(UsageError, match="Leave out --from"):
        corpora.read(["stdlib"], given=corpora.Path("t.txt"))


@pytest.mark.parametrize(
    "source, name",
    [("My Poems.txt", "My-Poems"), ("a/b/letters", "letters"), ("novels/*.txt", "novels")],
)
def test_the_folders_name_is_safe(source, name):
    assert corpora.folder_name(source) == name


def test_the_standard_library_is_real_text_split_by_file():
    text = corpora.read([])
    sizes = {split: len(data) for split, data in text.splits.items()}
    assert sum(sizes.values()) > 5_000_000
    assert 0.01 < sizes["val"] / sum(sizes.values()) < 0.12
    assert text.label == f"stdlib-{sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}"
    assert b"def " in text.splits["train"] and b"import unittest" in whole(text)


@pytest.mark.parametrize("name", ["tinyshakespeare", "ptb-char"])
def test_a_corpus_that_is_not_here_says_how_to_get_it(name):
    with pytest.raises(InputError, match=f"seqlm prepare {name} --from FILE"):
        corpora.read([name])


@needs_shakespeare
def test_tiny_shakespeare_is_split_as_nanogpt_does():
    text = corpora.read(["tinyshakespeare"], given=SHAKESPEARE)
    assert {k: len(v) for k, v in text.splits.items()} == {"train": 1_003_854, "val": 111_540}


def test_another_file_is_not_tiny_shakespeare(tmp_path):
    (tmp_path / "t.txt").write_text(sentences(100))
    with pytest.raises(InputError, match="t.txt is not tinyshakespeare: its sha256 is not"):
        corpora.read(["tinyshakespeare"], given=tmp_path / "t.txt")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the Penn Treebank is not beside the project")
@pytest.mark.parametrize("unpacked", [False, True])
def test_ptb_char_has_the_published_counts(tmp_path, unpacked):
    given = SHARED / "ptb-words.tgz"
    if unpacked:
        with tarfile.open(given) as tar:
            tar.extractall(tmp_path, filter="data")
        given = tmp_path / "simple-examples" / "data"
    splits = corpora.read(["ptb-char"], given=given).splits
    assert {k: len(v) for k, v in splits.items()} == corpora.PTB_CHARS
    assert len(set(whole(corpora.Text("", "", splits)).decode())) == 50
    assert splits["val"].count(b"\n") == 3370 and splits["test"].count(b"\n") == 3761
    assert splits["val"].startswith(b"consumers_may_want_to_move_their_telephones")


def test_an_archive_that_is_not_ptb_is_refused(tmp_path):
    (tmp_path / "t.tgz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="t.tgz is not a tar archive"):
        corpora.read(["ptb-char"], given=tmp_path / "t.tgz")
    with tarfile.open(tmp_path / "t.tgz", "w:gz") as tar:
        tar.add(__file__, "other.txt")
    with pytest.raises(InputError, match="t.tgz holds no ptb.train.txt"):
        corpora.read(["ptb-char"], given=tmp_path / "t.tgz")
