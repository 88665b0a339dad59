import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from seqlm.errors import InputError, UsageError
from seqlm.manifest import seal, sha256
from seqlm.store import checkpoint, history, runs
from seqlm.store.checkpoint import Progress
from seqlm.training import launch


@pytest.fixture
def saved(run) -> Path:
    """The folder of the run's last step, step-00000004."""
    return run.path / checkpoint.folder_name(4)


def test_a_step_is_complete_in_itself(run, saved, tmp_path):
    """It alone can be moved away, and loads."""
    alone = tmp_path / "alone"
    alone.mkdir()
    saved.rename(alone / saved.name)
    (alone / "last").write_text(saved.name)
    (alone / "config.toml").write_text((alone / saved.name / "config.toml").read_text())
    loaded, warnings = runs.load(alone)
    assert (loaded.step, warnings) == (4, [])
    assert set(loaded.weights(loaded.config)) == set(run.model.state_dict())


def test_the_files_are_those_of_the_format(saved):
    names = {path.name for path in saved.iterdir()}
    assert names == {
        *("config.toml", "tokenizer.json", "train_state.json", "MANIFEST.json"),
        *("model.safetensors", "optimizer.safetensors", "state.safetensors"),
    }
    manifest = json.loads((saved / "MANIFEST.json").read_text())
    assert set(manifest["files"]) == names - {"MANIFEST.json"}
    assert (manifest["schema"], manifest["torch"]) == (2, torch.__version__)


def test_weights_come_back_bit_for_bit(run, saved):
    loaded = load_file(saved / "model.safetensors")
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, loaded[name])


FILES = ["model.safetensors", "optimizer.safetensors", "state.safetensors", "config.toml"]
FILES += ["tokenizer.json", "train_state.json", "MANIFEST.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_damaged_step_is_passed_over_with_a_warning_that_names_the_file(run, saved, name, damage):
    path = saved / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes(data[:middle] if damage == "cut" else flipped)
    loaded, warnings = runs.load(run.path, "last", *checkpoint.KINDS)
    assert loaded.step == 0
    assert len(warnings) == 1 and name in warnings[0] and "step-00000004" in warnings[0]
    with pytest.raises(InputError, match=name):
        runs.load(run.path, "4", *checkpoint.KINDS)


@pytest.fixture
def read(monkeypatch) -> Counter[str]:
    """The bytes of every file that are read, by its name."""
    import safetensors.torch

    counts, real = Counter(), Path.open

    def opened(path, mode="r", *arguments, **options):
        if mode == "rb":
            counts[path.name] += path.stat().st_size
        return real(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    for module, name in ((safetensors, "safe_open"), (safetensors.torch, "load_file")):
        monkeypatch.setattr(module, name, lambda path, *_, **__: pytest.fail(f"{path} is mapped"))
    return counts


def tensor_bytes(read: Counter[str], folder: Path) -> dict[str, float]:
    """How many times the bytes of each file of tensors were read."""
    sizes = {name: (folder / name).stat().st_size for name in checkpoint.KINDS.values()}
    return {name: read[name] / size for name, size in sizes.items() if read[name]}


def test_every_command_reads_only_the_tensors_that_it_uses_and_once(
    run, saved, read, seqlm_command
):
    """Listing reads their sizes, generating and evaluating the weights, resuming all of them."""
    assert seqlm_command("runs", "-q").code == 0
    assert tensor_bytes(read, saved) == {}
    for command in (["generate", "--chars", 3], ["eval", "-q"]):
        read.clear()
        assert seqlm_command(*command).code == 0
        assert tensor_bytes(read, saved) == {"model.safetensors": 1}
    read.clear()
    launch.start(run=str(run.path), resume=True)
    assert tensor_bytes(read, saved) == dict.fromkeys(checkpoint.KINDS.values(), 1)


def test_what_a_command_does_not_use_may_be_damaged_but_not_missing(run, saved, seqlm_command):
    path = saved / "optimizer.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert seqlm_command("eval", "-q").code == 0
    warnings = launch.start(run=str(run.path), resume=True).warnings
    assert "Skipping step-00000004" in warnings[0] and path.name in warnings[0]
    assert seqlm_command("check", "-q").code == 3
    path.write_bytes(data[:-1])
    result = seqlm_command("eval", "--json")
    assert (result.code, result.out) == (3, "") and "Skipping step-00000004" in result.err
    assert "Only step 0, the model before training, is left. To read it: --step 0" in result.err
    result = seqlm_command("eval", "--json", "--step", 0)
    assert result.json["step"] == 0 and "warning" not in result.err


def test_a_skipped_step_is_named_with_the_one_that_is_read_instead(run, saved, seqlm_command):
    shutil.copytree(saved, run.path / "step-00000009")
    (run.path / "best").write_text("step-00000009\n")
    result = seqlm_command("eval", "--json")
    assert (result.code, result.json["step"]) == (0, 4)
    assert "Skipping step-00000009" in result.err and "Reading step 4." in result.err


def test_a_run_with_step_0_alone_is_read_with_a_warning(run, saved, seqlm_command):
    shutil.rmtree(saved)
    for pointer in ("best", "last"):
        (run.path / pointer).write_text("step-00000000\n")
    result = seqlm_command("generate", "--chars", 3)
    assert result.code == 0
    assert (
        "warning: checkpoints/story-mingru has only step 0, the model before training" in result.err
    )


def test_tensors_are_given_away_once_and_read_again_if_wanted(run, saved, read):
    loaded = runs.load(run.path, "last", "model")[0]
    one = loaded.weights(loaded.config)
    assert tensor_bytes(read, saved) == {"model.safetensors": 1}
    (saved / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="model.safetensors was cut or changed"):
        loaded.weights(loaded.config)
    assert set(one) == set(run.model.state_dict())


def test_a_run_without_a_whole_step_is_an_error(run):
    for folder in runs.steps(run.path):
        (folder / "MANIFEST.json").unlink()
    with pytest.raises(InputError, match="has no undamaged step"):
        runs.load(run.path)


def test_a_pointer_to_nowhere_is_passed_over(run):
    (run.path / "last").write_text("step-00000099\n")
    loaded, warnings = runs.load(run.path, "last")
    assert loaded.step == 4 and "step-00000099" in warnings[0]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"../other/step-00000004", b"step-backup"])
