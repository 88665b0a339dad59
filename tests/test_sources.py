"""What a SOURCE stands for: files, folders, globs, archives, standard input, encodings."""

import bz2
import gzip
import io
import lzma
import os
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import closing
from itertools import chain

import pytest

from seqlm.errors import InputError, UsageError
from seqlm.text import sources
from seqlm.text.sources import Item, encodings, find, folder_name, items


def read(source: str, encoding: str = "utf-8") -> dict[str, bytes]:
    """{name: text} of the files of a source, in their order."""
    texts = {}
    for place in find(source):
        with closing(items(place)) as found:
            for item in found:
                texts[item.name] = b"".join(item.utf8(encoding))
    return texts


def all_items(source: str) -> Iterator[Item]:
    return chain.from_iterable(map(items, find(source)))


PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def make_zip(path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def make_tar(path, files: dict[str, bytes]) -> None:
    packing = {".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2", ".tar": "w"}
    with tarfile.open(path, packing[path.suffix]) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


ARCHIVES = ["t.zip", "t.tar", "t.tgz", "t.tar.gz", "t.tar.xz", "t.tar.bz2", "T.TGZ", "T.ZIP"]


def make_archive(path, files: dict[str, bytes]) -> None:
    small = path.with_name(path.name.lower())
    (make_zip if small.suffix == ".zip" else make_tar)(small, files)
    small.rename(path)


def test_a_file_is_read_as_it_is(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"second\r\n\x00 no newline at the end")
    assert read("t.txt") == {"t.txt": b"second\r\n\x00 no newline at the end"}


@pytest.mark.parametrize("ending", PACK)
def test_a_packed_file_is_unpacked(tmp_path, ending):
    (tmp_path / f"t.txt{ending}").write_bytes(PACK[ending]("text é\n".encode() * 1000))
    assert read(f"t.txt{ending}") == {f"t.txt{ending}": "text é\n".encode() * 1000}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_is_read_in_its_own_order_without_what_is_hidden(tmp_path, name):
    files = {"b/2.txt": b"two ", ".git/x": b"hidden", "a/1.txt": b"one ", "a/._1.txt": b"hidden"}
    make_archive(tmp_path / name, files)
    assert read(name) == {f"{name}: b/2.txt": b"two ", f"{name}: a/1.txt": b"one "}
    assert not any(item.chosen for item in all_items(name)), "what is no text in it may be left out"


@pytest.mark.parametrize("name", ARCHIVES)
def test_what_is_packed_inside_of_an_archive_is_unpacked_too(tmp_path, name):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("deep.txt", "deep")
    files = {"a.gz": gzip.compress(b"packed"), "b.zip": inner.getvalue()}
    make_archive(tmp_path / name, files)
    assert list(read(name).values()) == [b"packed", b"deep"]


@pytest.mark.parametrize("name", [*ARCHIVES, "t.gz"])
def test_what_is_in_an_archive_can_be_read_again(tmp_path, name):
    if name in ARCHIVES:
        make_archive(tmp_path / name, {"a.txt": b"one" * 999, "b.txt": b"two" * 999})
    else:
        (tmp_path / name).write_bytes(gzip.compress(b"one" * 999))
    for item, text in zip(all_items(name), (b"one", b"two"), strict=False):
        with item.repeatable() as again:
            for _ in range(2):
                assert b"".join(again.chunks()) == text * 999
                again.file.seek(0)


def test_a_name_in_a_zip_that_is_no_text_is_named(tmp_path):
    make_zip(tmp_path / "t.zip", {"é.txt": b"text"})
    data = (tmp_path / "t.zip").read_bytes().replace("é".encode(), b"\xff\xfe")
    (tmp_path / "t.zip").write_bytes(data)
    with pytest.raises(InputError, match="t.zip is damaged, or not what its name says"):
        read("t.zip")


def test_a_folder_is_read_in_a_stable_order_without_what_is_hidden(tmp_path):
    folder = tmp_path / "letters"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "2.txt").write_text("two")
    (folder / "sub" / "3.txt.gz").write_bytes(gzip.compress(b"three"))
    (folder / "1.txt").write_text("one")
    (folder / ".git" / "config").write_text("hidden")
    assert list(read("letters").values()) == [b"one", b"two", b"three"]
    assert not any(item.chosen for item in all_items("letters"))


@pytest.mark.parametrize("pattern", ["*.txt", "**/*.txt", "?.txt"])
def test_a_glob_is_expanded_in_order(tmp_path, pattern):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert list(read(pattern)) == ["a.txt", "b.txt"]


def test_a_glob_that_finds_folders_reads_each_file_once(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "1.txt").write_text("one")
    assert list(read("x/**")) == list(read("x/*")) == ["x/y/1.txt"]


