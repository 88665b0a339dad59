"""Files that were damaged or forged: named or harmless, never believed, never code."""

import base64
import json
import os
import random
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from conftest import SMALL
from fuzz import reseal
from safetensors.torch import load_file, save_file

import seqlm
from seqlm.errors import InputError, SeqlmError
from seqlm.files import to_json
from seqlm.manifest import seal
from seqlm.store import checkpoint, history, runs
from seqlm.temporary import PREFIX
from seqlm.text.corpus import open_corpus
from seqlm.text.prepare import prepare
from seqlm.training import launch

MANIFEST = "MANIFEST.json"


@pytest.fixture
def step(run) -> Path:
    return run.path / "step-00000004"


def everything(saved) -> tuple:
    """All that a step says, to compare."""
    folder = saved.folder
    tensors = [folder.joinpath(f"{kind}.safetensors").read_bytes() for kind in checkpoint.KINDS]
    return saved.config, saved.tokenizer.to_dict(), saved.progress, saved.environment, tensors


@pytest.mark.parametrize("name", [MANIFEST, *checkpoint.FILES])
def test_a_flipped_bit_anywhere_is_reported_with_the_files_name_or_harmless(run, step, name):
    """One bit in every k-th byte; a step loads only where it says exactly what it said before."""
    path, whole = step / name, everything(runs.load(run.path, "4", *checkpoint.KINDS)[0])
    data = path.read_bytes()
    every = max(1, len(data) // 200)
    harmless = reported = 0
    for at in range(0, len(data), every):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        try:
            found = runs.load(run.path, "4", *checkpoint.KINDS)[0]
        except InputError as error:
            assert name in str(error)
            reported += 1
            continue
        path.write_bytes(data)
        assert everything(found) == whole, f"a wrong load: bit {at % 8} of byte {at}"
        harmless += 1
    assert reported > 0 and (harmless == 0 or name == MANIFEST)
    path.write_bytes(data[:-2])
    saved, warnings = runs.load(run.path, "last", *checkpoint.KINDS)
    assert saved.step == 0 and name in warnings[0]


FORGED = int(os.environ.get("SEQLM_TEST_FORGED", "60"))  # make soak takes more


def test_forged_files_bring_out_no_error_but_ours(tmp_path):
    """Under right seals; no traceback, no hang, and peak memory under twice the normal load's."""
    (tmp_path / "story.txt").write_text("".join(f"cat {i} sees a dog.\n" for i in range(99)))
    corpus = prepare(["story.txt"], unit="char", documents="lines")[0]
    run = seqlm.train(corpus, **SMALL)
    script = Path(__file__).parent / "fuzz.py"
    command = [sys.executable, str(script), str(run.path), str(corpus), str(FORGED), "0"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    assert found["wrong"] == []
    assert sum(found["outcomes"].values()) == FORGED
    assert found["outcomes"]["InputError"] > 0.4 * FORGED
    assert found["kib"]["fuzzed"] < 2 * found["kib"]["normal"]


def forge(step: Path, **values) -> None:
    """Other values in the configuration, under a right seal."""
    config = tomllib.loads((step / "config.toml").read_text())
    for key, value in values.items():
        section, name = key.split("__")
        config[section][name] = value
        if value is None:
            del config[section][name]
    (step / "config.toml").write_text(tomli_w.dumps(config))
    reseal(step, MANIFEST)


@pytest.mark.parametrize(
    "values",
    [
        {"model__width": 65536, "model__layers": 1024},
        {"model__layers": 2},
        {"cell__name": "lem", "cell__lem": {"dt": 1.0}, "cell__mingru": None},
        {"cell__mingru": {"expansion": 64.0}},
        {"model__mlp": 64.0},
        {"model__conv": 4096},
        {"model__tie": True},
    ],
)
def test_a_model_that_the_weights_do_not_bear_out_takes_no_memory(run, step, values, monkeypatch):
    forge(step, **values)
    monkeypatch.setattr("seqlm.api.build", lambda *_: pytest.fail("the model was built"))
    monkeypatch.setattr(
        "seqlm.training.trainer.build", lambda *_: pytest.fail("the model was built")
    )
    with pytest.raises(InputError, match="model.safetensors does not fit the config.toml"):
        seqlm.load(run.path)
    with pytest.raises(InputError, match="model.safetensors does not fit the config.toml"):
        launch.start(run=str(run.path), resume=True)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model__width": -1}, "model.width is -1; it must be at least 1"),
        ({"model__width": "x"}, "model.width is 'x'; it must be a whole number"),
        ({"model__widht": 1}, "Unknown configuration key 'model.widht'"),
        ({"cell__name": "../../evil"}, "Unknown cell"),
        ({"cell__name": "/tmp/evil.py"}, "was trained with a cell file"),
    ],
)
def test_a_configuration_that_cannot_be_is_an_input_error(run, step, values, message):
    forge(step, **values)
    with pytest.raises(InputError, match=message):
        seqlm.load(run.path, 4)


