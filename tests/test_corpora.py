"""The corpora known by name, and the user's own text by split."""

import gzip
import hashlib
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import SHAKESPEARE, SHARED, needs_shakespeare, sentences

from seqlm.errors import InputError, UsageError
from seqlm.text import corpora
from seqlm.text.corpora import PTB, Known, Published, choose
from seqlm.text.prepare import prepare
from seqlm.text.staging import Draft


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
    with pytest.raises(UsageError, match="--train and --val must be given together"):
        choose(sources, parts, split)


def test_what_is_not_there_names_the_known_corpora(fill):
    with pytest.raises(InputError, match="one of: stdlib, tinyshakespeare, ptb-char, enwik8, text"):
        fill(["nowhere.txt"])


def test_a_folder_without_text_is_refused(tmp_path, fill):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(b"\xff")
    with pytest.raises(InputError, match="There is no text: none of the 1 files is UTF-8"):
        fill(["folder"])


def test_usage_that_makes_no_sense_is_refused():
    with pytest.raises(UsageError, match="cannot be combined with other sources"):
        choose(["stdlib", "t.txt"])
    with pytest.raises(UsageError, match="name the file itself: seqlm prepare x"):
        choose(["t.txt"], file=Path("x"))
    with pytest.raises(UsageError, match="Remove --from"):
        choose(["stdlib"], file=Path("t.txt"))
    with pytest.raises(UsageError, match="text8 is a fixed corpus .* Remove --documents"):
        choose(["text8"], documents="lines")
    with pytest.raises(UsageError, match="stdlib is a fixed corpus .* Remove --split"):
        choose(["stdlib"], split="90,10")
    with pytest.raises(UsageError, match="enwik8 is a fixed corpus .* Remove --encoding"):
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
    texts = fill(["tinyshakespeare"], file=SHAKESPEARE)
    assert {k: len(v) for k, v in texts.items()} == {"train": 1_003_854, "val": 111_540}
    (tmp_path / "input.txt.gz").write_bytes(gzip.compress(SHAKESPEARE.read_bytes(), 1))
    assert fill(["tinyshakespeare"], file=tmp_path / "input.txt.gz") == texts


def test_another_file_is_not_tiny_shakespeare(tmp_path, fill):
    (tmp_path / "t.txt").write_text(sentences(100))
    with pytest.raises(InputError, match="t.txt is not tinyshakespeare: it has fewer than 1,115,"):
        fill(["tinyshakespeare"], file=tmp_path / "t.txt")


def test_own_text_with_the_name_of_a_known_corpus_is_pointed_out(tmp_path, text_file):
    for name, warned in [("tinyshakespeare.txt", True), ("tiny.txt", False)]:
        (tmp_path / name).write_text(text_file.read_text())
        _, _, warnings = prepare([name])
        assert any("has the name of the known corpus" in text for text in warnings) == warned


@pytest.mark.skipif(not SHARED.is_dir(), reason="the Penn Treebank is not beside the project")
@pytest.mark.parametrize("unpacked", [False, True])
def test_ptb_char_has_the_published_counts(tmp_path, fill, unpacked):
    given = SHARED / "ptb-words.tgz"
    if unpacked:
        with tarfile.open(given) as tar:
            tar.extractall(tmp_path, filter="data")
        given = tmp_path / "simple-examples" / "data"
    texts = fill(["ptb-char"], file=given)
    sizes = {"train": 5_017_482, "val": 393_042, "test": 442_423}  # as in the literature
    assert {k: len(v) for k, v in texts.items()} == sizes
    assert len(set(b"".join(texts.values()))) == 50
    assert texts["val"].count(b"\n") == 3370 and texts["test"].count(b"\n") == 3761
    assert texts["val"].startswith(b"consumers_may_want_to_move_their_telephones")


def test_an_archive_that_is_not_ptb_is_refused(tmp_path, fill):
    (tmp_path / "t.tgz").write_bytes(b"no archive" * 1000)
    with pytest.raises(InputError, match="t.tgz is damaged, or not what its name says"):
        fill(["ptb-char"], file=tmp_path / "t.tgz")
    with tarfile.open(tmp_path / "t.tgz", "w:gz") as tar:
        tar.add(__file__, "other.txt")
    with pytest.raises(InputError, match="t.tgz holds no ptb.train.txt"):
        fill(["ptb-char"], file=tmp_path / "t.tgz")
    with tarfile.open(tmp_path / "t.tgz", "w:gz") as tar:
        for name, *_ in PTB.values():
            tar.add(__file__, f"simple-examples/data/{name}")
    with pytest.raises(InputError, match="t.tgz is not ptb.train.txt: it has fewer than 5,101,618"):
        fill(["ptb-char"], file=tmp_path / "t.tgz")


