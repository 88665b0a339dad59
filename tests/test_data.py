"""prepare.py and data.py: a corpus on disk, found, verified and cut into batches."""

import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import sentences
from killing import kills

from seqlm import temporary
from seqlm.config import TrainConfig
from seqlm.errors import InputError, UsageError
from seqlm.files import to_json
from seqlm.manifest import seal, spot_sha256
from seqlm.temporary import PREFIX
from seqlm.text.corpus import find_corpus, narrowest, newest, open_corpus
from seqlm.text.prepare import prepare
from seqlm.training.batches import IGNORED, RESTARTS, Ahead, Batches, DocumentBatches, Rows


def test_a_prepared_corpus_gives_the_text_back(corpus):
    opened = open_corpus(corpus)
    text = sentences(4000)
    parts = {split: opened.tokenizer.decode(opened.symbols(split)) for split in opened.splits}
    assert parts == {"train": text[:3600], "val": text[3600:3800], "test": text[3800:]}
    counts = opened.splits["val"]
    assert (counts["chars"], counts["bytes"], counts["tokens"]) == (200, 200, 200)


def test_characters_bytes_and_symbols_are_counted_apart(tmp_path):
    (tmp_path / "t.txt").write_text("é🙂a" * 100, encoding="utf-8")
    char = prepare(["t.txt"])[1]["splits"]["train"]
    byte = prepare(["t.txt"], unit="byte")[1]["splits"]["train"]
    assert (char["chars"], char["bytes"], char["tokens"]) == (270, 630, 270)
    assert (byte["chars"], byte["bytes"], byte["tokens"]) == (270, 630, 630)
    assert char["sha256"] == byte["sha256"], "the same split, whatever the unit"


def test_bytes_that_are_not_text_have_no_characters(tmp_path):
    (tmp_path / "t.bin").write_bytes(b"\xff\xfe\x00" * 100)
    folder, manifest, _ = prepare(["t.bin"], unit="byte")
    assert manifest["splits"]["train"]["chars"] is None
    assert folder.name == "t.bin-byte"


@pytest.mark.parametrize(
    "size, dtype", [(2, "|u1"), (256, "|u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")]
)
def test_symbols_are_kept_in_the_narrowest_type(size, dtype):
    assert narrowest(size) == dtype


def test_a_large_alphabet_is_kept_in_two_bytes(tmp_path):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    folder = prepare(["t.txt"])[0]
    assert (folder / "train.bin").stat().st_size == 900 * 2
    assert open_corpus(folder).tokenizer.decode(open_corpus(folder).symbols("val")) == text[900:950]


@pytest.mark.parametrize("content", ["", "x", "ten chars."])
def test_a_text_too_short_to_split_is_refused_and_leaves_nothing(tmp_path, content):
    (tmp_path / "t.txt").write_text(content)
    with pytest.raises(InputError, match="empty|too short"):
        prepare(["t.txt"])
    assert not (tmp_path / "data").exists()


def test_eleven_characters_are_enough(tmp_path):
    (tmp_path / "t.txt").write_text("eleven char")
    counts = prepare(["t.txt"])[1]["splits"]
    assert [counts[split]["chars"] for split in counts] == [9, 1, 1]


def test_an_existing_corpus_is_kept_unless_forced(tmp_path, text_file):
    folder = prepare([str(text_file)])[0]
    before = (folder / "manifest.json").read_bytes()
    text_file.write_text(sentences(5000, seed=1))
    with pytest.raises(UsageError, match="exists. Replace it with --force"):
        prepare([str(text_file)])
    assert (folder / "manifest.json").read_bytes() == before
    prepare([str(text_file)], force=True)
    assert open_corpus(folder).splits["train"]["chars"] == 4500
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["story"], "no leftovers"