def test_standard_input_is_a_dash(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    assert read("-") == {"standard input": b"from a pipe"}


def test_a_pipe_is_as_good_as_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"x" * 300_000,))
    writer.start()
    assert read("pipe") == {"pipe": b"x" * 300_000}
    writer.join()


@pytest.mark.parametrize("encoding", ["cp1251", "utf-16", "utf-16-le", "koi8-r", "utf-8-sig"])
def test_another_encoding_becomes_utf8(tmp_path, encoding):
    (tmp_path / "old.txt").write_bytes("Жизнь\n".encode(encoding) * 1)
    assert read("old.txt", encoding)["old.txt"].decode() == "Жизнь\n"


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_characters_that_a_chunk_cuts_stay_whole(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(sources, "BYTES_AT_ONCE", chunk)
    text = "aé日🙂z"
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    (tmp_path / "w.txt").write_text(text, encoding="utf-16")
    assert read("t.txt")["t.txt"].decode() == read("w.txt", "utf-16")["w.txt"].decode() == text


@pytest.mark.parametrize("chunk", [1, 4, 1 << 20])
@pytest.mark.parametrize(
    "content, encoding, message",
    [
        (b"good \xff bad", "utf-8", "t.txt is not UTF-8: byte 0xff at offset 5."),
        (b"cut off \xe2\x82", "utf-8", "t.txt is not UTF-8: byte 0xe2 at offset 8."),
        (b"half \xed\xa0\xbd of a pair", "utf-8", "byte 0xed at offset 5."),
        (b"\xef\xbb\xbfab\xff", "utf-8-sig", "t.txt is not utf-8-sig: byte 0xff at offset 5."),
        (b"\x81", "cp1252", "t.txt is not cp1252: byte 0x81 at offset 0."),
        (b"long enough \x81", "cp1252", "t.txt is not cp1252: byte 0x81 at offset 12."),
    ],
)
def test_text_that_cannot_be_read_names_the_byte_and_the_ways_out(
    tmp_path, monkeypatch, content, encoding, message, chunk
):
    monkeypatch.setattr(sources, "BYTES_AT_ONCE", chunk)
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(InputError) as error:
        read("t.txt", encoding)
    assert message in str(error.value) and "--unit byte" in str(error.value)


@pytest.mark.parametrize(
    "content, guess",
    [
        ("UTF-16".encode("utf-16"), "UTF-16: try --encoding utf-16."),
        (
            gzip.compress(b"text", mtime=0),
            "gzip: unpack it, or give the file a name that ends in .gz.",
        ),
        (lzma.compress(b"text"), "xz: unpack it, or give the file a name that ends in .xz."),
        (bz2.compress(b"text"), "bzip2: unpack it, or give the file a name that ends in .bz2."),
    ],
)
def test_what_a_file_starts_like_is_said(tmp_path, content, guess):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(InputError, match=f"It starts like {guess}"):
        read("t.txt")


@pytest.mark.parametrize("name", ["t.gz", "t.xz", "t.bz2", "t.zip", "t.tar", "t.tar.gz", "t.txz"])
def test_what_is_not_the_archive_that_its_name_says_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"no archive at all, but some plain text" * 20)
    with pytest.raises(InputError, match=f"{name} is damaged, or not what its name says"):
        read(name)


@pytest.mark.parametrize("name", [*ARCHIVES, "t.gz", "t.xz", "t.bz2"])
def test_an_archive_that_was_cut_is_named(tmp_path, name):
    data = b"".join(b"%d lines of text\n" % i for i in range(10_000))
    if name in ARCHIVES:
        make_archive(tmp_path / name, {"a.txt": data})
    else:
        (tmp_path / name).write_bytes(PACK[name[1:]](data))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{name}.* is damaged, or not what its name says"):
        read(name)


@pytest.mark.parametrize("name", ["t.tgz", "t.tar.gz", "t.tar.xz", "t.tar.bz2"])
def test_the_checksum_at_the_end_of_a_packed_tar_is_looked_at(tmp_path, name):
    make_archive(tmp_path / name, {"a.txt": b"text"})
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-6])
    with pytest.raises(InputError, match=f"{name} is damaged, or not what its name says"):
        read(name)


@pytest.mark.parametrize("name", ["t.zip", "t.tar.gz"])
def test_an_archive_without_files_is_refused(tmp_path, name):
    make_archive(tmp_path / name, {})
    with pytest.raises(InputError, match=f"The archive {name} has no files"):
        read(name)