def test_a_cell_file_of_a_stranger_is_not_run(run, step, tmp_path):
    evil = tmp_path / "evil.py"
    evil.write_text("from pathlib import Path\nPath('ran').touch()\n")
    forge(step, cell__name=str(evil))
    for use in (
        lambda: seqlm.load(run.path, 4),
        lambda: launch.start(run=str(run.path), resume=True),
        lambda: launch.start(settings={"train.init_from": str(run.path)}),
    ):
        with pytest.raises(InputError, match="If you trust the file, name it: --cell"):
            use()
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "kind, fault",
    [("optimizer", "shape"), ("state", "shape"), ("state", "dtype"), ("state", "gone")],
)
def test_tensors_of_another_shape_are_not_resumed_from(run, step, kind, fault):
    path = step / f"{kind}.safetensors"
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.ndim)
    if fault == "shape":
        tensors[name] = tensors[name][:0]
    elif fault == "dtype":
        tensors[name] = tensors[name].double()
    else:
        del tensors[name]
    save_file(tensors, path)
    reseal(step, MANIFEST)
    with pytest.raises(InputError, match=f"{kind}.safetensors does not fit the config.toml"):
        launch.start(run=str(run.path), resume=True)


@pytest.mark.parametrize("name", [MANIFEST, "train_state.json", "tokenizer.json", "config.toml"])
@pytest.mark.parametrize("what", ["fifo", "device", "large"])
def test_what_is_no_small_plain_file_is_not_read(run, step, name, what):
    path = step / name
    path.unlink()
    if what == "fifo":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(10**11)  # sparse
            manifest = json.loads((step / MANIFEST).read_text()) if name != MANIFEST else None
        if manifest:
            manifest["files"][name]["bytes"] = 10**11
            (step / MANIFEST).write_text(to_json(seal(manifest)))
    with pytest.raises(InputError, match=name):
        runs.load(run.path, "4", *checkpoint.KINDS)


@pytest.mark.parametrize("entry", [{}, None, 7, {"bytes": -1, "sha256": ""}, {"bytes": 0}])
def test_a_manifest_that_lists_nothing_of_use_is_an_input_error(run, step, entry):
    manifest = json.loads((step / MANIFEST).read_text())
    for files in (entry, {**manifest["files"], "model.safetensors": entry}):
        (step / MANIFEST).write_text(to_json(seal({**manifest, "files": files})))
        with pytest.raises(InputError, match="does not list|cut or changed"):
            runs.load(run.path, "4", *checkpoint.KINDS)


def test_a_manifest_makes_seqlm_read_no_file_outside_the_step(run, step, monkeypatch):
    manifest = json.loads((step / MANIFEST).read_text())
    files = {**manifest["files"], "../../../../etc/passwd": {"bytes": 1, "sha256": "x"}}
    (step / MANIFEST).write_text(to_json(seal({**manifest, "files": files})))
    read = []
    real = checkpoint.refuse_changed.__globals__["HASHES"]["sha256"]
    monkeypatch.setitem(
        checkpoint.refuse_changed.__globals__["HASHES"],
        "sha256",
        lambda path: read.append(path) or real(path),
    )
    assert runs.load(run.path, "4", *checkpoint.KINDS)[0].step == 4
    assert {path.parent for path in read} == {step}


@pytest.mark.parametrize("name", ["run.pt", "weights.pth", "weights.pkl"])
def test_pickles_are_refused_wherever_a_run_or_corpus_is_named(seqlm_command, corpus, name):
    Path(name).write_bytes(b"\x80\x04")
    for command in (
        ["eval", "--run", name],
        ["train", "--init-from", name],
        ["check", "--run", name],
        ["train", "--data", name],
    ):
        result = seqlm_command(*command)
        assert (
            result.code == 3
            and f"{name} is a pickle. Opening a pickle can run any code" in result.err
        )