def test_a_file_of_the_users_is_not_deleted_by_force(text_file):
    folder = prepare([str(text_file)])[0]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="also holds notes.txt, which --force would delete"):
        prepare([str(text_file)], force=True)
    (folder / "notes.txt").unlink()
    for name in ("embeddings.bin", "mine.ends", "train.bin.old"):
        (folder / name).write_text("mine")
        with pytest.raises(UsageError, match=f"also holds {name}, which --force would delete"):
            prepare([str(text_file)], force=True)
        (folder / name).unlink()
    (folder / "test.ends").mkdir()
    (folder / "test.ends/file").write_text("mine")
    with pytest.raises(UsageError, match="also holds test.ends, which --force would delete"):
        prepare([str(text_file)], force=True)
    assert (folder / "test.ends/file").read_text() == "mine"
    shutil.rmtree(folder / "test.ends")
    prepare([str(text_file)], force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_made_while_a_corpus_is_prepared_is_kept(text_file, force):
    made = []

    def make(share, word):
        if not made:
            made.append(Path("data/story"))
            made[0].mkdir()
            (made[0] / "notes.txt").write_text("mine")

    with pytest.raises(UsageError, match="data/story exists and is not a corpus"):
        prepare([str(text_file)], force=force, tick=make)
    assert [path.name for path in Path("data").iterdir()] == ["story"]
    assert (made[0] / "notes.txt").read_text() == "mine"


def test_a_corpus_made_in_the_meantime_is_kept_unless_forced(text_file, corpus):
    """As if another process had finished between the first look and the last."""
    away, before = Path("elsewhere"), (corpus / "manifest.json").read_bytes()
    for force in (False, True):
        corpus.rename(away)
        text_file.write_text(sentences(5000, seed=1))
        come = iter([lambda: away.rename(corpus)])

        def back(share, word, come=come):
            next(come, lambda: None)()

        if force:
            prepare([str(text_file)], force=True, tick=back)
            assert open_corpus(corpus).splits["train"]["chars"] == 4500
        else:
            with pytest.raises(UsageError, match="data/story exists. Replace it with --force"):
                prepare([str(text_file)], tick=back)
            assert (corpus / "manifest.json").read_bytes() == before
    assert [path.name for path in Path("data").iterdir()] == ["story"]


def test_a_second_prepare_of_one_corpus_is_refused_while_the_first_works(text_file, seqlm_command):
    results = []

    def second(share, word):
        if not results:
            results.append(seqlm_command("prepare", text_file, "--force"))

    prepare([str(text_file)], tick=second)
    assert results[0].code == 2
    assert "Another process is writing data/story. Wait for it, or" in results[0].err
    assert open_corpus(Path("data/story")).label == "story"


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    """Both ways to replace a folder: in one call, and where the system has no such call."""
    if request.param == "two renames":
        monkeypatch.setattr(temporary, "_exchange", lambda one, other: False)


def test_wherever_prepare_force_is_killed_a_whole_corpus_stands(corpus, tmp_path, way):
    """The old one or the new one is found, by name and as the newest, and nothing else is left."""
    shutil.copytree("data", "before")
    (tmp_path / "story.txt").write_text(sentences(500, seed=1))

    def afresh():
        shutil.rmtree("data")
        shutil.copytree("before", "data")

    old, found = open_corpus(corpus).fingerprint, set()
    for k in kills(afresh, lambda: prepare(["story.txt"], force=True)):
        found.add(open_corpus(find_corpus("story") if k % 2 else newest()).fingerprint)
        temporary.sweep(Path("data"))
        assert [path.name for path in Path("data").iterdir()] == ["story"], k
    assert k >= 14 and len(found) == 2 and old in found


def test_wherever_a_first_prepare_is_killed_a_second_one_works(tmp_path):
    (tmp_path / "t.txt").write_text("eleven char")
    for k in kills(lambda: shutil.rmtree("data", True), lambda: prepare(["t.txt"])):
        assert newest() is None or open_corpus(newest()), k
        prepare(["t.txt"], force=True)
        assert [path.name for path in Path("data").iterdir()] == ["t"], k


def test_a_corpus_that_is_replaced_while_it_is_read_is_the_old_one_or_the_new(
    corpus, tmp_path, monkeypatch, way
):
    """It is replaced at each of the reads in turn that open and verify it."""
    from seqlm.text import corpus as module

    (tmp_path / "story.txt").write_text(sentences(500, seed=1))
    (tmp_path / "story2.txt").write_text(sentences(600, seed=2))
    names = ["read_sealed", "load_tokenizer", "refuse_changed", "_mapped"]
    for name in names:
        real, texts = getattr(module, name), iter(["story.txt", "story2.txt"])

        def replaced(*arguments, real=real, texts=texts):
            text = next(texts, None)
            if text is not None:
                prepare([text], out=corpus, force=True)
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, replaced)
            opened = open_corpus(corpus)
        counts = opened.splits["train"]
        assert len(opened.symbols("train")) == counts["tokens"] == 540
        prepare(["story.txt"], out=corpus, force=True)
        opened.verify("train")
        text = opened.tokenizer.decode_bytes(opened.symbols("train"))
        assert hashlib.sha256(text).hexdigest() == counts["sha256"]