def test_a_zip_under_a_password_says_to_unpack_it(tmp_path):
    make_zip(tmp_path / "t.zip", {"a.txt": b"secret"})
    data = bytearray((tmp_path / "t.zip").read_bytes())
    data[6] |= 1  # the flags that say so, at the file and in the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "t.zip").write_bytes(data)
    with pytest.raises(InputError, match="t.zip: a.txt needs a password .* Unpack it first"):
        read("t.zip")


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="nor a known corpus. Check the path, or name one of: a"):
        find("nowhere.txt", known=["a", "b"])
    with pytest.raises(InputError, match="neither a file"):
        find("no*.txt")
    (tmp_path / "poems.txt").write_text("text")
    with pytest.raises(InputError, match=f"Did you mean '{tmp_path}/poems.txt'"):
        find(f"{tmp_path}/peoms.txt")
    with pytest.raises(UsageError, match="A SOURCE is empty"):
        find("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="The folder empty has no files"):
        find("empty")
    with pytest.raises(InputError, match="Cannot read /proc/self/mem"):
        read("/proc/self/mem")


@pytest.mark.parametrize("name", ["klingon", "hex", "rot13", "base64", ""])
def test_an_encoding_that_is_none_is_refused(name):
    with pytest.raises(UsageError, match=f"--encoding {name}: Python knows no such text encoding"):
        encodings(f"utf-8,{name}")


def test_encodings_are_named_by_commas():
    assert encodings(None) == ["utf-8"]
    assert encodings("utf-8, cp1252") == ["utf-8", "cp1252"]


@pytest.mark.parametrize(
    "source, name",
    [
        ("My Poems.txt", "My-Poems"),
        ("a/b/letters", "letters"),
        ("novels/*.txt", "novels"),
        ("novels/**/*.txt", "novels"),
        ("POEMS.TXT.GZ", "POEMS"),
        ("*.txt", "text"),
        ("poems.txt.gz", "poems"),
        ("src.tar.xz", "src"),
        ("names.zip", "names"),
        ("v1.5.tgz", "v1.5"),
        ("-", "stdin"),
        ("...", "text"),
    ],
)
def test_the_folders_name_is_safe(source, name):
    assert folder_name(source) == name


def test_a_name_with_brackets_is_that_of_the_file_if_there_is_one(tmp_path):
    (tmp_path / "a[1].txt").write_text("text")
    assert folder_name("a[1].txt") == "a-1" and list(read("a[1].txt")) == ["a[1].txt"]


def test_a_glob_passes_over_empty_folders_and_links_to_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "t.txt").write_text("text")
    assert list(read("*")) == list(read("**")) == ["t.txt"]


def test_what_cannot_be_unpacked_in_an_archive_leaves_the_rest_as_it_is(tmp_path):
    make_zip(tmp_path / "t.zip", {"a.txt": b"one", "b.zip": b"no zip", "c.txt": b"two"})
    texts, faults = [], []
    for item in all_items("t.zip"):
        try:
            texts.append(b"".join(item.chunks()))
        except InputError as error:
            faults.append(str(error))
    assert texts == [b"one", b"two"]
    assert len(faults) == 1 and faults[0].startswith("t.zip: b.zip is damaged")


def test_a_near_name_is_suggested():
    with pytest.raises(InputError, match="Did you mean 'tinyshakespeare'?"):
        find("tinyshakespear", ["stdlib", "tinyshakespeare"])


def test_closed_standard_input_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="Standard input is closed"):
        read("-")


def test_what_seqlm_wrote_into_a_folder_is_not_read_from_it(run, corpus, tmp_path):
    (tmp_path / "mine.md").write_text("mine")
    assert list(read(".")) == ["./mine.md", "./story.txt"]
    assert "data/story/manifest.json" in read("data/story"), "but where that folder is named"


@pytest.mark.parametrize("damage", ["bit", "cut"])
def test_a_damaged_header_in_a_tar_is_not_its_end(tmp_path, damage):
    make_tar(tmp_path / "t.tar", {"a.txt": b"one", "b.txt": b"two", "c.txt": b"three"})
    data = bytearray((tmp_path / "t.tar").read_bytes())
    place = data.index(b"b.txt")
    data = data[: place + 100] if damage == "cut" else data
    data[place] ^= 1
    (tmp_path / "t.tar").write_bytes(data)
    with pytest.raises(InputError, match="t.tar is damaged, or not what its name says"):
        read("t.tar")


def test_a_zip_with_a_file_without_a_name_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        for name, text in ("a.txt", b"text"), ("", b" and more"):
            with archive.open(zipfile.ZipInfo(name), "w") as file:
                file.write(text)
    assert list(read("t.zip").values()) == [b"text", b" and more"]


def test_a_pattern_passes_over_what_seqlm_wrote_too(run, corpus):
    for pattern in ("data/*", "data/**", "checkpoints/**", "*/**"):
        with pytest.raises(InputError, match="neither a file"):
            find(pattern)