LETTERS = (b"abcdefghijklmnopqrstuvwxyz " * 40)[:1000]


@pytest.fixture
def letters(monkeypatch):
    """A corpus known by name as enwik8 is, of 1,000 bytes: "letters"."""
    published = Published(1000, "sha1", hashlib.sha1(LETTERS).hexdigest(), "its author")
    sizes = {"train": 900, "val": 50, "test": 50}
    known = Known("letters", "letters", corpora._one_file("letters", published, sizes), "x")
    monkeypatch.setitem(corpora.KNOWN, "letters", known)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_of_the_published_hash_is_taken_packed_or_not(tmp_path, fill, letters, packed):
    given = tmp_path / "letters"
    given.write_bytes(LETTERS)
    if packed:
        given = tmp_path / "letters.zip"
        with zipfile.ZipFile(given, "w") as archive:
            archive.writestr("letters", LETTERS)
    texts = fill(["letters"], file=given)
    assert {k: len(v) for k, v in texts.items()} == {"train": 900, "val": 50, "test": 50}
    assert b"".join(texts.values()) == LETTERS


@pytest.mark.parametrize(
    "text, why",
    [
        (LETTERS[:-1], "it has fewer than 1,000 bytes"),
        (LETTERS + b"a", "it has more than 1,000 bytes"),
        (b"", "it has fewer than 1,000 bytes"),
        (b"b" + LETTERS[1:], r"its sha1 is \w{40}, not \w{40} \(published by its author\)"),
    ],
)
def test_a_file_of_another_hash_is_refused(tmp_path, fill, letters, text, why):
    """The same holds for a file given with --from as for a download, and nothing is prepared."""
    (tmp_path / "letters").write_bytes(text)
    with pytest.raises(InputError, match=f"letters is not letters: {why}. .*: seqlm prepare "):
        fill(["letters"], file=tmp_path / "letters")


def test_the_manifest_says_what_was_verified(letters, text_file, seqlm_command):
    """Size and hash for a corpus known by name, nothing for the user's own text."""
    Path("letters").write_bytes(LETTERS)
    prepared = seqlm_command("prepare", "letters", "--from", "letters", "--json")
    assert prepared.json["verified"] == "size, and sha1 as published by its author"
    assert "verified: size, and sha1 as published by its author" in prepared.err
    own = seqlm_command("prepare", text_file, "--json")
    assert own.json["verified"] is None and "verified" not in own.err


def test_every_download_is_encrypted_and_held_to_a_published_hash():
    """The address is https, and a file of zeros of the right size is refused."""
    downloaded = [known for known in corpora.KNOWN.values() if known.address]
    assert len(downloaded) == 4
    assert all(known.address.startswith("https://") for known in downloaded)
    for published in (corpora.ENWIK8, corpora.TEXT8, corpora.SHAKESPEARE):
        assert len(published.digest) == 2 * hashlib.new(published.algorithm).digest_size
        with pytest.raises(InputError, match=f"zeros is not it: its {published.algorithm} is"):
            for _ in published.checked([bytes(published.size)], "zeros", "it"):
                pass


def test_standard_input_is_named_once():
    for sources, parts in (["-", "-"], None), ([], {"train": "-", "val": "-"}):
        with pytest.raises(UsageError, match="Standard input \\(-\\) is named twice"):
            choose(sources, parts)


def test_a_file_given_that_is_not_there_is_named(fill):
    with pytest.raises(InputError, match="--from nowhere: there is no such file"):
        fill(["ptb-char"], file=Path("nowhere"))


def test_a_device_given_is_refused_unread(fill):
    """/dev/zero would never end, a pipe never begin."""
    with pytest.raises(InputError, match="--from /dev/zero: it is neither a file nor a folder"):
        fill(["text8"], file=Path("/dev/zero"))


def test_reading_a_large_file_shows_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("seqlm.text.sources.BYTES_AT_ONCE", 1_000_000)
    (tmp_path / "t.txt").write_bytes(b"text\n" * 800_000)
    draft, words = Draft(tmp_path / "draft"), []
    choose(["t.txt"]).fill(draft, lambda share, word: words.append(word))
    draft.close()
    assert words[:4] == ["read 1.0 MB", "read 2.0 MB", "read 3.0 MB", "read 4.0 MB"]
