"""`seqlm check` passes a sound run, and catches every fault that is planted in one."""

import math
import os
import shutil
from contextlib import chdir

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, sentences
from fuzz import reseal
from safetensors.torch import load_file, save_file

import seqlm
from seqlm.config import RuntimeConfig
from seqlm.evaluation import evaluate
from seqlm.files import to_json
from seqlm.generation import context
from seqlm.lab.check import FAIL, NOT_RUN, PASS, WARN, check
from seqlm.model import CausalConv, LanguageModel
from seqlm.runtime import Runtime
from seqlm.store import checkpoint, runs
from seqlm.temporary import PREFIX, temporary
from seqlm.text.corpus import open_corpus
from seqlm.text.prepare import prepare
from seqlm.text.tokenizer import CharTokenizer
from seqlm.training import launch, snapshot

OPTIONS = {"model.conv": 4, "model.dropout": 0.1, "runtime.dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def short(request, monkeypatch):
    """Of the symbols that are compared step by step a quarter is enough, but for a sound run."""
    if "sound" not in request.node.name:
        monkeypatch.setattr("seqlm.lab.check.LENGTH", 84)


@pytest.fixture(scope="module")
def mixed(made, tmp_path_factory):
    """A folder with a run that is trained once; tests use copies of it."""
    folder = tmp_path_factory.mktemp("mixed")
    shutil.copytree(made / "data", folder / "data")
    with chdir(folder):
        given = {**SMALL, "length": 48, "layers": 2}
        seqlm.train("data/story", **given, cell="mingru,lem", set=OPTIONS)
    return folder / "checkpoints"


@pytest.fixture
def run(mixed, corpus):
    """A run with a convolution and dropout, trained in bfloat16."""
    shutil.copytree(mixed, "checkpoints")
    return seqlm.load("story-mingru-lem")


def failed(found) -> set[str]:
    return {one.name for one in found if one.status == FAIL}


def test_a_sound_run_passes_every_check(run):
    narrow = Runtime.pick(RuntimeConfig(dtype="bfloat16"))
    found = list(check(str(run.path), runtime=narrow))
    assert [one.status for one in found] == [PASS] * len(found)
    assert {one.dtype for one in found} == {None, "float32", "bfloat16"}
    assert all(one.deviation <= one.tolerance for one in found if one.tolerance is not None)
    assert sorted(path.name for path in runs.steps(run.path)) == ["step-00000000", "step-00000004"]


@pytest.mark.parametrize("unit", ["char", "byte", "sentencepiece"])
@pytest.mark.parametrize("documents", ["none", "lines", "files"])
def test_a_run_on_any_corpus_passes(tmp_path, unit, documents):
    (tmp_path / "texts").mkdir()
    for i in range(40):
        text = "".join(f"日本 {i * k} é🙂\tx  y\n" for k in range(i + 9))
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    folder, _, _ = prepare(["texts"], unit=unit, documents=documents)
    run = seqlm.train(folder, **SMALL)
    assert failed(check(str(run.path))) == set()


def test_the_command_prints_a_table_and_ends_with_3_when_a_check_fails(seqlm_command, run):
    result = seqlm_command("check", "--json")
    assert result.code == 0 and result.json["passed"] is True
    checks = result.json["checks"]  # more of them where the processor computes in bfloat16
    one = {c["name"]: c for c in checks}["resume = uninterrupted"]
    assert (one["status"], one["deviation"], one["tolerance"]) == ("pass", 0.0, 0.0)
    assert seqlm_command("check", "-q").out == "pass\n"
    path = run.path / "step-00000000" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    result = seqlm_command("check")
    assert result.code == 3
    assert f"error: 1 of {len(checks)} checks failed: hashes of the steps." in result.err
    assert "hashes of the steps\tfail\t-\t-\t-\tcheckpoints/story-mingru-lem" in result.out
    assert "step-00000000/state.safetensors was cut or changed" in result.out
    assert seqlm_command("check", "-q").out == "fail\n"
    assert seqlm_command("check", "--run", "nothing").code == 3


# Planted faults: in the model


def test_a_convolution_that_sees_the_future_is_caught(run, monkeypatch):
    def not_causal(self, x, state=None):
        window = self.initial_state(len(x))[0] if state is None else state[0]
        seen = torch.cat([window[:, 1:].to(x.dtype), x, x[:, -1:]], dim=1)
        y = F.conv1d(seen.mT, self.weight, self.bias, groups=self.width).mT
        return y, (torch.cat([window, x], dim=1)[:, -self.past :].to(window.dtype),)

    monkeypatch.setattr(CausalConv, "forward", not_causal)
    assert "no look into the future" in failed(check(str(run.path)))


def test_a_state_dropped_at_a_chunk_border_is_caught(run, monkeypatch):
    real = LanguageModel.forward

    def forgetful(self, tokens, state=None):
        return real(self, tokens, state if tokens.shape[1] > 7 else None)

    monkeypatch.setattr(LanguageModel, "forward", forgetful)
    found = failed(check(str(run.path)))
    assert found == {"prefill in chunks = whole", "eval and prompt = steps"}


def test_a_state_dropped_within_a_scan_is_caught(run, monkeypatch):
    from seqlm.cells import mingru

    real = mingru.gated_scan

    def in_parts(drive, h0, candidate):
        parts = [real(part, h0, candidate) for part in drive.split(50, dim=1)]
        return torch.cat([h for h, _ in parts], dim=1), parts[-1][1]

    monkeypatch.setattr(mingru, "gated_scan", in_parts)
    assert "sequence = steps" in failed(check(str(run.path)))


@pytest.mark.parametrize("where", ["eval", "prompt"])
def test_a_state_dropped_between_the_chunks_of_a_text_is_caught(run, monkeypatch, where):
    if where == "eval":
        real = evaluate._judged
        monkeypatch.setattr(
            evaluate, "_judged", lambda m, x, y, state, *rest: real(m, x, y, None, *rest)
        )
    else:
        real = context.prefill
        monkeypatch.setattr(
            "seqlm.lab.check.prefill", lambda model, prompt, chunk: real(model, prompt[-chunk:])
        )
    assert failed(check(str(run.path))) == {"eval and prompt = steps"}


def test_rows_that_meet_are_caught(run, monkeypatch):
    real = LanguageModel.forward

    def mixed(self, tokens, state=None):
        logits, state = real(self, tokens, state)
        return logits - 1e-6 * logits.mean(0), state

    monkeypatch.setattr(LanguageModel, "forward", mixed)
    assert "rows are independent" in failed(check(str(run.path)))


def test_weights_that_are_not_finite_are_caught(run, monkeypatch):
    real = LanguageModel.load_state_dict

    def broken(self, weights):
        real(self, weights)
        torch.nn.init.constant_(self.norm.weight, math.nan)

    monkeypatch.setattr(LanguageModel, "load_state_dict", broken)
    found = list(check(str(run.path)))
    assert "sequence = steps" in failed(found)
    rows = [one.to_dict() for one in found if one.name == "sequence = steps"]
    assert rows[0]["deviation"] is None


# Planted faults: on disk


def test_a_save_that_rounds_is_caught(run, monkeypatch):
    real = checkpoint.save

    def rounded(place, config, tokenizer, progress, environment, tensors):
        weights = {k: v.bfloat16().float() for k, v in tensors["model"].items()}
        return real(place, config, tokenizer, progress, environment, {**tensors, "model": weights})

    monkeypatch.setattr(checkpoint, "save", rounded)
    assert {"saved and loaded = same", "resume = uninterrupted"} <= failed(check(str(run.path)))


@pytest.mark.parametrize("lost", ["optimizer", "state", "step", "dropout"])
def test_a_resume_that_forgets_something_is_caught(run, monkeypatch, lost):
    if lost == "dropout":  # drawn from where the generator happens to stand
        monkeypatch.setattr("seqlm.training.trainer.derived_seed", lambda *parts: torch.seed() >> 1)
    real = snapshot.restore

    def forgetful(self, saved, *tensors):
        real(self, saved, *tensors)
        if saved.step == 6:  # only after the interruption
            if lost == "optimizer":
                for optimizer in self.optimizers:
                    optimizer.state.clear()
            if lost == "state":
                self.state = self._fresh_state()
            if lost == "step":
                self.progress.chars -= 1

    monkeypatch.setattr(snapshot, "restore", forgetful)
    assert failed(check(str(run.path))) == {"resume = uninterrupted"}


def test_a_flipped_bit_is_caught_and_named(run, corpus):
    path = corpus / "train.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(bytes(data))
    found = list(check(str(run.path)))
    assert failed(found) == {"hashes of the corpus"}
    assert "train.bin was cut or changed" in "".join(one.detail for one in found)
    assert [one.status for one in found[-3:]] == [NOT_RUN] * 3


@pytest.mark.parametrize(
    "name, content", [("best", "step-00000000"), ("last", "x"), ("last", None)]
)
def test_a_pointer_that_names_another_step_is_caught(run, name, content):
    (run.path / name).unlink() if content is None else (run.path / name).write_text(content)
    assert failed(check(str(run.path))) == {"pointers best and last"}


def test_a_cut_file_of_metrics_is_caught_and_a_resumed_run_warns(run):
    path = run.path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[3:]))
    found = list(check(str(run.path)))
    assert failed(found) == {"metrics of each step"}
    said = "it lacks 2 of 4 steps, the first of them step 2. Curves and reports lack them, too."
    assert said in "".join(one.detail for one in found)
    resumed = launch.start(run=run.path.name, settings={"train.steps": 5}, resume=True)
    assert len(resumed.warnings) == 1 and said in resumed.warnings[0]


