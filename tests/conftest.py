"""Shared fixtures: a small text and run, a folder to work in, the command line in-process."""

import json
import math
import os
import random
import shutil
import signal
import sysconfig
from contextlib import chdir
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

# the suite is about the CPU, and says the same where there is a GPU; kernels for one are read by
# their interpreter.  SEQLM_TEST_GPU=1 is for test_triton.py and test_gpu.py on one, which the suite
# runs where there is one
GPU = os.environ.get("SEQLM_TEST_GPU") == "1"
if not GPU:
    os.environ.setdefault("SEQLM_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products on it

# set before typer draws anything: plain messages of a fixed width, as in a log
os.environ.update(NO_COLOR="1", TERM="dumb", COLUMNS="200", _TYPER_FORCE_DISABLE_TERMINAL="1")

# nohup ignores SIGHUP and a shell's background ignores SIGINT; tests' processes would, too
for number, handler in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# the tests' tensors are so small that a second thread only waits for the first
torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared" / "data"
SHAKESPEARE = SHARED / "tinyshakespeare.txt"
# one cell of each kind of state: a linear scan's, dense, a matrix, a window, inputs of a filter.
# For tests of what treats every cell alike; test_laws.py asks every cell
KINDS = ("mingru", "lem", "gla", "attention", "hyena")
needs_shakespeare = pytest.mark.skipif(
    not SHAKESPEARE.is_file(), reason="tiny Shakespeare is not beside the project"
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own: data/ and checkpoints/ land there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def uninitialised_memory_is_nan():
    """torch.empty returns NaN, so that a test sees elements that a kernel does not write."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def quick_interpreter():
    """Triton's interpreter prepares its language anew in every call of one of our functions, though
    the kernel that calls has it ready: three quarters of its time.  For every value it makes a
    table of dtypes anew: a tenth."""
    with pytest.MonkeyPatch.context() as patch:
        if not GPU and find_spec("triton"):
            from triton.runtime import interpreter

            function = interpreter.InterpretedFunction
            patch.setattr(function, "__call__", lambda f, *x, **y: f.rewrite()(*x, **y))
            found, dtype_of = {}, interpreter._get_np_dtype

            def known(kind):
                name = kind.scalar.name
                return found[name] if name in found else found.setdefault(name, dtype_of(kind))

            patch.setattr(interpreter, "_get_np_dtype", known)
        yield


def close(x: torch.Tensor, y: torch.Tensor, tolerance: float) -> None:
    assert x.dtype == y.dtype and x.shape == y.shape
    x, y = x.double(), y.double()
    assert x.isfinite().all()
    assert (x - y).norm() <= tolerance * y.norm() + 1e-30


def sentences(characters: int, seed: int = 0) -> str:
    """Text with some structure, which a model can learn in seconds."""
    words = random.Random(seed)
    nouns, verbs = ["the cat", "a dog", "the old king", "my friend"], ["sees", "likes", "fears"]
    text = ""
    while len(text) < characters:
        text += f"{words.choice(nouns)} {words.choice(verbs)} {words.choice(nouns)}.\n"
    return text[:characters]


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(sentences(4000), encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Every file that a run or corpus keeps would be waited for; no power fails in these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def short_samples():
    """A validation keeps a text of 200 characters, which takes longer than a small training."""
    from seqlm.training import loop

    generate = loop.generate

    def shorter(*given, chars, **more):
        return generate(*given, chars=min(chars, 30), **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "generate", shorter)
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory, short_samples) -> Path:
    """A folder with the small corpus and a run, made once; tests use copies of it."""
    import seqlm
    from seqlm.text.prepare import prepare

    folder = tmp_path_factory.mktemp("made")
    with chdir(folder):
        Path("story.txt").write_text(sentences(4000), encoding="utf-8")
        seqlm.train(prepare(["story.txt"])[0], **SMALL)
    return folder


DIAGONAL = {"recurrence": "diagonal"}
LOOPS = [  # cells whose compiled loops are all that there are, those that take longest first
    ("lem", {}),
    ("cfc", {}),
    ("lem", DIAGONAL),
    ("cfc", DIAGONAL),
    ("gla", {}),
    ("mingru", {}),
    ("lem", {**DIAGONAL, "solver": "newton"}),
    ("mamba", {}),
    ("h3", {}),
]


@pytest.fixture(scope="session", autouse=True)
def compiled_once(request, tmp_path_factory):
    """Compiling all loops takes a minute and more, and workers that need the same one at the same
    time would each compile it.  So before the tests they share out all loops, if the tests are all
    tests."""
    if not hasattr(request.config, "workerinput") or request.session.testscollected < 1000:
        return

    def compile(name, options, dtype):
        from seqlm import cells

        cell, x = cells.find(name)(8, **options).to(dtype), torch.randn(2, 9, 8, dtype=dtype)
        cell(x)[0].sum().backward()

    work = [partial(request.getfixturevalue, "made")]
    work += [partial(compile, *loop, x) for loop in LOOPS for x in (torch.float32, torch.bfloat16)]
    for number, part in enumerate(work):
        try:
            (tmp_path_factory.getbasetemp().parent / f"compiled-{number}").touch(exist_ok=False)
        except FileExistsError:  # another worker has begun it
            continue
        part()


@pytest.fixture
def corpus(made, text_file) -> Path:
    """4,000 characters, prepared: data/story."""
    shutil.copytree(made / "data", "data")
    return Path("data/story")


@pytest.fixture(scope="session")
def beginnings(tmp_path_factory) -> Path:
    """The first 2,000 bytes of every file of Python's standard library that is in no package."""
    folder = tmp_path_factory.mktemp("library")
    for path in Path(os.__file__).parent.glob("*.py"):
        (folder / path.name).write_bytes(path.read_bytes()[:2000])
    return folder


@pytest.fixture
def small_library(monkeypatch, beginnings):
    """Makes the built-in corpus small and quick to prepare: the beginning of each file."""
    real = sysconfig.get_paths
    monkeypatch.setattr(
        sysconfig, "get_paths", lambda *given: real(*given) if given else {"stdlib": beginnings}
    )


SMALL = dict(preset="tiny", width=16, layers=1, batch=4, length=16, steps=4)


@pytest.fixture
def run(made, corpus):
    """A run of four steps on the small corpus: checkpoints/story-mingru."""
    import seqlm

    shutil.copytree(made / "checkpoints", "checkpoints")
    return seqlm.load("checkpoints/story-mingru")


TRAINED = {
    "model.width": 16,
    "model.layers": 1,
    "train.batch": 4,
    "train.length": 16,
    "train.steps": 6,
    "train.eval_every": 3,
    "train.save_every": 2,
    "train.sample_chars": 20,
}


def start(corpus, name, resume=False, **given):
    """A training of six small steps; `section__name=value` sets an option."""
    from seqlm.training import launch

    given = {key.replace("__", "."): value for key, value in given.items()}
    if resume:
        return launch.start(run=name, resume=True, settings=given)
    return launch.start(str(corpus), run=name, preset="tiny", settings={**TRAINED, **given})


def run_files(run: Path, step: int) -> dict:
    """All bytes of a step and of its run's lines and pointers, without times."""
    folder = run / f"step-{step:08d}"
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = "metrics.jsonl", "samples.jsonl", "best", "last"
    found |= {name: (run / name).read_bytes() for name in names}
    state = json.loads(found.pop("train_state.json"))
    del state["elapsed"], found["MANIFEST.json"]  # which has its hash
    return found | {"state": state}


def scored(bits: float):
    """A validation of that many bits per character."""
    from seqlm.evaluation.evaluate import Score

    return Score(nats=bits * math.log(2), correct=0, tokens=1, chars=1, bytes=1)


@pytest.fixture
def at_once(monkeypatch):
    """compare trains in this process, for tests that say nothing of processes, which take their
    time."""
    from seqlm.lab import compare

    def spawn(work, *arguments, daemon):
        words = []
        work(SimpleNamespace(send=words.append, poll=lambda: False), *arguments)
        ours = SimpleNamespace(recv=iter(words).__next__, close=lambda: None)
        return SimpleNamespace(join=lambda: None), ours

    monkeypatch.setattr(compare, "spawn", spawn)
    monkeypatch.setattr(compare, "keep_memory", lambda: None)


@pytest.fixture
def in_threads(monkeypatch):
    """bench times contenders in threads of this process: quick, but their memory means nothing."""
    from seqlm.lab import bench

    def spawn(work, *arguments, daemon):
        ours, theirs = Pipe()
        thread = Thread(target=work, args=[theirs, *arguments], daemon=daemon)
        thread.start()
        return SimpleNamespace(join=thread.join, kill=lambda: None), ours

    monkeypatch.setattr(bench, "spawn", spawn)
    monkeypatch.setattr(bench, "WARM_UP_SECONDS", 0.0)


SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"
MISFIT = "fields are not those of docs/outputs.toml; after a change there: make reference"
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def valid(schema, value, path=""):
    """Asserts that a value is as docs/schemas/NAME.json says, or as a part of such a file says: of
    JSON Schema the keywords that docs/reference.py writes."""
    if isinstance(schema, str):
        schema, path = json.loads((SCHEMAS / f"{schema}.json").read_text("utf-8")), schema
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    fits = [isinstance(value, TYPES[kind]) for kind in kinds]
    assert any(fits) and ("boolean" in kinds or not isinstance(value, bool)), (path, value)
    assert value in schema.get("enum", [value]), (path, value)
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            valid(schema["items"], item, f"{path}[{index}]")
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        assert {*schema.get("required", [])} <= {*value}, (path, MISFIT)
        for name, inner in value.items():
            assert name in properties or others is not False, (path, name, MISFIT)
            if rule := properties.get(name, others):
                valid(rule, inner, f"{path}.{name}")


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"JSON has {name}"))


@cache
def program():
    """The command line, whose hundreds of options typer otherwise reads anew for every command."""
    from typer.main import get_command

    from seqlm.cli._app import app

    return get_command(app)


@pytest.fixture
def seqlm_command(capfdbinary):
    """seqlm(*args) in this process: its exit code and what it wrote."""

    def command(*arguments: object) -> Result:
        capfdbinary.readouterr()
        with pytest.raises(SystemExit) as ended:
            program()([str(argument) for argument in arguments], prog_name="seqlm")
        out, err = capfdbinary.readouterr()
        return Result(ended.value.code or 0, out.decode("utf-8"), err.decode("utf-8"))

    return command
