"""The corpora known by name, and the user's own text by split."""

import gzip
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import SHAKESPEARE, SHARED, needs_shakespeare, sentences

from seqlm import corpora
from seqlm.corpora import PTB_CHARS, choose
from seqlm.draft import Draft
from seqlm.errors import InputError, UsageError


@pytest.fixture
def fill(tmp_path):
    """fill(sources, ...): {split: text} of what `choose` gives for the same arguments."""
    drafts = []

    def texts(*arguments, **options) -> dict[str, bytes]:
        choice = choose(*arguments, **options)
        drafts.append(Draft(tmp_path / f"draft{len(drafts)}"))
        choice.fill(drafts[-1], lambda share, word: None)
        spans = drafts[-1].splits or {"": (0, drafts[-1].size)}
        return {split: b"".join(drafts[-1].chunks(span)) for split, span in spans.items()}

    yield texts
    for draft in drafts:
        draft.close()


def test_own_files_are_read_in_the_order_given(tmp_path, fill):
    (tmp_path / "b.txt").write_text("second ")
    (tmp_path / "a.txt").write_text("first")
    assert fill(["b.txt", "a.txt"]) == {"": b"second first"}
    choice = choose(["b.txt", "a.txt"])
    assert (choice.name, choice.unit) == ("b", "char")


def test_every_split_can_have_its_own_file(tmp_path, fill):
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.txt").write_text(name)
    parts = {"test": "three.txt", "train": "one.txt", "val": "two.txt"}
    assert fill([], parts) == {"train": b"one", "val": b"two", "test": b"three"}
    assert choose([], parts).name == "one" and choose([], parts).shares is None
    del parts["test"]
    assert list(fill([], parts)) == ["train", "val"]


@pytest.mark.parametrize(
    "sources, parts, split",
    [
        ([], {"train": "a"}, None),
        ([], {"val": "a"}, None),
        (["x"], {"train": "a", "val": "b"}, None),
        ([], {"train": "a", "val": "b"}, "90,10"),
    ],
)
def test_files_of_splits_come_together_and_alone(sources, parts, split):
    with pytest.raises(UsageError, match="--train and --val belong together"):
        choose(sources, parts, split)


def test_what_is_not_there_names_the_known_corpora(fill):
    with pytest.raises(InputError, match="one of: stdlib, tinyshakespeare, ptb-char, enwik8, text"):
        fill(["nowhere.txt"])


def test_a_folder_without_text_is_refused(tmp_path, fill):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(b"\xff")
    with pytest.raises(InputError, match="There is no text: 1 files, and none of them is UTF-8"):
        fill(["folder"])


def test_usage_that_makes_no_sense_is_refused():
    with pytest.raises(UsageError, match="which is prepared alone"):
        choose(["stdlib", "t.txt"])
    with pytest.raises(UsageError, match="name the file itself: seqlm prepare x"):
        choose(["t.txt"], given=Path("x"))
    with pytest.raises(UsageError, match="Leave out --from"):
        choose(["stdlib"], given=Path("t.txt"))
    with pytest.raises(UsageError, match="text8 has a form of its own. Leave out --documents"):
        choose(["text8"], documents="lines")
    with pytest.raises(UsageError, match="stdlib has a form of its own. Leave out --split"):
        choose(["stdlib"], split="90,10")
    with pytest.raises(UsageError, match="enwik8 has a form of its own. Leave out --encoding"):
        choose(["enwik8"], encoding="latin-1")


def test_the_standard_library_is_real_text_split_by_file(fill):
    texts = fill([])
    sizes = {split: len(text) for split, text in texts.items()}
    assert sum(sizes.values()) > 5_000_000
    assert 0.01 < sizes["val"] / sum(sizes.values()) < 0.12
    version = sys.version_info
    assert choose([]).label == f"stdlib-{version[0]}.{version[1]}.{version[2]}"
    assert b"def " in texts["train"] and b"import unittest" in b"".join(texts.values())


@needs_shakespeare
def test_tiny_shakespeare_is_split_as_nanogpt_does(tmp_path, fill):
    texts = fill(["tinyshakespeare"], given=SHAKESPEARE)
    assert {k: len(v) for k, v in texts.items()} == {"train": 1_003_854, "val": 111_540}
    (tmp_path / "input.txt.gz").write_bytes(gzip.compress(SHAKESPEARE.read_bytes(), 1))
    assert fill(["tinyshakespeare"], given=tmp_path / "input.txt.gz") == texts


def test_another_file_is_not_tiny_shakespeare(tmp_path, fill):
    (tmp_path / "t.txt").write_text(sentences(100))
    with pytest.raises(InputError, match="t.txt is not tinyshakespeare: its sha256 is .* not 86c4"):
        fill(["tinyshakespeare"], given=tmp_path / "t.txt")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the Penn Treebank is not beside the project")