def test_folders_of_a_check_that_was_killed_are_deleted_by_the_next(run, tmp_path, monkeypatch):
    """Folders of a living process, and of other programs, stay."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    (place / "seqlm-mine").mkdir()
    with temporary(place) as living:
        (place / f"{PREFIX}00000000/step-00000004").mkdir(parents=True)
        assert failed(check(str(run.path))) == set()
        assert {path.name for path in place.iterdir()} == {"seqlm-mine", living.name}


def test_what_else_lies_in_a_step_is_left_alone(run):
    (run.path / "step-00000004" / "extra").symlink_to("/dev/zero")
    os.mkfifo(run.path / "step-00000004" / "pipe")
    assert failed(check(str(run.path))) == set()


def test_a_tokenizer_of_fewer_symbols_is_caught(run):
    """The weights have as many rows as the tokenizer, and every manifest is rewritten."""
    for folder in runs.steps(run.path):
        few = CharTokenizer(run.tokenizer.symbols[:5])
        (folder / "tokenizer.json").write_text(to_json(few.to_dict()))
        tensors = load_file(folder / "model.safetensors")
        for name, rows in (("embedding.weight", 6), ("head.weight", 5), ("head.bias", 5)):
            tensors[name] = tensors[name][:rows].clone()
        save_file(tensors, folder / "model.safetensors")
        reseal(folder, "MANIFEST.json")
    found = list(check(str(run.path)))
    assert failed(found) == {"decode(encode(text)) = text", "resume = uninterrupted"}
    assert found[-1].status == NOT_RUN


def test_a_stale_tokenizer_is_caught(run):
    """The tokenizer has as many symbols, but others, and the manifest is rewritten."""
    folder = run.path / "step-00000004"
    symbols = run.tokenizer.symbols
    other = CharTokenizer("".join(sorted((set(symbols) - {"."}) | {"!"})))
    (folder / "tokenizer.json").write_text(to_json(other.to_dict()))
    reseal(folder, "MANIFEST.json")
    found = list(check(str(run.path)))
    assert "decode(encode(text)) = text" in failed(found)
    detail = {one.name: one.detail for one in found}["decode(encode(text)) = text"]
    assert "is not the prepared text" in detail


def test_a_corpus_prepared_again_is_not_the_runs_own(run, text_file):
    text_file.write_text(sentences(4000, seed=1))
    prepare([str(text_file)], force=True)
    found = list(check(str(run.path)))
    assert failed(found) == {"hashes of the corpus"}
    assert "is not the corpus that the run" in "".join(one.detail for one in found)
    assert [one.detail for one in found[-3:]] == ["needs the run's corpus"] * 3  # one is there


def test_without_its_corpus_a_run_is_checked_as_far_as_it_goes(run, corpus, tmp_path):
    moved = corpus.rename(tmp_path / "moved")
    found = list(check(str(run.path)))
    assert failed(found) == set()
    names = {one.name for one in found if one.status == NOT_RUN}
    assert "hashes of the corpus" in names and len(names) == 4
    found = list(check(str(run.path), data=str(moved)))
    assert [one.status for one in found] == [PASS] * len(found)


def test_a_loss_that_cannot_be_is_a_warning(run, corpus, monkeypatch):
    counts = open_corpus(corpus).splits["val"]
    sums = evaluate.Sums(0.1 * counts["chars"], correct=0)
    monkeypatch.setattr(evaluate, "stripes", lambda model, symbols: sums)
    last = list(check(str(run.path)))[-1]
    assert last.status == WARN and "the model may see the symbols that it predicts" in last.detail


def test_training_warns_of_a_loss_that_cannot_be(seqlm_command, corpus, monkeypatch):
    low = lambda model, symbols, tick: evaluate.Sums(0.1 * len(symbols), 0)  # noqa: E731
    monkeypatch.setattr(evaluate, "stream", low)
    result = seqlm_command("train", "--preset", "tiny", "--steps", 2, "--batch", 2, "--length", 16)
    assert result.code == 0
    assert "The model may see the symbols that it predicts. Run: seqlm check" in result.err
