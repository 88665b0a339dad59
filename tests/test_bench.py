"""The benchmark measures what it says: contenders that work, turns, ratios, memory."""

from contextlib import nullcontext
from multiprocessing import Pipe, active_children
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

from seqlm.errors import SeqlmError
from seqlm.lab import bench, contenders
from seqlm.lab.contenders import (
    DECODING,
    GATING,
    GATING_BACK,
    GROUPS,
    LAYER,
    SCANNING,
    TRAINING,
)
from seqlm.training import launch

TINY = {"model.width": 16, "model.layers": 1, "train.batch": 2, "train.length": 8}
TINY |= {"model.conv": 0, "runtime.threads": 1}


def configured(cell="mingru", **more):
    return launch.configuration(None, None, {**TINY, "cell.name": cell, **more})[0]


def own(group, config):
    return [one for one in GROUPS[group] if one.package is None and one.beside(config)]


@pytest.mark.parametrize("cell", ["mingru", "minlstm", "lem", "cfc", "lem, diagonal"])
@pytest.mark.parametrize("group", [TRAINING, LAYER, SCANNING, DECODING])
def test_every_contender_that_needs_no_package_works(group, cell, tmp_path):
    cell, diagonal, _ = cell.partition(", diagonal")
    config = configured(cell, **{"cell.recurrence": "diagonal"} if diagonal else {})
    for one in own(group, config):
        work = one.build(config)
        work.call()
        assert work.characters is None or work.characters > 0


def test_a_training_step_of_seqlm_changes_the_weights():
    work = contenders.seqlm_step(configured())
    learner = work.call.func.__self__
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    work.call()
    assert work.characters == 16 and work.parameters == sum(p.numel() for p in before.values())
    assert not any(torch.equal(before[n], p) for n, p in learner.model.named_parameters())


def test_who_is_measured_depends_on_the_cell_and_the_shape():
    def names(group, **options):
        config = configured(**options)
        return {one.name for one in GROUPS[group] if one.beside(config)}

    assert "minGRU-pytorch" in names(TRAINING) and "minGRU-pytorch" in names(DECODING)
    assert "minGRU-pytorch" not in names(TRAINING, cell="lem") | names(TRAINING, cell="mingru,lem")
    assert "minGRU-pytorch" not in names(DECODING, **{"model.conv": 4})
    assert "ncps CfC" in names(LAYER, cell="cfc") and "ncps CfC" not in names(LAYER)
    solvers = {"seqlm, Newton's method", "seqlm, step by step"}
    assert solvers <= names(LAYER, cell="lem", **{"cell.recurrence": "diagonal"})
    assert not solvers & names(LAYER, cell="lem")
    assert "seqlm, float32" not in names(TRAINING, **{"runtime.dtype": "float32"})
    assert "seqlm, float32" in names(TRAINING, **{"runtime.dtype": "bfloat16"})