def test_a_failure_leaves_none_of_the_folders_it_made(tmp_path):
    (tmp_path / "t.txt").write_text("short")
    with pytest.raises(InputError, match="too short"):
        prepare(["t.txt"], out=Path("one/two/three"))
    assert not Path("one").exists()


def test_a_failure_half_way_leaves_the_old_corpus_and_no_part_of_the_new(
    tmp_path, text_file, monkeypatch
):
    folder = prepare([str(text_file)])[0]
    monkeypatch.setattr("seqlm.text.prepare.seal", lambda manifest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare([str(text_file)], force=True)
    monkeypatch.undo()
    os.chdir(tmp_path)
    open_corpus(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["story"]


def test_preparing_twice_gives_the_same_bytes(tmp_path, text_file):
    one, two = (prepare([str(text_file)], out=tmp_path / name)[0] for name in ("one", "two"))
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_damaged_file_of_a_corpus_is_named(corpus, name, damage):
    path = corpus / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            data[:-1] if damage == "cut" else data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
        )
    with pytest.raises(InputError, match=f"{name} (is missing|was cut or changed)"):
        open_corpus(corpus)


def test_a_changed_manifest_is_refused(corpus):
    path = corpus / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["val"]["chars"] = 7
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="manifest.json was changed after it was written"):
        open_corpus(corpus)
    path.write_text(path.read_text()[:50])
    with pytest.raises(InputError, match="manifest.json is damaged: it is not valid JSON"):
        open_corpus(corpus)


def test_a_corpus_is_found_by_path_by_name_and_as_the_newest(corpus, tmp_path):
    (tmp_path / "other.txt").write_text(sentences(400))
    other = prepare(["other.txt"])[0]
    os.utime(corpus / "manifest.json", (0, 0))
    assert find_corpus("story") == find_corpus("data/story") == corpus
    assert newest() == other
    with pytest.raises(InputError, match="neither nothing nor data/nothing is a prepared corpus"):
        find_corpus("nothing")


def test_what_a_kill_left_behind_is_no_corpus(corpus):
    aside = corpus.parent / f"{PREFIX}00000000/story"
    aside.mkdir(parents=True)
    corpus.rename(aside / "new")
    assert newest() is None


def test_where_nothing_is_prepared_nothing_is_found():
    assert newest() is None


def test_an_unknown_split_names_those_there_are(corpus):
    with pytest.raises(UsageError, match="no valid split. Choose one of: train, val, test"):
        open_corpus(corpus).symbols("valid")


SYMBOLS = np.arange(1000, dtype=np.uint16)
BEGINNING = 1000


