"""Training: resumed exactly, stopped by steps, clock, signal or patience, and safe from NaN."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_files, scored, start

import seqlm
from seqlm import cells
from seqlm.config import Config, OptimConfig
from seqlm.errors import Diverged, InputError, UsageError
from seqlm.evaluation import evaluate
from seqlm.store import runs
from seqlm.store.checkpoint import Progress
from seqlm.temporary import PREFIX
from seqlm.text.prepare import prepare
from seqlm.training import snapshot
from seqlm.training.loop import expected_steps, share_done
from seqlm.training.optimizer import make_optimizers
from seqlm.training.trainer import schedule


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_micro_batches_change_only_the_order_of_sums(corpus, dtype):
    """The same losses to 1e-5, in bfloat16 to its own rounding."""
    losses = []
    for accumulate in (1, 2, 4):
        setup = start(corpus, f"a{accumulate}", train__accumulate=accumulate, runtime__dtype=dtype)
        losses.append([report.loss for report in setup.reports()])
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(losses[1], losses[0], rtol=tolerance)
    np.testing.assert_allclose(losses[2], losses[0], rtol=tolerance)


def test_the_carried_state_is_that_of_the_text_before(corpus):
    """A model whose weights stand still ends a step in the state of its streams' whole past."""
    options = dict(train__length=2, runtime__dtype="float32", optim__lr=1e-30)
    setup = start(corpus, "carry", cell__name="minlstm", cell__forget_bias=3.0, **options)
    trainer = setup.trainer
    for _ in range(3):
        trainer.step(0.0)
    parts = [trainer.batches.at(step)[0].inputs for step in range(3)]
    trainer.model.eval()
    with torch.no_grad():
        _, expected = trainer.model(torch.from_numpy(np.concatenate(parts, axis=1)))
        _, cold = trainer.model(torch.from_numpy(parts[-1]))
    for state, wanted, other in zip(trainer.state, expected, cold, strict=True):
        torch.testing.assert_close(state, wanted, rtol=1e-5, atol=1e-6)
        assert (state - other).abs().max() > 0.01, "a state that was not carried would show"


def test_the_loss_falls(corpus):
    reports = list(start(corpus, "falls", train__steps=60).reports())
    assert reports[-1].loss < 0.75 * reports[0].loss
    assert reports[-1].val.bits_per_char < 3.5


