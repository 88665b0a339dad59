"""Downloads, from an HTTP server in this process: whole, cut, resumed, wrong, missing."""

import hashlib
import http.server
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from killing import kills

from seqlm.errors import InputError
from seqlm.text import corpora, download
from seqlm.text.corpora import Known, choose
from seqlm.text.download import NoDownload, fetch
from seqlm.text.prepare import prepare
from seqlm.text.staging import Draft

BODY = b"".join(b"line %d of the corpus\n" % i for i in range(50_000))


@dataclass
class Server:
    """What the server has and does, and what it was asked for."""

    body: bytes = BODY
    cut_after: list[int] = field(default_factory=list)  # bytes that the next answers give
    status: int | None = None  # answered instead of the body
    ranges: bool = True  # understands Range
    slices: int | None = None  # the most bytes that a range gives
    says_total: bool = True  # of a range
    version: str | None = None  # the ETag
    packed: bool = False  # says that it packs what it sends
    lies: bool = False  # answers with another range than asked for
    says_length: bool = True
    asked: list[str | None] = field(default_factory=list)  # the Range of every request
    address: str = ""


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            state.asked.append(asked)
            if state.status:
                self.send_error(state.status)
                return
            wanted = self.headers.get("If-Range", state.version)
            known = asked and state.ranges and wanted == state.version
            start = int(asked.removeprefix("bytes=").rstrip("-")) if known else 0
            if start >= len(state.body) and start:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(state.body)}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            body = state.body[start:]
            if start:
                first = 0 if state.lies else start
                body = body[: state.slices]
                last = start + len(body) - 1
                total = len(state.body) if state.says_total else "*"
                self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
            if state.version:
                self.send_header("ETag", state.version)
            if state.packed:
                self.send_header("Content-Encoding", "gzip")
            if state.says_length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.cut_after.pop(0)] if state.cut_after else body)

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    state.address = f"http://127.0.0.1:{running.server_address[1]}/corpus.txt"
    yield state
    running.shutdown()
    running.server_close()
    thread.join()


def quiet(share: float, word: str) -> None:
    pass


PATH = Path("downloads/corpus.txt")


def test_a_file_is_downloaded_with_progress(server):
    shares = []
    fetch(server.address, PATH, lambda share, word: shares.append(share))
    assert PATH.read_bytes() == BODY
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) > 2
    assert [path.name for path in PATH.parent.iterdir()] == ["corpus.txt"]


def test_a_cut_connection_goes_on_where_it_was(server):
    server.cut_after = [300_000, 100_000]
    fetch(server.address, PATH, quiet)
    assert PATH.read_bytes() == BODY
    assert server.asked == [None, "bytes=300000-", "bytes=400000-"]


def test_a_connection_that_brings_nothing_more_ends_and_the_next_call_goes_on(server):
    server.cut_after = [300_000, 0]
    with pytest.raises(NoDownload, match="was cut after 300,000 bytes"):
        fetch(server.address, PATH, quiet)
    assert not PATH.exists()
    fetch(server.address, PATH, quiet)
    assert PATH.read_bytes() == BODY and server.asked[-1] == "bytes=300000-"


def test_a_server_that_does_not_resume_is_read_from_the_start(server):
    server.cut_after, server.ranges = [300_000], False
    fetch(server.address, PATH, quiet)
    assert PATH.read_bytes() == BODY


def test_a_part_longer_than_the_file_is_begun_anew(server):
    PATH.parent.mkdir()
    PATH.with_name("corpus.txt.part").write_bytes(b"x" * (len(BODY) + 5))
    fetch(server.address, PATH, quiet)
    assert PATH.read_bytes() == BODY


def test_a_server_that_gives_slices_is_asked_for_all_of_them(server):
    server.cut_after, server.slices = [300_000], 200_000
    fetch(server.address, PATH, quiet)
    assert PATH.read_bytes() == BODY and len(server.asked) == 2 + (len(BODY) - 300_001) // 200_000


def test_ranges_that_do_not_say_the_whole_size_are_read_to_the_end(server):
    server.cut_after, server.says_total, server.slices = [300_000, 50_000], False, 200_000
    fetch(server.address, PATH, quiet)
    assert PATH.read_bytes() == BODY


def test_a_part_without_a_length_that_is_cut_goes_on(server):
    server.cut_after, server.says_length = [300_000, 5_000, 7_000], True
    PATH.parent.mkdir()
    PATH.with_name("corpus.txt.part").write_bytes(BODY[:1000])
    server.says_length = False
    fetch(server.address, PATH, quiet)
    assert PATH.read_bytes() == BODY


def test_parts_of_two_versions_are_not_put_together(server):
    server.version, server.cut_after = '"one"', [300_000, 0]
    with pytest.raises(NoDownload):
        fetch(server.address, PATH, quiet)
    server.version, server.body = '"two"', BODY[::-1]
    fetch(server.address, PATH, quiet)
    assert PATH.read_bytes() == BODY[::-1]
    assert [path.name for path in PATH.parent.iterdir()] == ["corpus.txt"]


def test_a_part_that_is_all_of_it_is_not_downloaded_again(server):
    PATH.parent.mkdir()
    PATH.with_name("corpus.txt.part").write_bytes(BODY)
    fetch(server.address, PATH, quiet)
    assert PATH.read_bytes() == BODY and server.asked == [f"bytes={len(BODY)}-"]