def batches(state, batch=4, length=10, seed=0, accumulate=1):
    options = dict(batch=batch, length=length, state=state, seed=seed, accumulate=accumulate)
    return Batches(SYMBOLS, TrainConfig(**options), BEGINNING)


@pytest.mark.parametrize("state", ["carry", "reset"])
def test_targets_are_the_inputs_next_symbols(state):
    for step in range(60):
        (rows,) = batches(state).at(step)
        assert np.array_equal(rows.inputs[:, 1:], rows.targets[:, :-1])
        assert (np.diff(rows.targets) % 1000 == 1).all(), "the text's start follows its end"
        first = rows.inputs[:, 0]
        assert (first == np.where(rows.fresh, BEGINNING, (rows.targets[:, 0] - 1) % 1000)).all()
        assert rows.streams.tolist() == [0, 1, 2, 3] and rows.kept.all()


@pytest.mark.parametrize("state", ["carry", "reset"])
def test_batches_made_ahead_are_those_that_are_asked_for(state):
    ahead, found = Ahead(batches(state, accumulate=2)), batches(state, accumulate=2)
    for step in (0, 1, 2, 7, 7, 8, 3):
        for made, expected in zip(ahead.at(step), found.at(step), strict=True):
            assert all(map(np.array_equal, made, expected))


def test_carried_streams_go_on_where_they_ended():
    found = batches("carry")
    for step in range(found.steps_per_epoch - 1):
        (this,), (following,) = found.at(step), found.at(step + 1)
        expected = np.where(following.fresh, BEGINNING, this.targets[:, -1])
        assert np.array_equal(following.inputs[:, 0], expected)


def test_one_in_a_hundred_carried_streams_restarts_in_a_step():
    found = batches("carry", batch=20, length=1)  # 50 steps in an epoch
    fresh = np.array([found.at(step)[0].fresh for step in range(1000) if step % 50])
    assert 0.5 * RESTARTS < fresh.mean() < 2 * RESTARTS
    assert fresh.any(axis=0).all(), "every stream restarts"
    assert fresh.sum(axis=1).max() < 5, "streams restart in different steps"


def test_an_epoch_reads_every_stream_once_and_the_next_starts_afresh_elsewhere():
    found = batches("carry", batch=3, length=7)
    seen = np.concatenate([found.at(s)[0].targets.ravel() for s in range(found.steps_per_epoch)])
    assert len(np.unique(seen)) == len(seen) == 47 * 21
    starts = {int(found.at(e * found.steps_per_epoch)[0].targets[0, 0]) for e in range(20)}
    assert found.at(found.steps_per_epoch)[0].fresh.all() and len(starts) > 3


def test_micro_batches_are_the_batch_in_parts():
    (whole,), parts = batches("carry").at(3), batches("carry", accumulate=2).at(3)
    assert [len(part.inputs) for part in parts] == [2, 2]
    for name in Rows._fields:
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(joined, getattr(whole, name))


@pytest.mark.parametrize("state", ["carry", "reset"])
def test_batches_are_a_function_of_seed_and_step(state):
    one, two, other = batches(state), batches(state), batches(state, seed=1)
    for step in (30, 3):
        assert np.array_equal(one.at(step)[0].targets, two.at(step)[0].targets)
    assert any(not np.array_equal(one.at(s)[0].targets, other.at(s)[0].targets) for s in range(3))


def test_reset_windows_start_anywhere():
    starts = [batches("reset").at(step)[0].targets[:, 0] for step in range(300)]
    assert np.min(starts) < 20 and np.max(starts) > 970


# Documents: their symbols count up in tens of thousands by document, and from 0 within one