def test_a_seed_decides_the_run(corpus):
    runs = [
        [report.loss for report in start(corpus, f"s{i}", train__seed=seed).reports()]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_validation_and_samples_change_nothing_of_the_training(corpus):
    given = dict(model__dropout=0.3, train__save_every=1)
    plain = start(corpus, "plain", train__eval_every=0, train__sample_chars=0, **given)
    busy = start(corpus, "busy", train__eval_every=1, train__sample_chars=9, **given)
    assert [r.loss for r in plain.reports()] == [r.loss for r in busy.reports()]
    weights = [(s.run / "step-00000006/model.safetensors").read_bytes() for s in (plain, busy)]
    assert weights[0] == weights[1]


def test_the_clock_decides_how_far_a_time_limited_run_comes(corpus):
    """A clock that moves one second a step; validations are outside of it."""
    ticks = iter(range(1000))
    setup = start(corpus, "timed", train__time_limit=5.0, train__eval_every=1, train__steps=0)
    reports = list(setup.reports(clock=lambda: next(ticks)))
    assert [report.seconds for report in reports] == [1, 2, 3, 4, 5]
    assert reports[-1].stopped == "the time is up"
    optim = setup.config.optim
    shares = [schedule(optim, step, 5 if step else math.inf) for step in range(5)]
    assert [report.lr for report in reports] == [share * optim.lr for share in shares]


def test_a_time_limited_run_is_resumed_exactly_given_the_same_clock(corpus):
    def clock():
        ticks = iter(range(1000))
        return lambda: next(ticks)

    limit = dict(train__time_limit=6.0, train__steps=0)
    whole = start(corpus, "whole", **limit)
    list(whole.reports(clock=clock()))
    broken = start(corpus, "broken", **limit)
    stop = iter([False, False, True])
    list(broken.reports(clock=clock(), interrupted=lambda: next(stop)))
    resumed = start(corpus, "broken", resume=True)
    list(resumed.reports(clock=clock()))
    assert run_files(broken.run, 6) == run_files(whole.run, 6)


def test_an_interrupted_run_saves_its_step_and_goes_on(corpus):
    setup = start(corpus, "stopped", train__save_every=0)
    stop = iter([False, True])
    reports = list(setup.reports(interrupted=lambda: next(stop)))
    assert [r.step for r in reports] == [1, 2] and reports[-1].stopped == "interrupted"
    resumed = start(corpus, "stopped", resume=True)
    assert not resumed.finished
    assert [r.step for r in resumed.reports()] == [3, 4, 5, 6]


def test_a_finished_run_has_nothing_left_until_more_is_asked_for(corpus):
    list(start(corpus, "done").reports())
    assert start(corpus, "done", resume=True).finished
    more = start(corpus, "done", resume=True, train__steps=8)
    assert not more.finished and more.changed == {"train.steps": (6, 8)}
    assert [r.step for r in more.reports()] == [7, 8]


@pytest.mark.parametrize("given", [{"train__batch": 6}, {"train__length": 8}])
def test_a_resumed_run_with_other_batches_starts_its_streams_afresh(corpus, given):
    """The carried state belongs to the text of the old batches, and has their shape."""
    list(start(corpus, "other").reports())
    resumed = start(corpus, "other", resume=True, train__steps=9, **given)
    assert all(not tensor.any() for tensor in resumed.trainer.state)
    assert [r.step for r in resumed.reports()] == [7, 8, 9]


@pytest.mark.parametrize(
    "given, key", [({"model__width": 8}, "model.width"), ({"cell__name": "lem"}, "cell.name")]
)
def test_a_resumed_run_keeps_its_architecture(corpus, given, key):
    list(start(corpus, "kept").reports())
    with pytest.raises(UsageError, match=f"was trained with {key} = .* which cannot change to"):
        start(corpus, "kept", resume=True, **given)


def test_the_weights_of_another_run_fit_its_architecture_only(corpus):
    list(start(corpus, "first").reports())
    said = (
        "The run of --init-from, checkpoints/first, was trained with model.width = .*, which "
        "cannot change to 8. Leave it out, or leave out --init-from."
    )
    with pytest.raises(UsageError, match=said):
        start(corpus, "second", train__init_from="first", model__width=8)


def test_a_resumed_run_keeps_its_corpus(corpus, text_file):
    from seqlm.text.prepare import prepare

    list(start(corpus, "kept").reports())
    text_file.write_text(text_file.read_text()[::-1])
    prepare([str(text_file)], force=True)
    with pytest.raises(UsageError, match="data/story is another corpus"):
        start(corpus, "kept", resume=True)


def test_early_stopping_waits_for_its_patience(corpus, monkeypatch):
    values = iter([3.0, 2.0, 2.5, float("nan"), 2.1, 1.0])
    setup = start(corpus, "early", train__eval_every=1, train__early_stop=3)
    monkeypatch.setattr(setup.trainer, "validate", lambda: scored(next(values)))
    reports = list(setup.reports())
    assert [r.best for r in reports] == [True, True, False, False, False]
    assert reports[-1].stopped == "no better validation in 3"
    assert (setup.run / "best").read_text().strip() == "step-00000002"
    assert start(corpus, "early", resume=True).finished


def test_the_best_step_is_kept_beside_the_newest(corpus, monkeypatch):
    values = iter([1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    setup = start(corpus, "best", train__eval_every=1, train__save_every=1)
    monkeypatch.setattr(setup.trainer, "validate", lambda: scored(next(values)))
    list(setup.reports())
    kept = [folder.name for folder in runs.steps(setup.run)]
    assert kept == ["step-00000001", "step-00000005", "step-00000006"]
    assert seqlm.load(setup.run).step == 1 and seqlm.load(setup.run, "last").step == 6


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(corpus):
    setup = start(corpus, "nan")
    trainer = setup.trainer
    trainer.step(1e-3)
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    state = trainer.state
    trainer.model.register_forward_hook(lambda m, i, out: (out[0] * float("nan"), out[1]))
    loss, _ = trainer.step(1e-3)
    assert math.isnan(loss)
    assert all(torch.equal(t, before[n]) for n, t in trainer.model.state_dict().items())
    assert trainer.state is state
    assert (trainer.progress.skipped, trainer.progress.step) == (1, 2)


def test_ten_steps_in_a_row_that_are_not_finite_end_training(corpus):
    setup = start(corpus, "diverged", train__steps=50, train__eval_every=0, train__save_every=5)
    reports = setup.reports()
    for _ in range(5):
        next(reports)
    good = {name: t.clone() for name, t in setup.trainer.model.state_dict().items()}
    setup.trainer.model.register_forward_hook(lambda m, i, out: (out[0] * float("inf"), out[1]))
    said = "10 steps in a row, up to step 15.*lower --lr.*the last saved step, 5, is intact."
    with pytest.raises(Diverged, match=said):
        list(reports)
    saved, warnings = runs.load(setup.run, "last")
    assert warnings == []
    assert all(torch.equal(t, good[name]) for name, t in saved.weights(saved.config).items())
    lines = [json.loads(line) for line in (setup.run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 15 and lines[-1]["loss"] is None


def test_a_training_that_diverges_at_once_says_that_only_the_untrained_model_is_saved(corpus):
    setup = start(corpus, "diverged", train__steps=50)
    setup.trainer.model.register_forward_hook(lambda m, i, out: (out[0] * float("inf"), out[1]))
    with pytest.raises(Diverged, match="the only saved step is 0, the model before training."):
        list(setup.reports())


def test_float16_scales_its_gradients_and_takes_the_scale_off_again(corpus):
    """The step of float32 to float16's rounding, with gradients that are not in reach of it."""
    norms = []
    for dtype in ("float32", "float16"):
        trainer = start(corpus, dtype, runtime__dtype=dtype).trainer
        seen = []
        trainer.model.head.weight.register_hook(lambda g, seen=seen: seen.append(g.abs().max()))
        norms.append(trainer.step(1e-3)[1])
        (largest,) = seen
        assert (largest > 100) == (dtype == "float16")
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


def test_a_gradient_too_large_for_float16_lowers_the_scale_and_is_no_divergence_yet(corpus):
    trainer = start(corpus, "scaled", runtime__dtype="float16").trainer
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    hook = trainer.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    for _ in range(16):
        trainer.step(1e-3)
    progress = trainer.progress
    assert (progress.loss_scale, progress.skipped, progress.skipped_in_a_row) == (1, 16, 0)
    trainer.step(1e-3)
    assert (progress.loss_scale, progress.skipped, progress.skipped_in_a_row) == (1, 17, 1)
    assert all(torch.equal(t, before[n]) for n, t in trainer.model.state_dict().items())
    hook.remove()
    trainer.step(1e-3)
    assert progress.skipped_in_a_row == 0
    progress.step = 1999
    trainer.step(1e-3)
    assert progress.loss_scale == 2


def test_a_step_saved_before_there_was_float16_is_read(run):
    from fuzz import reseal

    state = run.path / "step-00000004" / "train_state.json"
    content = json.loads(state.read_text())
    del content["loss_scale"]
    state.write_text(json.dumps(content))
    reseal(state.parent, "MANIFEST.json")
    assert runs.load(run.path)[0].progress.loss_scale == 2**16


def test_metrics_have_no_clock_and_timing_has(corpus):
    setup = start(corpus, "lines")
    list(setup.reports())
    rows = [json.loads(line) for line in (setup.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert set(rows[0]) == {"step", "chars", "loss", "lr", "grad_norm"}
    validated = {"val_bits_per_char", "val_bits_per_byte", "val_accuracy"}
    assert set(rows[2]) == set(rows[0]) | validated
    assert rows[-1]["chars"] == 6 * 64
    timing = (setup.run / "timing.jsonl").read_text().splitlines()
    assert json.loads(timing[-1])["seconds"] > 0


def test_the_rate_warms_up_and_falls_to_zero():
    config = OptimConfig(warmup=9, schedule="cosine")
    assert schedule(config, 0, 209) == pytest.approx(0.1)
    assert schedule(config, 9, 209) == 1.0
    assert schedule(config, 59, 209) == pytest.approx(0.5 + 0.5**1.5)
    linear = replace(config, schedule="linear")
    assert schedule(linear, 59, 209) == pytest.approx(0.75)
    assert schedule(config, 209, 209) == pytest.approx(0.0)
    assert schedule(linear, 209, 209) == pytest.approx(0.0)
    assert schedule(replace(config, schedule="constant"), 200, 209) == 1.0


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 5, 50, 300, 1000])
def test_the_largest_rate_is_the_peak_and_the_warmup_ends_within_a_tenth(steps, kind):
    """The cosine had already fallen to 0.976 of it at 1,000 steps, and to 0.136 at 50."""
    config = OptimConfig(warmup=100, schedule=kind)
    rates = [schedule(config, step, steps) for step in range(steps)]
    assert max(rates) == 1
    assert rates.index(1) <= steps / 10
    falling = rates[rates.index(1) :]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("seconds", [0.25, 1.0, 4.0])
def test_under_a_time_limit_the_rate_rises_for_a_tenth_of_the_time_at_most(seconds):
    """The speed of the steps so far tells how many steps 100 seconds will hold."""
    config = Config().updated({"train.time_limit": 100.0, "train.steps": 0, "optim.warmup": 100})
    progress, rates = Progress(), []
    while share_done(config, progress) < 1:
        rates.append(schedule(config.optim, progress.step, expected_steps(config, progress)))
        progress.step, progress.elapsed = progress.step + 1, progress.elapsed + seconds
    assert max(rates) == 1
    assert rates.index(max(rates)) <= len(rates) / 10


@pytest.mark.parametrize("cell", cells.names())
def test_norms_and_biases_do_not_decay(cell):
    from seqlm.model import LanguageModel

    model = LanguageModel(9, width=8, layers=1, cell=cell, conv=3)
    (adamw,) = make_optimizers(model, Config().updated({"optim.weight_decay": 0.5}))
    decayed, spared = adamw.param_groups
    names = {p: n for n, p in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    # a number a unit or a head
    units = "cell.u cell.L cell.A .log_A .log_leak .skip .log_rate .frequency .log_dt"
    own = tuple(units.split())
    assert all(
        "norm" in names[p] or "bias" in names[p] or names[p].endswith(own) for p in spared["params"]
    )
    assert not any("norm" in names[p] or "bias" in names[p] for p in decayed["params"])


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"train__accumulate": 3}, UsageError, "divide into micro-batches of equal size"),
        ({"train__batch": 400}, InputError, "The largest that fit"),
        ({"cell__lem__dt": 1.0}, UsageError, "lem is not in the stack"),
        ({"train__steps": 0}, UsageError, "no time limit is set. Add --time-limit"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing_behind(corpus, given, error, message):
    with pytest.raises(error, match=message):
        start(corpus, "never", **given)
    assert not runs.RUNS.exists()


def test_a_kill_between_the_two_pointers_loses_no_best_step(corpus, monkeypatch):
    """`best` is written before `last`, so the run goes back to before it was best."""
    setup = start(corpus, "killed", train__eval_every=1, train__save_every=1)
    values = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(setup.trainer, "validate", lambda: scored(next(values)))
    real = runs.write_file

    def killed_at_last(path, text):
        if path.name == "last" and "00000003" in text:
            raise KeyboardInterrupt
        real(path, text)

    monkeypatch.setattr("seqlm.store.runs.write_file", killed_at_last)
    with pytest.raises(KeyboardInterrupt):
        list(setup.reports())
    assert runs.load(setup.run, "last")[0].step == 2
    assert runs.load(setup.run, "best")[0].step == 3


def test_two_trainings_of_one_name_do_not_delete_each_other(corpus):
    one, two = start(corpus, "same"), start(corpus, "same")
    list(one.reports())
    with pytest.raises(UsageError, match="same exists"):
        list(two.reports())
    assert runs.load(one.run, "last")[0].step == 6


def test_a_finished_run_is_not_trained_on_by_the_library_either(corpus, monkeypatch):
    setup = start(corpus, "early", train__eval_every=1, train__early_stop=1)
    values = iter([1.0, 2.0])
    monkeypatch.setattr(setup.trainer, "validate", lambda: scored(next(values)))
    list(setup.reports())
    for given in ({}, {"runtime__threads": 1}):
        assert list(start(corpus, "early", resume=True, **given).reports()) == []


def test_a_folder_left_by_a_kill_before_the_first_save_is_free(corpus):
    (runs.RUNS / "young" / f"{PREFIX}00000000/step-00000000/new").mkdir(parents=True)
    assert list(start(corpus, "young").reports())[-1].step == 6


def test_a_full_disk_is_an_error_that_names_the_file_and_the_steps_before_stay(corpus):
    """A file-size limit stands in for the disk, in a process of its own.

    The limit ends with the command, because coverage writes its data when the process ends.
    """
    list(start(corpus, "full").reports())
    code = """
import resource, signal
from seqlm.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
try:
    main()
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
"""
    command = [sys.executable, "-c", code, "train", "--resume", "--run", "full", "--steps", "8"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1 and "Traceback" not in ran.stderr, ran.stderr
    assert "Cannot write checkpoints/full/step-00000008" in ran.stderr
    assert runs.load(runs.RUNS / "full", "last")[0].step == 6


def test_bytes_that_are_not_text_are_validated_per_byte(tmp_path):
    from seqlm.text.prepare import prepare

    (tmp_path / "noise.bin").write_bytes(
        bytes(np.random.default_rng(0).integers(0, 256, 2000, "u1"))
    )
    corpus = prepare(["noise.bin"], unit="byte")[0]
    setup = start(corpus, "noise")
    report = list(setup.reports())[-1]
    assert report.metrics()["val_bits_per_char"] is None
    assert 7 < report.metrics()["val_bits_per_byte"] < 9
    assert runs.load(setup.run, "best")[0].step in (3, 6)


# Documents


@pytest.fixture
def names(tmp_path):
    """A corpus of 300 short lines and some longer than a sequence."""
    lines = [f"name {i} of {i * i}" for i in range(300)]
    lines[::50] = [f"a long line {i} " * 7 for i in range(6)]
    (tmp_path / "names.txt").write_text("\n".join(lines))
    return prepare(["names.txt"], documents="lines")[0]


@pytest.mark.parametrize("cell", ["mingru", "lem"])
@pytest.mark.parametrize("state", ["carry", "reset"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_on_documents_is_resumed_bit_for_bit(names, cell, state, accumulate):
    given = dict(cell__name=cell, train__state=state, train__accumulate=accumulate)
    given |= dict(model__dropout=0.1, model__conv=3)
    list(start(names, "whole", **given).reports())
    for report in start(names, "broken", **given).reports():
        if report.step == 4:
            break
    list(start(names, "broken", resume=True).reports())
    assert run_files(runs.RUNS / "whole", 6) == run_files(runs.RUNS / "broken", 6)


def test_the_loss_is_the_mean_over_every_symbol_of_every_document(names):
    """Against each document read alone, from a fresh state."""
    setup = start(names, "mean", runtime__dtype="float32", train__length=200, train__batch=2)
    trainer = setup.trainer
    parts, nats, count = trainer.batches.at(0), 0.0, 0
    assert len(parts) > 1
    with torch.no_grad():
        for part in parts:
            assert part.fresh.all()
            for inputs, targets in zip(part.inputs, part.targets, strict=True):
                size = int((targets >= 0).sum())
                if not size:  # a row that only fills up the shape
                    continue
                logits, _ = trainer.model(torch.from_numpy(inputs[None, :size]))
                nats += F.cross_entropy(
                    logits[0], torch.from_numpy(targets[:size]), reduction="sum"
                ).item()
                count += size
    loss, _ = trainer.step(0.0)
    assert loss == pytest.approx(nats / count, rel=1e-5)
    assert trainer.progress.chars == count


def test_a_long_document_goes_on_from_its_state(names):
    """With weights that stand still, a stream's state is that of its document from its start."""
    options = dict(runtime__dtype="float32", optim__lr=1e-30, train__length=16)
    trainer = start(names, "long", cell__name="minlstm", **options).trainer
    symbols, ends = trainer.corpus.symbols("train"), trainer.corpus.ends("train")
    seen = 0
    for step in range(trainer.batches.steps_per_epoch):
        parts = trainer.batches.at(step)
        trainer.step(0.0)
        for part in parts:
            for targets, stream, kept in zip(part.targets, part.streams, part.kept, strict=True):
                if not kept:
                    continue
                seen += 1
                state = [tensor[stream] for tensor in trainer.state]
                assert any(_matches(trainer, symbols, ends, targets, state))
    assert seen > 3


def _matches(trainer, symbols, ends, targets, state):
    """Whether the state is that after `targets`, for every document that holds them."""
    for start_, end in zip([0, *ends[:-1]], ends, strict=True):
        document = np.asarray(symbols[start_:end], dtype=np.int64)
        for upto in range(len(targets), len(document), 16):
            if np.array_equal(document[upto - len(targets) : upto], targets):
                inputs = np.concatenate([[trainer.model.beginning], document[: upto - 1]])
                with torch.no_grad():
                    _, after = trainer.model(torch.from_numpy(inputs[None]))
                yield all(
                    torch.allclose(a[0], b, rtol=1e-4, atol=1e-5)
                    for a, b in zip(after, state, strict=True)
                )


def test_validation_reads_each_document_alone(names):
    trainer = start(names, "validated", runtime__dtype="float32").trainer
    symbols, ends = trainer.corpus.symbols("val"), trainer.corpus.ends("val")
    alone = sum(evaluate.stream(trainer.model, part).nats for part in np.split(symbols, ends[:-1]))
    assert trainer.validate().nats == pytest.approx(alone, rel=1e-6)


def test_after_a_skipped_step_a_document_does_not_go_on_from_another(names):
    """The document that a skipped step began goes on from no state, not from what was before."""
    options = dict(runtime__dtype="float32", train__length=8, train__batch=2)
    trainer = start(names, "skipped", **options).trainer
    for step in range(trainer.batches.steps_per_epoch):
        begun = [s for p in trainer.batches.at(step) for s in p.streams[p.fresh & p.kept]]
        before = None if trainer.state is None else [t.clone() for t in trainer.state]
        if step and begun:
            break
        trainer.step(1e-3)
    for optimizer in trainer.optimizers:
        optimizer.zero_grad()
    with torch.no_grad():
        weight = trainer.model.head.weight.clone()
        trainer.model.head.weight.fill_(math.nan)
    trainer.step(1e-3)
    assert trainer.progress.skipped == 1
    with torch.no_grad():
        trainer.model.head.weight.copy_(weight)
    for tensor, initial, old in zip(
        trainer.state, trainer.model.initial_state(2), before, strict=True
    ):
        for stream in range(2):
            expected = initial if stream in begun else old
            assert torch.equal(tensor[stream], expected[stream])


def test_warming_up_changes_nothing_of_the_training(corpus):
    setup = start(corpus, "warm")
    trainer = setup.trainer
    before = {k: v.clone() for part in snapshot.tensors(trainer).values() for k, v in part.items()}
    trainer.warm_up()
    after = {k: v for part in snapshot.tensors(trainer).values() for k, v in part.items()}
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.progress.step == 0


def test_warming_up_leaves_a_cells_running_mean_alone(corpus, tmp_path):
    (tmp_path / "mean.py").write_text(
        "import torch\nfrom torch import nn\nfrom seqlm.cells import Recurrence\n"
        "class Mean(Recurrence):\n"
        "    def __init__(self, width):\n"
        "        super().__init__()\n"
        "        self.width, self.inputs = width, nn.Linear(width, width)\n"
        "        self.register_buffer('seen', torch.zeros(1))\n"
        "    def initial_state(self, batch): return (self.zeros(batch, self.width),)\n"
        "    def project(self, x):\n"
        "        if self.training: self.seen += 1\n"
        "        return self.inputs(x)\n"
        "    def recur(self, drive, state):\n"
        "        h = drive.tanh() + state[0] / 2\n"
        "        return h, (h,)\n"
    )
    setup = start(corpus, "mean", cell__name="./mean.py", train__steps=2)
    assert len(list(setup.reports())) == 2
    assert setup.trainer.model.blocks[0].cell.seen.item() == 2