@pytest.mark.parametrize("unpacked", [False, True])
def test_ptb_char_has_the_published_counts(tmp_path, fill, unpacked):
    given = SHARED / "ptb-words.tgz"
    if unpacked:
        with tarfile.open(given) as tar:
            tar.extractall(tmp_path, filter="data")
        given = tmp_path / "simple-examples" / "data"
    texts = fill(["ptb-char"], given=given)
    assert {k: len(v) for k, v in texts.items()} == PTB_CHARS
    assert len(set(b"".join(texts.values()))) == 50
    assert texts["val"].count(b"\n") == 3370 and texts["test"].count(b"\n") == 3761
    assert texts["val"].startswith(b"consumers_may_want_to_move_their_telephones")


def test_an_archive_that_is_not_ptb_is_refused(tmp_path, fill):
    (tmp_path / "t.tgz").write_bytes(b"no archive" * 1000)
    with pytest.raises(InputError, match="t.tgz is damaged, or not what its name says"):
        fill(["ptb-char"], given=tmp_path / "t.tgz")
    with tarfile.open(tmp_path / "t.tgz", "w:gz") as tar:
        tar.add(__file__, "other.txt")
    with pytest.raises(InputError, match="t.tgz holds no ptb.train.txt"):
        fill(["ptb-char"], given=tmp_path / "t.tgz")
    with tarfile.open(tmp_path / "t.tgz", "w:gz") as tar:
        for name in corpora.PTB_FILES.values():
            tar.add(__file__, f"simple-examples/data/{name}")
    with pytest.raises(InputError, match="ptb.train.txt of .* gives .* characters, and the Penn"):
        fill(["ptb-char"], given=tmp_path / "t.tgz")


@pytest.fixture
def small_hutter(monkeypatch):
    """enwik8 and text8 of 100 kB: the same code with a smaller million."""
    monkeypatch.setattr(corpora, "MILLION", 1000)
    monkeypatch.setattr(corpora, "ENWIK8_SHA1", "")


LETTERS = b"abcdefghijklmnopqrstuvwxyz "


@pytest.mark.parametrize("packed", [False, True])
def test_text8_is_known_by_its_size_and_alphabet(tmp_path, fill, small_hutter, packed):
    text = (LETTERS * 4000)[:100_000]
    (tmp_path / "text8").write_bytes(text)
    given = tmp_path / "text8"
    if packed:
        given = tmp_path / "text8.zip"
        with zipfile.ZipFile(given, "w") as archive:
            archive.writestr("text8", text)
    texts = fill(["text8"], given=given)
    assert {k: len(v) for k, v in texts.items()} == {"train": 90000, "val": 5000, "test": 5000}
    assert b"".join(texts.values()) == text


@pytest.mark.parametrize(
    "text", [(LETTERS * 4000)[:99_999], (LETTERS[:-1] * 4000)[:100_000], b"", b"A" * 100_000]
)
def test_a_file_of_another_size_or_alphabet_is_not_text8(tmp_path, fill, small_hutter, text):
    (tmp_path / "text8").write_bytes(text)
    with pytest.raises(InputError, match="text8 is not text8: it has .* and text8 100,000 with 27"):
        fill(["text8"], given=tmp_path / "text8")


def test_enwik8_is_any_bytes_and_its_sha1_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "MILLION", 1000)
    data = (bytes(range(205)) * 500)[:100_000]
    (tmp_path / "enwik8").write_bytes(data)
    draft = Draft(tmp_path / "draft")
    choice = choose(["enwik8"], given=tmp_path / "enwik8")
    choice.fill(draft, lambda share, word: None)
    assert choice.unit == "byte" and draft.size == 100_000
    draft.close()
    assert "not the sha1 that its author published" in draft.warnings[0]


def test_standard_input_is_named_once():
    for sources, parts in (["-", "-"], None), ([], {"train": "-", "val": "-"}):
        with pytest.raises(UsageError, match="Standard input, -, is named twice"):
            choose(sources, parts)


def test_a_file_given_that_is_not_there_is_named(fill):
    with pytest.raises(InputError, match="--from nowhere: there is no such file"):
        fill(["ptb-char"], given=Path("nowhere"))


def test_reading_a_large_file_shows_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("seqlm.sources.CHUNK", 1_000_000)
    (tmp_path / "t.txt").write_bytes(b"text\n" * 800_000)
    draft, words = Draft(tmp_path / "draft"), []
    choose(["t.txt"]).fill(draft, lambda share, word: words.append(word))
    draft.close()
    assert words[:4] == ["read 1.0 MB", "read 2.0 MB", "read 3.0 MB", "read 4.0 MB"]
