"""What is picked on machines that are not here, by what torch would say there."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import start
from fuzz import reseal

from seqlm import ops, runtime
from seqlm.errors import UsageError
from seqlm.store import runs


def present(monkeypatch, cuda=False, mps=False, bfloat16=False, capability=(0, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(
    "there, device", [({}, "cpu"), (dict(mps=True), "mps"), (dict(cuda=True, mps=True), "cuda")]
)
def test_auto_takes_cuda_then_mps_then_the_processor(monkeypatch, there, device):
    present(monkeypatch, **there)
    assert runtime.pick_device("auto").value == device


@pytest.mark.parametrize(
    "there, dtype, reason",
    [
        (dict(bfloat16=True, capability=(8, 0)), "bfloat16", "the GPU computes it natively"),
        (dict(capability=(7, 5)), "float16", "the GPU has no bfloat16; losses are scaled"),
        (dict(capability=(6, 1)), "float32", "the GPU has no bfloat16, and no tensor cores"),
    ],
)
def test_a_gpu_takes_the_dtype_that_it_computes_fast(monkeypatch, there, dtype, reason):
    present(monkeypatch, cuda=True, **there)
    picked = runtime.pick_dtype("auto", "cuda")
    assert picked.value == dtype and picked.reason.startswith(reason)


def test_mps_computes_in_float32_unless_asked_and_where_torch_can(monkeypatch):
    assert runtime.pick_dtype("auto", "mps").value == "float32"
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: True)
    assert runtime.pick_dtype("bfloat16", "mps").value == "bfloat16"
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: False)
    with pytest.raises(UsageError, match="torch mixes no dtypes on this mps. Use --dtype float32"):
        runtime.pick_dtype("bfloat16", "mps")


def test_env_says_that_float32_is_not_rounded_to_tf32(seqlm_command, monkeypatch):
    assert seqlm_command("env", "--json").json["tf32"] == "off"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert runtime.tf32() == "on"


def test_env_names_the_gpu_where_there_is_one(seqlm_command, monkeypatch):
    assert seqlm_command("env", "--json").json["gpu"] is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert runtime.gpu("cuda") == "NVIDIA X1, compute capability 9.0, CUDA 13.0"


def test_a_run_of_a_gpu_goes_on_without_one_when_told(corpus):
    """As its files say; the tensors in them are of no device."""
    setup = start(corpus, "moved")
    list(setup.reports())
    folder = setup.run / "step-00000006"
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace('device = "auto"', 'device = "cuda"'))
    state = (folder / "train_state.json").read_text()
    (folder / "train_state.json").write_text(state.replace('"device": "cpu"', '"device": "cuda"'))
    reseal(folder, "MANIFEST.json")
    with pytest.raises(UsageError, match="--device cuda: torch finds no such device here"):
        start(None, "moved", resume=True, train__steps=8)
    given = dict(train__steps=8, runtime__device="cpu")
    resumed = start(None, "moved", resume=True, **given)
    assert "device cpu, was cuda" in resumed.warnings[0]
    assert [report.step for report in resumed.reports()] == [7, 8]
    assert runs.load(setup.run, "last")[0].config.runtime.device == "cpu"


@pytest.mark.parametrize(
    "source, reason",
    [
        ("raise ImportError('Numba needs NumPy 2.3 or less')", "Numba needs NumPy 2.3 or less"),
        ("raise AttributeError", "AttributeError"),
        ("import nothing_of_the_kind", "No module named 'nothing_of_the_kind'"),
    ],
)
def test_a_broken_numba_means_torch_with_a_word(monkeypatch, tmp_path, source, reason):
    """Numba refuses NumPys that it does not know when it is imported."""
    (tmp_path / "numba.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    monkeypatch.setattr(runtime, "_numba_fault", runtime._numba_fault.__wrapped__)
    expected = f"numba cannot be imported: {reason}"
    assert runtime.pick_backend("auto", "cpu") == ("torch", expected)
    x = torch.zeros(1)
    assert ops.backend.of(x) == "torch"
    with pytest.raises(UsageError, match=f"runtime.backend is cpu, and {expected}"):
        runtime.pick_backend("cpu", "cpu")


def test_loops_that_numba_may_not_compile_are_not_taken(monkeypatch):
    import numba

    monkeypatch.setattr(runtime, "_numba_fault", runtime._numba_fault.__wrapped__)
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert runtime.why_not("cpu", "cpu") == "NUMBA_DISABLE_JIT is set"
    assert runtime.why_not("torch", "cpu") is None
    assert runtime.pick_backend("auto", "cpu").value == "torch"


def test_the_backend_of_a_block_ends_with_it_and_is_that_of_its_thread():
    before = runtime.current_backend()
    with runtime.using_backend("reference"), runtime.using_backend("torch"):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(runtime.current_backend).result() == "auto"
        assert runtime.current_backend() == "torch"
    assert runtime.current_backend() == before == "auto"
