"""The runtime that is picked on other machines, which a fake torch describes."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import start
from fuzz import reseal

import seqlm
import seqlm.model
from seqlm import runtime
from seqlm.cli._app import share_cores
from seqlm.config import RuntimeConfig
from seqlm.errors import UsageError
from seqlm.ops.dispatch import Op
from seqlm.runtime import Choice, Runtime
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
    with pytest.raises(UsageError, match="torch has no autocast on mps. Use --dtype float32"):
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
    """The device is in the configuration; saved tensors have none."""
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
    """When imported, numba refuses versions of NumPy that it does not know."""
    (tmp_path / "numba.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    monkeypatch.setattr(runtime, "_numba_fault", runtime._numba_fault.__wrapped__)
    expected = f"numba cannot be imported: {reason}"
    assert runtime.pick_backend("auto", "cpu") == ("torch", expected)
    x = torch.zeros(1)
    assert Op("linear_scan").code((x,), {}).backend == "torch"
    with pytest.raises(UsageError, match=f"runtime.backend is cpu, but {expected}"):
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


def held() -> tuple:
    """The settings in force: backend, threads, recording, and cuDNN's TF32 flag."""
    rounds = torch.backends.cudnn.allow_tf32
    return runtime.current_backend(), torch.get_num_threads(), runtime.recording(), rounds


def picked(**wanted) -> Runtime:
    return Runtime.pick(RuntimeConfig(**wanted))


def test_a_runtime_holds_in_its_block_and_nests():
    before = held()
    with picked(backend="torch", threads=2).active():
        assert held() == ("torch", 2, False, False)
        with picked(backend="reference", threads=3).active():
            assert held() == ("reference", 3, False, False)
        assert held() == ("torch", 2, False, False)
        with pytest.raises(ZeroDivisionError), picked(threads=3).active():
            raise ZeroDivisionError
        assert held() == ("torch", 2, False, False)
    assert held() == before == ("auto", 1, True, True)


def test_a_recording_runtime_records_in_its_block_only():
    on = replace(picked(), graphs=Choice("on", "in a test"))
    with on.active():
        assert runtime.recording()
        with picked().active():
            assert not runtime.recording()
        assert runtime.recording()


def test_a_runtime_holds_in_every_thread_that_enters_it():
    """cuDNN's flag belongs to the process: it is restored when the last thread leaves."""
    together = threading.Barrier(3)

    def compute(backend: str, threads: int) -> tuple:
        torch.set_num_threads(1)
        with picked(backend=backend, threads=threads).active():
            together.wait()
            found = held()
            together.wait()
        return found, torch.get_num_threads()

    with ThreadPoolExecutor(3) as pool:
        asked = [("torch", 2), ("reference", 3), ("cpu", 4)]
        found = list(pool.map(lambda one: compute(*one), asked))
    assert found == [((*one, False, False), 1) for one in asked]
    assert held() == ("auto", 1, True, True)


def test_between_two_items_a_runtime_leaves_the_caller_alone():
    before = held()
    items = picked(backend="torch", threads=2).each(held() for _ in range(2))
    found = [(item, held()) for item in items]
    assert found == [(("torch", 2, False, False), before)] * 2


def test_a_number_of_threads_out_of_range_is_refused():
    for threads in (-1, 1025):
        with pytest.raises(UsageError, match=f"--threads {threads}: it must be from 0"):
            picked(threads=threads)
    with pytest.raises(UsageError, match="Unknown value of runtime.graphs 'on'"):
        picked(graphs="on")


@pytest.fixture
def backends(monkeypatch):
    """The backends on which models compute in the test."""
    seen, real = set(), seqlm.model.LanguageModel._run

    def run(model, *arguments):
        seen.add((runtime.current_backend(), torch.get_num_threads()))
        return real(model, *arguments)

    monkeypatch.setattr("seqlm.model.LanguageModel._run", run)
    return seen


@pytest.mark.parametrize(
    "compute",
    [
        lambda run: run.evaluate(),
        lambda run: run.evaluate(text=b"the cat", protocol="window", context=3),
        lambda run: run.bits_per_char("the cat"),
        lambda run: run.generate("the", chars=3),
        lambda run: list(run.stream("the", chars=3)),
        lambda run: list(run.samples("the", 2, chars=3)),
    ],
)
def test_a_loaded_run_computes_as_it_was_asked_to(run, backends, compute):
    compute(seqlm.load(run.path, backend="torch", threads=2))
    assert backends == {("torch", 2)}


@pytest.mark.parametrize(
    "command, key",
    [
        (("eval", "--text", "story.txt"), "backend"),
        (("generate", "the", "--chars", "5"), "backend"),
        (("check",), "backend"),
    ],
)
def test_commands_that_read_a_run_compute_as_they_are_asked_to(
    run, seqlm_command, backends, command, key
):
    """The backend in the run's own configuration does not matter."""
    ran = seqlm_command(*command, "--set", "runtime.backend=reference", "--threads", 2, "--json")
    assert ran.code == 0 and ran.json[key] == "reference"
    assert backends == {("reference", 2)}