def test_a_packed_answer_is_not_taken_for_the_file(server):
    server.packed = True
    with pytest.raises(NoDownload, match="answers with compressed data, which was not requested"):
        fetch(server.address, PATH, quiet)


def test_a_server_that_gives_another_part_is_not_believed(server):
    server.cut_after, server.lies = [300_000], True
    with pytest.raises(NoDownload, match="answers with another part than the one requested"):
        fetch(server.address, PATH, quiet)


def test_a_file_whose_length_is_not_said_is_taken(server):
    server.says_length = False
    fetch(server.address, PATH, quiet)
    assert PATH.read_bytes() == BODY


@pytest.mark.parametrize("status, reason", [(404, "404 Not Found"), (500, "500 Internal")])
def test_an_error_of_the_server_is_named(server, status, reason):
    server.status = status
    with pytest.raises(NoDownload, match=f"/corpus.txt answers {reason}"):
        fetch(server.address, PATH, quiet)


def test_a_server_that_is_not_there_is_named(server, monkeypatch):
    with pytest.raises(NoDownload, match="http://127.0.0.1:1/x cannot be reached: .*refused"):
        fetch("http://127.0.0.1:1/x", PATH, quiet)
    with pytest.raises(NoDownload, match="cannot be reached"):
        fetch("http://no.such.host.invalid/x", PATH, quiet)


def test_a_server_that_falls_silent_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    import socket

    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(NoDownload, match="cannot be reached: .*timed out"),
    ):
        fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/x", PATH, quiet)


def test_a_place_that_cannot_be_written_is_named(server):
    Path("downloads").write_text("a file")
    with pytest.raises(Exception, match="Cannot write downloads/corpus.txt.part"):
        fetch(server.address, PATH, quiet)


# A corpus known by name


def fill(draft: Draft, path: str) -> None:
    data = Path(path).read_bytes()
    if hashlib.sha256(data).hexdigest() != hashlib.sha256(BODY).hexdigest():
        raise InputError(f"{path} is not it: its sha256 is another.")
    draft.append(data)
    draft.cut({"train": len(data) - 100, "val": 100})


@pytest.fixture
def known(server, monkeypatch):
    """A corpus known by name, `lines`, which the server has."""
    corpus = Known("lines", "lines", fill, server.address)
    monkeypatch.setitem(corpora.KNOWN, "lines", corpus)
    return corpus


def read() -> None:
    draft = Draft(Path("draft"))
    try:
        choose(["lines"]).fill(draft, quiet)
        assert draft.size == len(BODY)
    finally:
        draft.close()


def test_a_corpus_is_downloaded_once(known, server):
    folder, _, _ = prepare(["lines"])
    assert (folder / "train.bin").stat().st_size == len(BODY) - 100
    assert known.file.read_bytes() == BODY
    assert [path.name for path in known.file.parent.iterdir()] == ["corpus.txt"]
    prepare(["lines"], unit="byte")
    assert len(server.asked) == 1, "the second unit took the download of the first"


def test_a_wrong_file_is_deleted_and_the_way_out_named(known, server):
    server.body = BODY[:-1] + b"!"
    with pytest.raises(InputError) as error:
        read()
    assert "/corpus.txt is not lines, and was deleted" in str(error.value)
    assert "its sha256 is another" in str(error.value)
    assert "seqlm prepare lines --from FILE" in str(error.value)
    assert not list(known.file.parent.iterdir())
    server.body = BODY
    read()


def test_a_download_that_changed_since_is_not_taken(known):
    read()
    known.file.write_bytes(BODY + b"more")
    with pytest.raises(InputError, match="earlier, and is no longer lines: .* Delete it to .* or"):
        read()
    assert known.file.exists(), "it is the user's to delete"


@pytest.mark.parametrize("fault", ["404", "cut", "nothing there"])
def test_a_download_that_fails_names_the_way_out(known, server, monkeypatch, fault):
    if fault == "404":
        server.status = 404
    elif fault == "cut":
        server.cut_after = [1000, 0]
    else:
        other = Known("lines", "lines", fill, "http://127.0.0.1:1/corpus.txt")
        monkeypatch.setitem(corpora.KNOWN, "lines", other)
    with pytest.raises(InputError, match="Try again, or download the file yourself, then: "):
        prepare(["lines"])
    assert not Path("data/lines").exists()


def test_a_file_given_is_taken_instead_of_a_download(known, server):
    Path("mine.txt").write_bytes(BODY)
    prepare(["lines"], file=Path("mine.txt"))
    assert server.asked == []


def test_every_known_corpus_but_the_built_in_one_has_an_address():
    addresses = [known.address for known in corpora.KNOWN.values()]
    assert addresses[0] == "" and all(addresses[1:])
    assert len({known.file for known in corpora.KNOWN.values()}) == len(corpora.KNOWN)


def test_wherever_a_download_is_killed_the_next_one_gives_the_whole_file(server, tmp_path):
    """Over what an earlier call left of an older version, of which no byte may stay."""
    folder, path = tmp_path / "kept", tmp_path / "kept/input.txt"
    server.body, server.version = b"new " * 1000, '"new"'

    def afresh():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "input.txt.part").write_bytes(b"old " * 500)
        (folder / "input.txt.from").write_text('"old"')

    def download_it():
        if not path.exists():
            fetch(server.address, path, lambda share, word: None)

    for k in kills(afresh, download_it):
        download_it()
        assert path.read_bytes() == server.body, k
        assert [p.name for p in folder.iterdir()] == ["input.txt"], k
    assert k >= 4
