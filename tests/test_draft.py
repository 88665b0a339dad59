"""staging.py and splits.py: files in, splits and documents out."""

import hashlib
import io
import os
import random
from fractions import Fraction
from itertools import chain

import pytest

from seqlm.errors import InputError, UsageError
from seqlm.text import staging as module
from seqlm.text.sources import Item
from seqlm.text.splits import divide, shares
from seqlm.text.staging import Draft, code_points


def item(data: bytes, chosen: bool = True, name: str = "t.txt") -> Item:
    return Item(name, io.BytesIO(data), chosen)


@pytest.fixture
def make(tmp_path):
    """make(*files, documents=..., encodings=...): a draft of them."""
    made = []

    def draft(*files: bytes, **options) -> Draft:
        made.append(Draft(tmp_path / f"draft{len(made)}", **options))
        for data in files:
            made[-1].add(item(data))
        return made[-1]

    yield draft
    for one in made:
        one.close()


def text(draft: Draft, split: str | None = None) -> bytes:
    return b"".join(draft.chunks(draft.splits[split] if split else (0, draft.size)))


def documents(draft: Draft, split: str) -> list[bytes]:
    """The documents of a split where they are files."""
    found, begun = [], b""
    for piece, last in draft.documents_of(split):
        begun += piece
        if last:
            found, begun = [*found, begun], b""
    assert not begun
    return found


SHARES = shares("90,5,5")


def test_files_follow_each_other_as_they_are(make):
    assert text(make(b"one", b"", b"two\n", b"three")) == b"onetwo\nthree"


def test_a_file_found_in_a_folder_that_is_no_text_is_left_out_whole(make):
    draft = make(b"kept ", encodings=["utf-8"])
    draft.add(item(b"good start" * 200_000 + b"\xff", chosen=False, name="x.bin"))
    draft.add(item(b"too"))
    assert (text(draft), draft.left_out) == (b"kept too", ["x.bin"])


def test_empty_lines_of_a_file_that_is_left_out_do_not_count(make):
    draft = make(b"a\n\nb\n", documents="lines")
    draft.add(item(b"\n\n\nx\n\n\ny" * 400_000 + b"\xff", chosen=False))
    assert (text(draft), draft.empty_lines) == (b"a\nb\n", 1)


def test_a_file_chosen_by_name_must_be_text(make):
    with pytest.raises(InputError, match="t.txt is not UTF-8: byte 0xff at offset 1"):
        make(b"a\xff")


def test_any_bytes_are_taken_where_no_encoding_is_wanted(make):
    assert text(make(b"\xff\x00\xfe", encodings=[])) == b"\xff\x00\xfe"


class Pipe(io.BytesIO):
    def seek(self, *_):
        raise AssertionError("it cannot go back")


@pytest.mark.parametrize("kind", [io.BytesIO, Pipe])
def test_each_file_is_read_in_the_first_encoding_that_fits(make, kind):
    draft = make(encodings=["utf-8", "utf-16", "latin-1"])
    for data in ("é1".encode(), "é2".encode("utf-16"), "é3".encode("latin-1")):
        draft.add(Item("t.txt", kind(data), chosen=True, plain=kind is io.BytesIO))
    assert text(draft).decode() == "é1é2é3"


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize(
    "content, lines, empty",
    [
        (b"a\nb\n", b"a\nb\n", 0),
        (b"a\nb", b"a\nb\n", 0),
        (b"\n\na\n\n\nb\n\n", b"a\nb\n", 5),
        (b"a\r\n\r\nb\r\n", b"a\r\nb\r\n", 1),
        (b"\r\n\r\n", b"", 2),
        (b"a\n\r", b"a\n", 0),
        (b"", b"", 0),
    ],
)
def test_lines_are_documents_if_they_are_not_empty(make, monkeypatch, content, lines, empty, chunk):
    monkeypatch.setattr("seqlm.text.sources.BYTES_AT_ONCE", chunk)
    draft = make(content, documents="lines")
    assert text(draft) == lines
    assert draft.empty_lines == empty


def test_the_last_line_of_a_file_and_the_first_of_the_next_stay_apart(make):
    assert text(make(b"one", b"two", documents="lines")) == b"one\ntwo\n"


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 6, 7, 100])
def test_pieces_end_with_a_line_or_a_whole_character(make, monkeypatch, chunk):
    monkeypatch.setattr(module, "BYTES_AT_ONCE", max(chunk, 4))
    whole = "aé日🙂\nz日🙂é" * 3
    pieces = list(make(whole.encode()).chunks((0, len(whole.encode()))))
    assert "".join(piece.decode() for piece in pieces) == whole


def test_any_bytes_come_in_pieces_too(make, monkeypatch):
    monkeypatch.setattr(module, "BYTES_AT_ONCE", 4)
    data = bytes(random.Random(0).randbytes(999)) + b"\x80" * 50
    assert text(make(data, encodings=[])) == data


def test_the_split_is_by_position_in_characters(make):
    draft = make(("é" * 50 + "a" * 50).encode())
    divide(draft, SHARES, chars=100)
    assert {s: text(draft, s).decode() for s in draft.splits} == {
        "train": "é" * 50 + "a" * 40,
        "val": "aaaaa",
        "test": "aaaaa",
    }


def test_bytes_that_are_not_text_are_split_by_bytes(make):
    draft = make(b"\xff" * 100, encodings=[])
    divide(draft, SHARES, chars=None)
    assert [end - start for start, end in draft.splits.values()] == [90, 5, 5]