@pytest.mark.parametrize(
    "given, message",
    [
        ("model.width=8", "this command only takes runtime.KEY=VALUE. Remove it."),
        ("runtime.nothing=8", "Unknown configuration key 'runtime.nothing'"),
        (
            "runtime.dtype=bfloat16",
            "this command computes in float32. Remove it.",
        ),
        ("runtime.backend=fast", "runtime.backend is 'fast'; it must be one of: auto"),
        ("runtime.threads=many", "runtime.threads is 'many'; it must be a whole number"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "generate"])
def test_what_a_saved_run_cannot_be_asked_for_is_refused(seqlm_command, command, given, message):
    ran = seqlm_command(command, "--set", given)
    assert ran.code == 2 and message in ran.err


@pytest.mark.usefixtures("quick_interpreter")
def test_a_run_trained_with_triton_is_checked_on_what_is_here(corpus, seqlm_command, monkeypatch):
    list(start(corpus, "kernels", runtime__backend="triton", train__steps=1).reports())
    monkeypatch.setattr(runtime, "_triton_fault", lambda device: "the device is cpu")
    for command in ("check", "eval"):
        ran = seqlm_command(command, "--json")
        assert ran.code == 0 and ran.json["backend"] == "cpu"


def test_the_closing_figure_is_computed_as_the_training(corpus, seqlm_command, backends):
    given = "--preset tiny --width 8 --steps 1 --threads 2 --set runtime.backend=torch".split()
    assert seqlm_command("train", *given, "--json").json["backend"] == "torch"
    assert backends == {("torch", 2)}


def test_a_run_of_a_version_with_torch_compile_loads_and_goes_on(corpus):
    """The key runtime.compile was removed together with torch.compile."""
    folder = start(corpus, "old")
    list(folder.reports())
    step = folder.run / "step-00000006"
    text = (step / "config.toml").read_text()
    (step / "config.toml").write_text(text.replace("[runtime]", '[runtime]\ncompile = "auto"'))
    reseal(step, "MANIFEST.json")
    assert seqlm.load("old", "last").step == 6
    resumed = start(None, "old", resume=True, train__steps=8)
    assert [report.step for report in resumed.reports()] == [7, 8]


def test_env_says_what_is_not_installed(seqlm_command, monkeypatch):
    monkeypatch.setattr("seqlm.cli.env.packages_distributions", dict)
    monkeypatch.setattr(runtime, "_numba_fault", lambda: "numba is not installed")
    found = seqlm_command("env", "--json").json
    assert found["numba"] == found["triton"] == "not installed"
    assert found["backend"] == "torch" and found["backend_reason"] == "numba is not installed"
    assert "cpu (numba is not installed)" in found["backends"]


def test_env_shows_the_whole_runtime_with_its_reasons(seqlm_command):
    found = seqlm_command("env", "--json").json
    for choice in ("device", "dtype", "backend", "threads", "graphs"):
        assert found[choice] and found[f"{choice}_reason"]


def test_importing_seqlm_changes_nothing_in_the_users_process():
    code = (
        "import os, torch; cudnn = torch.backends.cudnn.allow_tf32; before = dict(os.environ);"
        "import seqlm; seqlm.load; import seqlm.cli;"
        "assert dict(os.environ) == before and torch.backends.cudnn.allow_tf32 == cudnn"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_command_lets_idle_threads_sleep_unless_the_user_says_how_they_wait(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "5"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    share_cores()
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.fixture
def machine(monkeypatch):
    """A machine of 4 cores whose load average and running threads a test sets."""
    found = SimpleNamespace(load=0.0, used=0.0, others=True)
    monkeypatch.setattr(os, "getloadavg", lambda: (found.load, 9.0, 9.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(runtime.time, "process_time", lambda: found.used)
    monkeypatch.setattr(runtime, "_others_run", lambda: found.others)
    return found


@pytest.mark.parametrize(
    "load, threads, remedy",
    [(3.1, 4, " Try --threads 1."), (2.0, 4, " Try --threads 2."), (3.1, 1, ""), (9.0, 1, "")],
)
def test_a_busy_machine_is_said_to_be_one_where_fewer_threads_would_help(
    machine, load, threads, remedy
):
    machine.load = load
    said = f"This machine is busy (load {load} on 4 cores): everything will be slower.{remedy}"
    expected = said if remedy else None  # nothing is said where there is nothing to do
    assert picked(threads=threads).busy() == expected
    machine.load, machine.used = 12.0, 6000.0  # an hour of work: the load is of one minute
    assert "load 12.0" in picked(threads=4).busy()


def test_a_machine_is_not_called_busy_for_what_has_ended_or_is_this_process(machine):
    machine.load = 0.4  # what an idle desktop has
    assert picked(threads=4).busy() is None
    machine.load, machine.used = 1.2, 60.0  # a minute of work before the training begins
    assert picked(threads=4).busy() is None
    machine.load, machine.used, machine.others = 4.0, 0.0, False  # a training that has just ended
    assert picked(threads=4).busy() is None


def test_training_on_a_busy_machine_begins_with_a_word(machine, corpus, seqlm_command):
    machine.load = 3.1
    given = "--preset tiny --width 8 --steps 1 --threads 2".split()
    word = "This machine is busy (load 3.1 on 4 cores): everything will be slower. Try --threads 1."
    assert seqlm_command("train", *given).err.count(word) == 1
    machine.load = 0.1
    assert "busy" not in seqlm_command("train", "--force", *given).err


def test_what_runs_beside_this_thread_is_read_from_the_system(monkeypatch):
    for text, expected in (("0.5 0.5 0.5 1/99 1234", False), ("0.5 0.5 0.5 3/99 1234", True)):
        monkeypatch.setattr(runtime.Path, "read_text", lambda path, text=text: text)
        assert runtime._others_run() == expected

    def absent(path):
        raise FileNotFoundError

    monkeypatch.setattr(runtime.Path, "read_text", absent)
    assert runtime._others_run()