# A corpus


def changed(corpus: Path, **values) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text())
    (corpus / "manifest.json").write_text(to_json(seal({**manifest, **values})))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"dtype": "<f8"}, "its symbols are not those of the tokenizer"),
        ({"label": "\x1b[2J"}, "it is not the manifest of a corpus"),
        ({"label": 7}, "it is not the manifest of a corpus"),
        ({"card": None}, "it is not the manifest of a corpus"),
        ({"characters": "words"}, "its characters are not code points or bytes"),
        ({"splits": {}}, "its splits are not train, val and test"),
        ({"splits": {"train": 1, "val": 1, "../x": 1}}, "its splits are not train, val and test"),
        ({"splits": {"train": {}, "val": {}}}, "its counts of train are impossible"),
        ({"files": []}, "does not list tokenizer.json"),
    ],
)
def test_a_forged_corpus_is_an_input_error(corpus, values, message):
    changed(corpus, **values)
    with pytest.raises(InputError, match=message):
        open_corpus(corpus)


def test_symbols_that_no_vocabulary_has_are_an_input_error(corpus):
    symbols = np.fromfile(corpus / "train.bin", np.uint8)
    np.full_like(symbols, 255).tofile(corpus / "train.bin")
    reseal(corpus, "manifest.json")
    with pytest.raises(InputError, match="train.bin holds symbol 255, and the vocabulary has"):
        seqlm.train(corpus, **SMALL)
    val = np.fromfile(corpus / "val.bin", np.uint8)
    val[7] = 255
    val.tofile(corpus / "val.bin")
    reseal(corpus, "manifest.json")
    with pytest.raises(InputError, match="val.bin holds symbol 255, and the vocabulary has"):
        seqlm.train(corpus, **SMALL, force=True)


@pytest.mark.parametrize("ends", [[0], [5, 3], [-4, 9], [9, 10**12]])
def test_documents_that_end_where_none_can_are_an_input_error(tmp_path, ends):
    (tmp_path / "names.txt").write_text("".join(f"name {i}\n" for i in range(300)))
    corpus = prepare(["names.txt"], documents="lines")[0]
    whole = np.fromfile(corpus / "val.ends", "<i8")
    whole[: len(ends)] = ends
    whole.tofile(corpus / "val.ends")
    reseal(corpus, "manifest.json")
    with pytest.raises(InputError, match="val.ends is damaged: it is out of order"):
        seqlm.train(corpus, **SMALL)


def test_a_token_file_that_is_longer_or_shorter_than_its_counts_is_an_input_error(corpus):
    (corpus / "val.bin").write_bytes((corpus / "val.bin").read_bytes()[:-3])
    reseal(corpus, "manifest.json")
    with pytest.raises(InputError, match="val.bin is damaged: its size is not"):
        open_corpus(corpus)


@pytest.mark.parametrize("symbols", ["", "ba", "aa", "a\ud800"])
def test_a_forged_alphabet_is_an_input_error(corpus, symbols):
    tokenizer = {"unit": "char", "documents": "none", "symbols": symbols}
    (corpus / "tokenizer.json").write_text(json.dumps(tokenizer))
    reseal(corpus, "manifest.json")
    with pytest.raises(InputError, match="it is damaged"):
        open_corpus(corpus)


def test_damaged_pieces_are_an_input_error(tmp_path):
    """Bits of sentencepiece's own model flipped, 300 times, under a right seal."""
    (tmp_path / "story.txt").write_text("the cat sees a dog, and the dog a cat.\n" * 300)
    corpus = prepare(["story.txt"], unit="sentencepiece", vocab_size=320)[0]
    saved = json.loads((corpus / "tokenizer.json").read_text())
    model, draw = base64.b64decode(saved["model"]), random.Random(0)
    outcomes = {"opened": 0, "refused": 0}
    for _ in range(300):
        other = bytearray(model)
        other[draw.randrange(len(other))] ^= 1 << draw.randrange(8)
        other = base64.b64encode(other).decode()
        (corpus / "tokenizer.json").write_text(to_json({**saved, "model": other}))
        reseal(corpus, "manifest.json")
        try:
            tokenizer = open_corpus(corpus).tokenizer
            tokenizer.decode(tokenizer.encode("the cat\nsees 日本"))
            outcomes["opened"] += 1
        except SeqlmError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 30 and outcomes["opened"] > 30