def test_a_place_far_into_the_text_is_found_across_chunks(make, monkeypatch):
    monkeypatch.setattr(module, "BYTES_AT_ONCE", 16)
    whole = "日é\na" * 100
    draft = make(whole.encode())
    divide(draft, shares("33.5,66.5"), chars=400)
    assert text(draft, "train").decode() == whole[:134]


NAMES = [b"name %d\n" % i for i in range(2000)]


@pytest.mark.parametrize("kind", ["lines", "files"])
def test_documents_are_dealt_whole_and_equal_ones_to_the_same_split(make, kind, monkeypatch):
    monkeypatch.setattr(module, "BYTES_AT_ONCE", 1000)
    given = NAMES + NAMES[:500]
    draft = make(*([b"".join(given)] if kind == "lines" else given), documents=kind)
    divide(draft, SHARES, chars=draft.size)
    if kind == "files":
        found = {split: documents(draft, split) for split in draft.splits}
    else:
        found = {split: text(draft, split).splitlines(keepends=True) for split in draft.splits}
    assert sorted(chain.from_iterable(found.values())) == sorted(given), "nothing is lost"
    train, val, test = (set(part) for part in found.values())
    assert not train & val and not train & test and not val & test
    assert 0.03 < len(found["val"]) / len(given) < 0.07
    assert found["train"] == [name for name in given if name in train], "the order stays"


def test_a_sorted_list_is_mixed_over_the_splits(make):
    draft = make(b"".join(sorted(NAMES)), documents="lines")
    divide(draft, SHARES, chars=draft.size)
    numbers = [int(line.split()[1]) for line in text(draft, "val").splitlines()]
    assert min(numbers) < 200 and max(numbers) > 1800


@pytest.mark.parametrize("seed", range(20))
def test_a_large_document_stays_in_train(make, seed):
    files = [b"%d %d " % (seed, i) * 20 for i in range(40)] + [b"%d large " % seed * 20_000]
    draft = make(*files, documents="files")
    divide(draft, SHARES, chars=draft.size)
    assert files[-1] in documents(draft, "train")
    assert documents(draft, "val") and documents(draft, "test")


def test_three_documents_are_enough_for_three_splits(make):
    draft = make(b"first " * 50, b"second " * 50, b"third " * 50, documents="files")
    divide(draft, SHARES, chars=draft.size)
    assert [len(documents(draft, split)) for split in draft.splits] == [1, 1, 1]


def test_a_file_longer_than_a_chunk_stays_whole_and_is_known_by_all_of_it(make, monkeypatch):
    monkeypatch.setattr(module, "BYTES_AT_ONCE", 16)
    files = [b"%02d" % i + b"the same end of all files" * 3 for i in range(40)]
    draft = make(*files, documents="files")
    divide(draft, shares("50,50"), chars=draft.size)
    found = [documents(draft, split) for split in ("train", "val")]
    assert sorted(found[0] + found[1]) == files
    assert min(map(len, found)) > 10, "their hashes are not those of their common end"


def test_a_line_longer_than_a_chunk_stays_whole(make, monkeypatch):
    monkeypatch.setattr(module, "BYTES_AT_ONCE", 16)
    lines = [bytes([65 + i]) * 100 + b"\n" for i in range(20)]
    draft = make(b"".join(lines), documents="lines")
    divide(draft, shares("50,50"), chars=draft.size)
    found = [text(draft, split).splitlines(keepends=True) for split in ("train", "val")]
    assert sorted(found[0] + found[1]) == lines and found[1]


def test_splits_can_be_added_one_after_the_other_or_cut(make):
    draft = make(b"train")
    draft.end_split("train")
    draft.append(b"val")
    draft.end_split("val")
    assert [text(draft, split) for split in draft.splits] == [b"train", b"val"]
    draft.cut({"train": 2, "val": 6})
    assert [text(draft, split) for split in draft.splits] == [b"tr", b"ainval"]


@pytest.mark.parametrize("place", ["draft", os.devnull])
def test_the_hash_is_of_the_text_without_files_that_were_left_out(tmp_path, place):
    """Also where the text itself is not kept."""
    draft = Draft(tmp_path / place)
    draft.add(item(b"first\n"))
    draft.add(item(b"good text, " * 200_000 + b"\xff", chosen=False))
    draft.add(item(b"last\n"))
    assert draft.left_out and draft.size == 11
    assert draft.sha256 == hashlib.sha256(b"first\nlast\n").hexdigest()
    draft.close()


def test_a_file_that_was_left_out_leaves_no_bytes_behind(make):
    draft = make(b"first\n")
    draft.add(item(b"good text, " * 200_000 + b"\xff", chosen=False))
    draft.flush()
    assert draft.path.read_bytes() == b"first\n"


def test_shares_are_exact():
    assert shares("90,5,5") == {
        "train": Fraction(9, 10),
        "val": Fraction(1, 20),
        "test": Fraction(1, 20),
    }
    assert shares("99.9, 0.1") == {"train": Fraction(999, 1000), "val": Fraction(1, 1000)}


@pytest.mark.parametrize(
    "given", ["", "100", "90,5", "90,5,5,0", "110,-5,-5", "a,b", "50;50", "100,0"]
)
def test_shares_that_cannot_be_are_refused(given):
    with pytest.raises(UsageError, match=f"--split {given}: give the percent of train and val"):
        shares(given)


def test_code_points_are_counted():
    assert code_points("aé日🙂".encode()) == 4