@pytest.mark.parametrize("name", ["best", "last"])
def test_a_pointer_that_names_no_step_is_passed_over(run, name, content):
    (run.path / name).write_bytes(content)
    loaded, warnings = runs.load(run.path, name)
    assert loaded.step == 4 and f"{name} names no step of the run" in warnings[0]


def test_folders_that_are_no_steps_are_left_alone(run):
    (run.path / "step-backup").mkdir()
    assert runs.load(run.path, "4")[0].step == 4


def test_a_step_of_another_seqlm_is_an_input_error(run, saved):
    state = json.loads((saved / "train_state.json").read_text())
    del state["elapsed"]
    (saved / "train_state.json").write_text(json.dumps(state))
    manifest = json.loads((saved / "MANIFEST.json").read_text())
    path = saved / "train_state.json"
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (saved / "MANIFEST.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(InputError, match="train_state.json is damaged: it is no record of a step"):
        runs.load(run.path, "4")


def test_a_newer_format_is_refused(run, saved):
    manifest = json.loads((saved / "MANIFEST.json").read_text())
    (saved / "MANIFEST.json").write_text(json.dumps(seal({**manifest, "schema": 99})))
    with pytest.raises(InputError, match="has format 99, but this version of seqlm reads format 2"):
        runs.load(run.path, "4")


def test_a_step_is_named_best_last_or_by_number(run):
    assert runs.load(run.path, "best")[0].step == 4
    assert runs.load(run.path, "0")[0].step == 0
    with pytest.raises(UsageError, match="--step newest: write best, last or the number"):
        runs.load(run.path, "newest")
    with pytest.raises(InputError, match="has no saved step 3. Saved: 0, 4."):
        runs.load(run.path, "3")


def test_a_run_is_found_by_path_by_name_and_as_the_newest(run, tmp_path):
    assert runs.find("story-mingru") == runs.find(str(run.path)) == run.path
    assert runs.find(None) == run.path
    with pytest.raises(InputError, match="neither nothing nor checkpoints/nothing is a run"):
        runs.find("nothing")


def test_where_there_is_no_run_the_error_says_how_to_make_one():
    with pytest.raises(InputError, match="no run in checkpoints/ yet. Train one: seqlm train"):
        runs.find(None)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.pkl", "model.ckpt"])
def test_pickles_are_refused_with_a_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match="is a pickle. Opening a pickle can run any code"):
        runs.find(name)


def test_a_new_run_takes_no_other_place(run, tmp_path):
    with pytest.raises(UsageError, match="Continue it with --resume, replace it with --force"):
        runs.new(run.path, force=False)
    assert runs.new(run.path, force=True) == run.path
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "letter.txt").write_text("dear")
    for force in (False, True):
        with pytest.raises(UsageError, match="precious exists and is not a run"):
            runs.new(Path("precious"), force)


def test_a_failed_save_names_the_file_and_keeps_the_old_step(run, saved, monkeypatch):
    def full(*_, **__):
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    loaded = runs.load(run.path)[0]
    tensors = {"model": loaded.weights(loaded.config)}
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(
        Exception, match="safetensors: No space left on device. Free some space; the"
    ):
        checkpoint.save(run.path, loaded.config, loaded.tokenizer, Progress(step=9), {}, tensors)
    assert runs.load(run.path, "last")[0].step == 4
    assert not any(name.startswith(".tmp") for name in os.listdir(run.path))


def test_nan_is_never_the_best():
    progress = Progress(step=1)
    nan, inf = float("nan"), float("inf")
    assert progress.note(nan, nan) is False and progress.best_bits_per_char is None
    assert progress.note(2.0, 2.0) is True
    assert progress.note(nan, nan) is False and progress.note(inf, inf) is False
    assert (progress.best_bits_per_char, progress.evaluations_since_best) == (2.0, 2)


def test_lines_after_the_restored_step_are_cut(tmp_path):
    for step in (1, 2, 3):
        history.append(tmp_path, {name: {"step": step} for name in history.FILES})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('garbage\n{"a": 1}\n{"step": 4, "lo')  # as an editor and a kill leave it
    runs.rewind(tmp_path, Progress(step=2))
    for name in history.FILES:
        rows = [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()]
        assert rows == [1, 2]