def test_what_a_stranger_wrote_cannot_steer_the_terminal(seqlm_command, run, step):
    forge(step, data__path="\x1b[2J\x1b[31mred")
    result = seqlm_command("runs")
    assert result.code == 0 and "\x1b" not in result.out + result.err
    shutil.rmtree("data")  # where the corpus would be found by its fingerprint
    result = seqlm_command("eval", "--step", 4)
    assert result.code == 3 and "\x1b" not in result.err and "\\x1b[31mred" in result.err


def test_torch_is_never_asked_to_unpickle(run, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    monkeypatch.setattr("pickle.load", lambda *_, **__: pytest.fail("pickle.load was called"))
    seqlm.load(run.path).generate(chars=3)


# A run's folder


@pytest.mark.parametrize("name", [".lock", *history.FILES, "best", "config.toml"])
@pytest.mark.parametrize("what", ["link", "fifo"])
def test_nothing_is_written_through_a_name_in_a_strangers_run(run, name, what):
    path, precious = run.path / name, Path("precious.txt")
    precious.write_text("dear")
    path.unlink(missing_ok=True)
    if what == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(precious.resolve())
    setup = launch.start(run=str(run.path), resume=True, settings={"train.steps": 6})
    if (name, what) != (".lock", "fifo"):  # which can be locked as well as any file
        with pytest.raises(SeqlmError, match=name):
            next(setup.reports())
    else:
        next(setup.reports())
    assert precious.read_text() == "dear"


def test_a_link_among_the_leftovers_is_removed_and_not_followed(run):
    Path("other").mkdir()
    Path("other/file").write_text("dear")
    (run.path / f"{PREFIX}x").symlink_to(Path("other").resolve())
    setup = launch.start(run=str(run.path), resume=True, settings={"train.steps": 5})
    assert [report.step for report in setup.reports()] == [5]
    assert Path("other/file").read_text() == "dear" and not list(run.path.glob(".tmp-*"))


@pytest.mark.parametrize("pointer", ["best", "last"])
def test_a_pointer_of_thousands_of_digits_is_passed_over(run, pointer, seqlm_command):
    (run.path / pointer).write_text("step-" + "9" * 5000)
    assert runs.load(run.path, pointer)[0].step == 4
    assert seqlm_command("eval", "--step", "9" * 5000).code in (2, 3)


def test_a_step_that_leads_nowhere_is_none(run, seqlm_command):
    (run.path / "step-00000009").symlink_to("/nonexistent")
    assert seqlm_command("eval", "-q").code == 0
    assert seqlm_command("runs").code == 0


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_half_an_optimizer_is_not_resumed_from(run, step, key):
    tensors = load_file(step / "optimizer.safetensors")
    del tensors[next(name for name in tensors if name.endswith(f".{key}"))]
    save_file(tensors, step / "optimizer.safetensors")
    reseal(step, MANIFEST)
    with pytest.raises(InputError, match="The optimizer's state in .* is incomplete"):
        launch.start(run=str(run.path), resume=True)


@pytest.mark.parametrize("batch", [1_700_000, 2**62])
def test_a_batch_that_the_state_does_not_bear_out_takes_no_memory(run, step, batch, monkeypatch):
    forge(step, train__batch=batch, train__length=1)
    monkeypatch.setattr(
        "seqlm.training.trainer.build", lambda *_: pytest.fail("the model was built")
    )
    with pytest.raises(InputError, match="state.safetensors does not fit the config.toml"):
        launch.start(run=str(run.path), resume=True, settings={"train.batch": 4})


def test_layers_and_stacks_beyond_the_weights_take_no_time(run, step, monkeypatch):
    forge(step, model__layers=1024)
    with monkeypatch.context() as patch:
        patch.setattr("seqlm.model.blueprint", lambda *_: pytest.fail("a blueprint was drawn"))
        with pytest.raises(InputError, match="1024 layers does not fit"):
            seqlm.load(run.path, 4)
    with pytest.raises(SeqlmError, match="lists 2000 cells; it may list at most 1024"):
        launch.configuration("tiny", None, {"cell.name": ",".join(["mingru"] * 2000)})