def documents(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    symbols = [number * 10_000 + np.arange(size) for number, size in enumerate(sizes)]
    return np.concatenate(symbols), np.cumsum(sizes)


SIZES = [int(n) for n in np.random.default_rng(0).choice([1, 3, 8, 20, 64, 65, 500], 150)]


def document_batches(sizes=SIZES, state="carry", batch=3, length=64, seed=0, accumulate=1):
    options = dict(batch=batch, length=length, state=state, seed=seed, accumulate=accumulate)
    return DocumentBatches(*documents(sizes), TrainConfig(**options), beginning=-1)


def rows_of(found: DocumentBatches, step: int) -> list[tuple]:
    """(inputs, targets, stream, fresh, kept) of every row of a step, without what is ignored."""
    rows = []
    for part in found.at(step):
        for inputs, targets, _, stream, fresh, kept in zip(*part, strict=True):
            size = int((targets != IGNORED).sum())
            assert (targets[size:] == IGNORED).all()
            if not size:
                assert fresh and not kept, "a row that holds nothing leaves nothing"
                continue
            rows.append((inputs[:size], targets[:size], int(stream), bool(fresh), bool(kept)))
    return rows


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_document_begins_in_a_row_of_its_own_behind_the_beginning(accumulate):
    found = document_batches(accumulate=accumulate)
    for step in range(2 * found.steps_per_epoch):
        for inputs, targets, _, fresh, _ in rows_of(found, step):
            assert len(set(targets // 10_000)) == 1 and (np.diff(targets) == 1).all()
            assert np.array_equal(inputs[1:], targets[:-1]) and len(targets) <= 64
            begins = targets[0] % 10_000 == 0
            assert inputs[0] == (-1 if begins else targets[0] - 1)
            assert fresh or not begins


def test_a_long_document_goes_on_in_its_stream():
    found, waiting = document_batches(), {}
    for step in range(2 * found.steps_per_epoch):
        if step % found.steps_per_epoch == 0:
            waiting = {}  # an epoch begins afresh
        rows = rows_of(found, step)
        for _, targets, stream, fresh, _ in rows:
            if not fresh:
                assert targets[0] == waiting.pop(stream) + 1
        assert not waiting, "no document is left in its middle"
        for _, targets, stream, _, kept in rows:
            if kept:
                assert len(targets) == 64, "a padded row has no last state"
                assert stream not in waiting
                waiting[stream] = targets[-1]
            else:
                assert targets[-1] % 10_000 == SIZES[targets[-1] // 10_000] - 1


def test_in_state_reset_every_row_is_fresh():
    found = document_batches(state="reset")
    for step in range(found.steps_per_epoch):
        assert all(fresh for _, _, _, fresh, _ in rows_of(found, step))


def test_an_epoch_reads_nearly_everything_once_and_in_another_order_than_the_next():
    found = document_batches()
    epochs = []
    for epoch in range(2):
        steps = range(epoch * found.steps_per_epoch, (epoch + 1) * found.steps_per_epoch)
        read = np.concatenate([t for step in steps for _, t, *_ in rows_of(found, step)])
        assert len(np.unique(read)) == len(read) > 0.95 * sum(SIZES)
        epochs.append(read)
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("sizes", [[1000], [1023], [700, 300, 90], [128, 127, 127]])
@pytest.mark.parametrize("state, batch", [("carry", 3), ("reset", 3), ("carry", 1)])
def test_every_symbol_of_a_document_is_learned_in_some_epoch_or_other(sizes, state, batch):
    """The end of a train split of one document was left over in every epoch."""
    found, read = document_batches(sizes, state, batch), []
    for step in range(40 * found.steps_per_epoch):
        rows = rows_of(found, step)
        assert rows, "no step has nothing to learn"
        read += [targets for _, targets, *_ in rows]
    numbers, counts = np.unique(np.concatenate(read), return_counts=True)
    assert np.array_equal(numbers, np.sort(documents(sizes)[0]))
    assert counts.min() > 10 and counts.max() <= 40


@pytest.mark.parametrize("sizes", [SIZES, [5] * 1000, [300, 2] * 40, [7] * 500 + [400]])
def test_micro_batches_have_few_shapes_and_a_bounded_area(sizes):
    found = document_batches(sizes, batch=4, accumulate=2)
    area, symbols, shapes = 0, 0, set()
    for step in range(3 * found.steps_per_epoch):
        for part in found.at(step):
            shapes.add(part.inputs.shape)
            area, symbols = area + part.inputs.size, symbols + (part.targets != IGNORED).sum()
    assert max(rows * width for rows, width in shapes) <= 4 * 64 // 2
    assert len(shapes) < 25
    assert area < 2.5 * symbols, "not too much is computed for nothing"
    assert 0.8 < symbols / (3 * found.steps_per_epoch * 4 * 64) < 1.1


def test_document_batches_are_a_function_of_seed_and_step():
    one, two, other = document_batches(), document_batches(), document_batches(seed=1)
    for step in (40, 2):
        for mine, yours in zip(one.at(step), two.at(step), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(mine, yours, strict=True))
    assert not np.array_equal(one.at(0)[0].targets, other.at(0)[0].targets)


@pytest.mark.parametrize(
    "batch, length, fits",
    [
        (20, 100, "--batch 20 --length 50, or --batch 10 --length 100"),
        (2000, 100, "--batch 10 --length 100"),
        (2, 2000, "--batch 2 --length 500"),
        (2000, 2000, "--batch 1 --length 1000"),
    ],
)
def test_a_text_too_small_for_a_batch_names_the_largest_that_fits(batch, length, fits):
    sizes = [10] * 100
    for make in (partial(batches, "carry"), partial(document_batches, sizes, "carry")):
        with pytest.raises(InputError) as error:
            make(batch, length)
        assert str(error.value).endswith(f"The largest that fit: {fits}.")
        for option in fits.split(", or "):
            _, b, _, n = option.split()
            assert make(int(b), int(n)).at(0)


# Size


def sparse_corpus(corpus, symbols: int) -> None:
    """Make the train split of a prepared corpus so long, of symbol 0 but for its last ones."""
    path, manifest = corpus / "train.bin", json.loads((corpus / "manifest.json").read_text())
    with path.open("r+b") as file:
        file.truncate(symbols)
        file.seek(symbols - 100)
        file.write(bytes([1]) * 100)
    files = manifest["files"]["train.bin"]
    files["bytes"], files["spot_sha256"] = symbols, spot_sha256(path)
    manifest["splits"]["train"]["tokens"] = symbols
    (corpus / "manifest.json").write_text(to_json(seal(manifest)))


def test_a_token_file_over_4_gb_is_read_to_its_end(corpus):
    sparse_corpus(corpus, 5_000_000_000)
    symbols = open_corpus(corpus).symbols("train")
    assert len(symbols) == 5_000_000_000
    found = Batches(symbols, TrainConfig(batch=4, length=10), BEGINNING)
    firsts = [found.at(e * found.steps_per_epoch)[0].targets for e in range(3)]
    assert all(first.shape == (4, 10) for first in firsts)
    last = Batches(symbols, TrainConfig(batch=1, length=100), BEGINNING)._cut(
        np.array([len(symbols) - 100]), fresh=np.array([False])
    )
    assert (last[0].targets == 1).all() and last[0].inputs[0, 0] == 0


def test_opening_a_corpus_reads_no_more_of_a_large_one(corpus, monkeypatch):
    sparse_corpus(corpus, 300_000_000)
    read = []
    with monkeypatch.context() as patch:
        whole = {"sha256": lambda path: pytest.fail(f"{path} is read whole")}
        spots = {"spot_sha256": lambda p: read.append(p) or spot_sha256(p)}
        patch.setattr("seqlm.manifest.HASHES", {**whole, **spots})
        opened = open_corpus(corpus)
    assert len(read) == len(opened.manifest["files"])
    with pytest.raises(InputError, match="train.bin was cut or changed"):
        opened.verify("train")