def test_what_is_not_installed_is_named_and_left_out(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert bench.missing(configured(), [*GROUPS]) == ["minGRU-pytorch"]
    assert bench.missing(configured("cfc"), [*GROUPS]) == ["ncps CfC"]
    monkeypatch.setattr(bench, "find_spec", lambda name: name)
    assert bench.missing(configured(), [*GROUPS]) == []


@pytest.mark.parametrize(
    "said, message",
    [
        ("ValueError: no", "nn.GRU fails here: ValueError: no. Choose another shape"),
        (None, "nn.GRU ended without a word; was there enough memory"),
    ],
)
def test_a_contender_that_fails_ends_it_with_its_words(said, message):
    ours, theirs = Pipe()
    if said is not None:
        theirs.send(said)
    theirs.close()
    one = next(one for one in GROUPS[LAYER] if one.name == "nn.GRU")
    with pytest.raises(SeqlmError) as error:
        bench._answer(ours, one)
    assert message in str(error.value)


def test_times_are_medians_of_what_a_turn_took_over_the_first_contenders(monkeypatch):
    seconds = {"seqlm": [1.0, 2.0, 4.0], "floor: torch.add(a, b, out=c)": [3.0, 2.0, 10.0]}
    turns = {name: iter(taken) for name, taken in seconds.items()}
    monkeypatch.setattr(bench, "TURNS", 3)
    monkeypatch.setattr(bench, "_process", lambda group, one, config: nullcontext(one))
    characters = dict(zip(seconds, (6, 3), strict=True))

    def said(told, one, word=None):
        work = {"dtype": "float32", "characters": characters[one.name], "parameters": 5}
        work["bytes"] = None
        return (work, 77) if word is None else next(turns[one.name])

    monkeypatch.setattr(bench, "_answer", said)
    first, second = next(bench.bench(configured(), groups=[SCANNING]))
    assert (first.seconds, first.times, first.characters_per_second) == (2.0, 1.0, 3.0)
    assert second.seconds == 3.0
    assert second.times == 5.0, "the median of 3, 1 and 2.5, for half as many characters"
    assert (first.memory_bytes, first.parameters, first.dtype) == (77, 5, "float32")


def test_processes_measure_and_end():
    rows = next(bench.bench(configured(), groups=[SCANNING]))
    assert [row.contender for row in rows] == [one.name for one in GROUPS[SCANNING]]
    assert all(row.seconds > 0 for row in rows)
    assert rows[0].memory_bytes > 4 * 16 * 1024 * 512, "the scan's result at least"
    assert not active_children()


def test_another_that_fails_is_named_and_left_out(monkeypatch):
    def said(told, one, word=None):
        if one.name == "nn.GRU":
            raise SeqlmError("nn.GRU fails here")
        work = {"dtype": "float32", "characters": 1, "parameters": 1, "bytes": None}
        return (work, 1) if word is None else 1.0

    monkeypatch.setattr(bench, "_process", lambda group, one, config: nullcontext(one))
    monkeypatch.setattr(bench, "_answer", said)
    heard = []
    rows = next(bench.bench(configured(), groups=[LAYER], failed=heard.append))
    assert heard == ["nn.GRU fails here"] and "nn.GRU" not in [row.contender for row in rows]
    theirs = next(one for one in GROUPS[LAYER] if one.name == "nn.GRU")
    monkeypatch.setattr(bench, "_answer", lambda *_: said(None, theirs))
    with pytest.raises(SeqlmError, match="nn.GRU fails here"):  # seqlm's own, here
        next(bench.bench(configured(), groups=[LAYER], failed=heard.append))


@pytest.mark.parametrize("width", [16, 100, 200])
def test_the_transformers_heads_divide_any_width(width):
    contenders.recomputed(configured(**{"model.width": width})).call()


def test_a_device_that_is_not_there_is_refused(seqlm_command):
    result = seqlm_command("bench", "--device", "cuda")
    assert result.code == 2 and "--device cuda: torch finds no such device here" in result.err


def test_what_only_a_gpu_is_asked_works_on_the_cpu_too(monkeypatch):
    """Its call, its dtype and the bytes of float32 numbers: 3 there, 6 back, 2 for a copy."""
    monkeypatch.setattr(contenders, "GATED", (2, 3, 4))
    config = configured(**{"runtime.dtype": "float32"})
    for group, numbers in ((GATING, [3, 2]), (GATING_BACK, [6, 2])):
        assert group not in bench.groups_of(config)
        works = [one.build(config) for one in GROUPS[group] if one.package is None]
        for work in works:
            work.call()
        elements = [4 * 24, 4 * 24 * 2]  # a copy is of the drive
        assert [w.bytes for w in works] == [n * e for n, e in zip(numbers, elements, strict=True)]
    monkeypatch.setattr(contenders, "_gpu", lambda config: True)
    contenders.looped_layer(config).call()


def test_bytes_are_what_counts_where_they_are_known(monkeypatch):
    seconds = {"seqlm": 1.0, "floor: copying": 3.0}
    sizes = {"seqlm": 300, "floor: copying": 1200}
    monkeypatch.setattr(bench, "_process", lambda group, one, config: nullcontext(one))
    monkeypatch.setattr(contenders, "device_of", lambda config: "cuda")

    def said(told, one, word=None):
        work = {"dtype": "float32", "characters": None, "parameters": None}
        return ({**work, "bytes": sizes[one.name]}, 1) if word is None else seconds[one.name]

    monkeypatch.setattr(bench, "_answer", said)
    first, floor = bench._measure(GATING, configured(), print, [*seconds])
    assert (first.bytes_per_second, floor.bytes_per_second) == (300, 400)
    assert floor.times == 0.75, "for as many bytes"


def test_lengths_keep_the_characters_of_a_step(seqlm_command, monkeypatch):
    """In threads of this process, which says nothing of memory."""

    def spawned(work, *given, daemon):
        ours, theirs = Pipe()
        thread = Thread(target=work, args=[theirs, *given], daemon=daemon)
        thread.start()
        return SimpleNamespace(join=thread.join, kill=lambda: None), ours

    monkeypatch.setattr(bench, "spawned", spawned)
    options = ["--width", 16, "--layers", 1, "--batch", 4, "--length", 16, "--threads", 1]
    result = seqlm_command("bench", *options, "--lengths", "16,32", "--json")
    rows = [row for row in result.json["rows"] if row["contender"] == "seqlm"]
    assert [(row["batch"], row["length"]) for row in rows] == [(4, 16), (2, 32)]
    for row in rows:
        assert row["characters_per_second"] == pytest.approx(64 / row["seconds"])
        assert row["group"] == TRAINING and row["times"] == 1
    assert result.json["chars_per_second"] == rows[0]["characters_per_second"]
    assert {"cell", "width", "layers", "turns", "processor", "threads", "torch"} <= {*result.json}


@pytest.mark.parametrize("lengths", ["0", "16,x", "-4"])
def test_lengths_that_cannot_be_are_refused(seqlm_command, lengths):
    result = seqlm_command("bench", "--lengths", lengths)
    assert result.code == 2
    assert f"--lengths {lengths}: write whole numbers above 0, such as 256,1024" in result.err
