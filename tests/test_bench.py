"""The benchmark: contenders, turns, relative times and memory."""

from contextlib import nullcontext
from itertools import repeat
from multiprocessing import Pipe, active_children

import pytest
import torch
from conftest import valid

from seqlm.errors import SeqlmError
from seqlm.evaluation import evaluate
from seqlm.lab import bench, contenders, learning
from seqlm.lab.contenders import (
    DECODING,
    GATING,
    GATING_BACK,
    GROUPS,
    LAYER,
    SCANNING,
    TRAINING,
)
from seqlm.training import batches, launch

TINY = {"model.width": 16, "model.layers": 1, "train.batch": 2, "train.length": 8}
TINY |= {"model.conv": 0, "runtime.threads": 1}
READY = bench.Ready("float32", characters=None, parameters=None, bytes=None, memory=77)


def configured(cell="mingru", **more):
    return launch.configuration(None, None, {**TINY, "cell.name": cell, **more})[0]


def own(group, config):
    return [one for one in GROUPS[group] if one.package is None and one.applies(config)]


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
    trainer = work.call.func.__self__
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    work.call()
    assert work.characters == 16 and work.parameters == sum(p.numel() for p in before.values())
    assert not any(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


def test_who_is_measured_depends_on_the_cell_and_the_shape():
    def names(group, **options):
        config = configured(**options)
        return {one.name for one in GROUPS[group] if one.applies(config)}

    assert "minGRU-pytorch" in names(TRAINING) and "minGRU-pytorch" in names(DECODING)
    mixed = {"cell": "mingru,lem", "model.layers": 2}
    assert "minGRU-pytorch" not in names(TRAINING, cell="lem") | names(TRAINING, **mixed)
    assert "minGRU-pytorch" not in names(DECODING, **{"model.conv": 4})
    assert "ncps CfC" in names(LAYER, cell="cfc") and "ncps CfC" not in names(LAYER)
    assert "seqlm, float32" not in names(TRAINING, **{"runtime.dtype": "float32"})
    assert "seqlm, float32" in names(TRAINING, **{"runtime.dtype": "bfloat16"})


def test_what_is_not_installed_is_named_and_left_out(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    every = [one for group in GROUPS.values() for one in group]
    assert bench.missing(configured(), every) == ["minGRU-pytorch"]
    assert bench.missing(configured("cfc"), every) == ["ncps CfC"]
    monkeypatch.setattr(bench, "find_spec", lambda name: name)
    assert bench.missing(configured(), every) == []


@pytest.mark.parametrize(
    "answer, message",
    [
        ("ValueError: no", "nn.GRU failed: ValueError: no. Choose another shape"),
        (None, "The process of nn.GRU ended without an answer; the memory may be full"),
    ],
)
def test_a_contender_that_fails_is_an_error_with_its_message(answer, message):
    ours, theirs = Pipe()
    if answer is not None:
        theirs.send(answer)
    theirs.close()
    with pytest.raises(SeqlmError) as error:
        bench.receive(ours, "nn.GRU", float)
    assert message in str(error.value)


def test_a_process_that_ended_between_two_calls_is_an_error():
    ours, theirs = Pipe()
    theirs.close()
    one = bench.Running(GROUPS[LAYER][0], ours, READY)
    with pytest.raises(SeqlmError, match="The process of seqlm ended without an answer"):
        one.time_call()


def started(ready, seconds):
    """A replacement of bench._started, with given answers and times of the contenders."""

    class Running(bench.Running):
        def time_call(self):
            return next(seconds[self.contender.name])

    return lambda group, one, config: nullcontext(Running(one, None, ready[one.name]))


def test_the_relative_time_is_the_median_over_turns_for_the_same_work(monkeypatch):
    seconds = {"seqlm": [1.0, 2.0, 4.0], "floor: torch.add(a, b, out=c)": [3.0, 2.0, 10.0]}
    turns = {name: iter(taken) for name, taken in seconds.items()}
    sizes = zip(seconds, (6, 3), strict=True)
    ready = {name: READY._replace(characters=size, parameters=5) for name, size in sizes}
    monkeypatch.setattr(bench, "TURNS", 3)
    monkeypatch.setattr(bench, "_started", started(ready, turns))
    first, second = next(bench.bench(configured(), groups=[SCANNING]))
    assert (first.seconds, first.relative_time, first.characters_per_second) == (2.0, 1.0, 3.0)
    assert second.seconds == 3.0
    assert second.relative_time == 5.0, "the median of 3, 1 and 2.5, for half as many characters"
    assert (first.memory_bytes, first.parameters, first.dtype) == (77, 5, "float32")


def test_processes_measure_and_end(monkeypatch):
    monkeypatch.setattr(bench, "TURNS", 2)
    rows = next(bench.bench(configured(), groups=[SCANNING]))
    assert [row.contender for row in rows] == [one.name for one in GROUPS[SCANNING]]
    assert all(row.seconds > 0 for row in rows)
    assert rows[0].memory_bytes > 4 * 16 * 1024 * 512, "the scan's result at least"
    assert not active_children()


def test_a_failing_contender_is_named_and_left_out_unless_it_is_seqlm(monkeypatch):
    failing = "nn.GRU"
    names = [one.name for one in GROUPS[LAYER]]
    run = started(dict.fromkeys(names, READY), dict.fromkeys(names, repeat(1.0)))

    def start(group, one, config):
        if one.name == failing:
            raise SeqlmError(f"{failing} fails here")
        return run(group, one, config)

    monkeypatch.setattr(bench, "_started", start)
    warnings = []
    rows = next(bench.bench(configured(), groups=[LAYER], warn=warnings.append))
    assert warnings == ["nn.GRU fails here"]
    assert "nn.LSTM" in [row.contender for row in rows]
    assert "nn.GRU" not in [row.contender for row in rows]
    failing = "seqlm"
    with pytest.raises(SeqlmError, match="seqlm fails here"):
        next(bench.bench(configured(), groups=[LAYER], warn=warnings.append))


def test_a_device_that_is_not_there_is_refused(seqlm_command):
    result = seqlm_command("bench", "--device", "cuda")
    assert result.code == 2 and "--device cuda: torch finds no such device here" in result.err


def test_what_only_a_gpu_is_asked_works_on_the_cpu_too(monkeypatch):
    """Its call, its dtype and the bytes of float32 numbers: 3 there, 6 back, 2 for a copy."""
    monkeypatch.setattr(contenders, "GATED_SHAPE", (2, 3, 4))
    config = configured(**{"runtime.dtype": "float32"})
    for group, numbers in ((GATING, [3, 2]), (GATING_BACK, [6, 2])):
        assert group not in bench.matching_groups(config)
        works = [one.build(config) for one in GROUPS[group] if one.package is None]
        for work in works:
            work.call()
        elements = [4 * 24, 4 * 24 * 2]  # a copy is of the drive
        assert [w.bytes for w in works] == [n * e for n, e in zip(numbers, elements, strict=True)]


def test_work_is_compared_by_bytes_where_bandwidth_is_the_limit(monkeypatch):
    seconds = {"seqlm": 1.0, "floor: copying": 3.0}
    sizes = zip(seconds, (300, 1200), strict=True)
    ready = {name: READY._replace(bytes=size) for name, size in sizes}
    turns = {name: repeat(taken) for name, taken in seconds.items()}
    monkeypatch.setattr(bench, "_started", started(ready, turns))
    monkeypatch.setattr(contenders, "device_of", lambda config: "cuda")
    first, floor = bench._measure(GATING, configured(), print, [*seconds])
    assert (first.bytes_per_second, floor.bytes_per_second) == (300, 400)
    assert floor.relative_time == 0.75, "for as many bytes"


def test_lengths_keep_the_characters_of_a_step(seqlm_command, in_threads):
    options = ["--width", 16, "--layers", 1, "--batch", 4, "--length", 16, "--threads", 1]
    result = seqlm_command("bench", *options, "--lengths", "16,32", "--json")
    rows = [row for row in result.json["rows"] if row["contender"] == "seqlm"]
    assert [(row["batch"], row["length"]) for row in rows] == [(4, 16), (2, 32)]
    for row in rows:
        assert row["characters_per_second"] == pytest.approx(64 / row["seconds"])
        assert row["group"] == TRAINING and row["relative_time"] == 1
    assert result.json["chars_per_second"] == rows[0]["characters_per_second"]
    valid("bench", result.json)


@pytest.mark.parametrize("lengths", ["0", "16,x", "-4"])
def test_lengths_that_cannot_be_are_refused(seqlm_command, lengths):
    result = seqlm_command("bench", "--lengths", lengths)
    assert result.code == 2
    assert f"--lengths {lengths}: give whole numbers above 0, such as 256,1024" in result.err


def learned(seqlm_command, *options):
    shape = ["--width", 16, "--layers", 1, "--batch", 4, "--length", 16, "--threads", 1]
    given = ["bench", "--group", "learning", "story", "--cell", "mingru", *shape, "--lr", "0.02"]
    return seqlm_command(*given, *options)


def test_every_contender_learns_for_the_given_time(corpus, seqlm_command, in_threads, monkeypatch):
    """Each step takes 1/256 s here, so that 0.2 s are 52 steps on any machine."""
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "timed", lambda call, device: (call(), 1 / 256)[1])
    result = learned(seqlm_command, "--time-limit", "0.2", "--json")
    assert result.code == 0, result.err
    assert "minGRU-pytorch is not installed" in result.err
    valid("bench-learning", result.json)
    rows = {row["contender"]: row for row in result.json["rows"]}
    protocols = {"seqlm": "stream", "nn.LSTM": "stream", "Transformer": "windows of 64"}
    assert {name: row["protocol"] for name, row in rows.items()} == protocols
    for row in rows.values():
        assert (row["steps"], row["chars"], row["seconds"]) == (52, 52 * 64, 52 / 256)
        first, *_, last = row["curve"]
        assert len(row["curve"]) == 10 and first["seconds"] == 6 / 256
        assert last == {name: row[name] for name in ("seconds", "val_nats_per_char")}
        assert row["val_nats_per_char"] < first["val_nats_per_char"], "it learns"
        assert [*row["reached"]] == ["1.548", "1.47"]
    assert result.json["val_nats_per_char"] == rows["seqlm"]["val_nats_per_char"]


def test_a_threshold_is_reached_by_the_first_validation_at_or_below_it():
    nats = [2.0, float("nan"), 1.5, 1.4, 1.6]
    curve = [learning.Point(seconds, seconds, value) for seconds, value in enumerate(nats)]
    assert learning._reached(curve, 1.5) == 2
    assert learning._reached(curve, 1.3) is None


def test_a_window_has_at_least_half_of_its_symbols_before_each_that_counts():
    """The reference reads one window for each symbol, in float64."""
    model = learning.Transformer(5, width=8, layers=1, heads=2, context=7, dropout=0.0)
    windowed = learning.Windowed(model.double(), context=7, beginning=5).eval()
    for size in (1, 3, 7, 8, 20):
        symbols = torch.randint(5, (size,)).numpy()
        x = [5, *symbols[:-1].tolist()]
        total = 0.0
        for i, symbol in enumerate(symbols):
            start = 0 if i < 7 else (i - 3) // 4 * 4  # 3 known symbols, then 4 that count
            assert i - start >= min(i, 3)
            logits = model(torch.tensor([x[start : i + 1]]))[0, -1]
            total -= logits.log_softmax(0)[int(symbol)].item()
        assert windowed.nats(symbols) == pytest.approx(total, rel=1e-9)


def test_the_lstm_carries_its_state_over_the_text():
    model = learning.LSTM(5, width=8, dropout=0.0).double().eval()
    symbols = torch.randint(5, (30,)).numpy()
    whole = evaluate.stream(model, symbols).nats
    assert evaluate.stream(model, symbols, chunk=7).nats == pytest.approx(whole, rel=1e-6)
    model.initial_state = lambda batch: tuple(torch.ones(2, batch, 2, 8).double())
    assert evaluate.stream(model, symbols).nats != pytest.approx(whole, rel=1e-3)


def test_a_stream_of_the_lstm_that_restarts_begins_from_a_fresh_state(corpus, monkeypatch):
    monkeypatch.setattr(batches, "RESTARTS", 0.5)
    trainer = learning._lstm(configured(**{"data.path": str(corpus), "train.batch": 8}))
    trainer.step(1.0)
    seen, read = [], trainer.model.forward
    trainer.model.forward = lambda x, state=None: seen.append(state) or read(x, state)
    trainer.step(1.0)
    (rows,) = trainer.batches.at(1)
    fresh = torch.from_numpy(rows.fresh)
    assert 0 < fresh.sum() < 8
    for part in seen[0]:
        assert torch.equal(part.flatten(1).any(1), ~fresh)


@pytest.mark.parametrize("build", [learning._lstm, learning._transformer])
def test_other_models_have_about_as_many_parameters(build, corpus):
    config = configured(**{"model.width": 64, "model.layers": 2, "data.path": str(corpus)})
    trainer = build(config)
    size = contenders.parameter_count(contenders.build(config, trainer.beginning))
    assert contenders.parameter_count(trainer.model) == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--group", "learn"], "Unknown group 'learn'. Did you mean 'learning'?"),
        (["story"], "story: only bench --group learning reads a corpus"),
        (
            ["--group", "learning", "--lengths", "8"],
            "--lengths has no effect with --group learning",
        ),
        (
            ["--group", "learning", "--steps", "8"],
            "train.steps has no effect on what bench --group",
        ),
        (["--seed", "8"], "train.seed has no effect on what bench --group speed measures"),
    ],
)
def test_an_option_of_the_other_group_is_refused(options, message, seqlm_command):
    result = seqlm_command("bench", *options)
    assert result.code == 2 and message in result.err


def test_a_text_that_cannot_be_compared_is_refused(seqlm_command, text_file, in_threads):
    assert seqlm_command("bench", "--group", "learning", "nothing").code == 3
    seqlm_command("prepare", "story.txt", "--documents", "lines")
    result = learned(seqlm_command)
    assert result.code == 2 and "consists of documents, and --group learning needs" in result.err
    seqlm_command("prepare", "story.txt", "--force")
    result = learned(seqlm_command, "--batch", 4096)
    assert result.code == 3 and "too few for batch 4096 x length 16" in result.err
