"""What is recorded does what it did: told by a tape of operations, as no GPU is here.

A tape is what a CUDA graph is: operations on tensors where these were, and numbers as they were.
"""

import weakref
from dataclasses import replace

import pytest
import torch
from conftest import start
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from seqlm import cells, graphs, runtime
from seqlm.errors import ShapeError
from seqlm.generation.generate import generate_many
from seqlm.graphs import Recorded
from seqlm.lab.contenders import seqlm_layer
from seqlm.model import LanguageModel
from seqlm.runtime import Choice, Runtime, using_backend
from seqlm.text.prepare import prepare
from seqlm.text.tokenizer import CharTokenizer
from seqlm.training import snapshot
from seqlm.training.launch import configuration

STATES = {"auto": "on", "off": "off"}
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


def seen(tensors):
    return tree_map_only(torch.Tensor, torch.Tensor.detach, tensors)


class Tape(TorchDispatchMode):
    """Records operations, and does them again into the memory of the first time."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.name().split(".")[0] in WAITS:
            raise RuntimeError(f"{function.name()} waits for the GPU")
        # as they are now: an operation may turn a tensor round in its place
        own = seen(arguments)
        given = function(*arguments, **(options or {}))
        self.operations.append((function, own, options or {}, seen(given)))
        return given

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():  # as they came to the tape
            for function, arguments, options, given in self.operations:
                again = function(*arguments, **options)
                for old, new in zip(tree_leaves(given), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def pool(self) -> tuple[int, int]:
        return 0, 0


@pytest.fixture
def tapes(monkeypatch) -> list[Tape]:
    """Recordings are tapes, also on the CPU; those that were made."""
    made = []

    def record(run, pool):
        run()
        made.append(Tape())
        with made[-1]:
            outputs = run()
        return made[-1], outputs

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(
        runtime, "pick_graphs", lambda wanted, _: Choice(STATES[wanted], "in a test")
    )
    return made


def trained(corpus, graphs, **given) -> tuple:
    """The metrics of six steps, and all that a saved step holds after the last."""
    given = {"runtime__backend": "torch", "runtime__graphs": graphs, **given}
    setup = start(corpus, graphs, **given)
    assert setup.trainer.recorded == (graphs == "auto")
    lines = [report.metrics() for report in setup.reports()]
    tensors = snapshot.tensors(setup.trainer)
    return lines, {part: {k: x.tolist() for k, x in own.items()} for part, own in tensors.items()}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"train__state": "reset", "runtime__dtype": "bfloat16"},
        {"train__accumulate": 2, "runtime__dtype": "float16"},
        {"model__dropout": 0.3, "model__conv": 4, "model__tie": True},
    ],
)
def test_recorded_steps_are_those_that_are_not_bit_for_bit(corpus, tapes, given):
    assert trained(corpus, "auto", **given) == trained(corpus, "off", **given)
    assert len(tapes) == 1


@pytest.mark.parametrize("cell", cells.names())
def test_every_cell_is_recorded(corpus, tapes, cell):
    given = dict(cell__name=cell, train__steps=3, train__eval_every=0)
    assert trained(corpus, "auto", **given) == trained(corpus, "off", **given)
    assert len(tapes) == 1


def test_a_weight_brought_back_to_its_bound_reaches_the_recording(corpus, tapes):
    given = dict(cell__name="indrnn", cell__bound=0.1, optim__lr=0.3)
    recorded, other = (trained(corpus, graphs, **given) for graphs in ("auto", "off"))
    assert recorded == other
    name = "blocks.0.cell.u"
    assert max(map(abs, recorded[1]["model"][name])) == pytest.approx(0.1)


def test_documents_are_recorded_by_their_shapes(text_file, tapes):
    corpus = prepare([str(text_file)], documents="lines")[0]
    given = dict(train__batch=2, train__length=24, model__dropout=0.3)
    assert trained(corpus, "auto", **given) == trained(corpus, "off", **given)
    assert len(tapes) > 1


def test_beyond_so_many_shapes_the_others_run_as_they_come(tapes, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_SHAPES", 2)
    double = Recorded(lambda x: (2 * x,))
    for _ in range(2):
        for size in (1, 2, 3):
            assert double(torch.ones(size))[0].tolist() == size * [2]
    assert len(tapes) == 2


def test_what_a_function_changes_it_changes_once_a_call(tapes):
    total = torch.zeros(())
    add = Recorded(lambda x: (total.add_(x),), changed=[total])
    for i in range(1, 4):
        add(torch.ones(()))
        assert total == i


def test_a_float16_scale_that_falls_reaches_the_recording(corpus, tapes):
    given = dict(runtime__backend="torch", runtime__dtype="float16")
    trainers = [start(corpus, g, **given, runtime__graphs=g).trainer for g in ("auto", "off")]
    for scale in (2.0**15, 2.0**10):
        norms = []
        for trainer in trainers:
            trainer.progress.loss_scale = scale
            norms.append(trainer.step(1e-3))
        assert norms[0] == norms[1]


def test_what_waits_for_the_gpu_runs_as_it_is_and_says_why(corpus, tapes):
    """Newton's method asks after every iteration whether it is at its end."""
    newton = {"cell__name": "lem", "cell__recurrence": "diagonal", "cell__solver": "newton"}
    plain = trained(corpus, "off", **newton)
    with pytest.warns(RuntimeWarning) as said:
        assert trained(corpus, "auto", **newton) == plain
    words = "Not recorded as a CUDA graph, so slower: aten::_local_scalar_dense waits for the GPU"
    assert [str(warning.message) for warning in said] == [words]


@pytest.mark.filterwarnings("ignore:Not recorded")
def test_what_a_failed_recording_had_in_memory_is_free_when_the_function_runs(tapes):
    seen = []

    def function(x):
        seen.append([made() is not None for made in kept])
        large = torch.zeros(9) + x
        kept.append(weakref.ref(large))
        return (large.sum() * large.sum().item(),)

    kept = []
    assert Recorded(function)(torch.ones(()))[0] == 81
    assert seen == [[], [False], [False, False]]


class Wrong(Tape):
    """A recording that forgets half of the operations."""

    def replay(self) -> None:
        self.operations = self.operations[::2]
        super().replay()


def test_a_recording_that_replays_other_numbers_is_left_out(corpus, tapes, monkeypatch):
    """One warning names the fault, the steps run unrecorded, and their results are right."""
    plain = trained(corpus, "off")
    monkeypatch.setitem(globals(), "Tape", Wrong)
    with pytest.warns(RuntimeWarning) as said:
        assert trained(corpus, "auto") == plain
    words = "Not recorded as a CUDA graph, so slower: its replay gave other numbers than the step"
    assert [str(warning.message) for warning in said] == [f"{words} itself"]


def test_a_wrong_change_in_place_is_found_too(tapes, monkeypatch):
    monkeypatch.setitem(globals(), "Tape", Wrong)
    total = torch.zeros(3)
    add = Recorded(lambda x: (x, total.add_(x), total.mul_(2))[:1], changed=[total])
    with pytest.warns(RuntimeWarning, match="its replay gave other numbers"):
        add(torch.ones(3))
    assert total.tolist() == [2, 2, 2]


def test_an_error_of_seqlms_own_is_not_taken_for_one_of_recording(tapes):
    def function(x):
        raise ShapeError("wrong")

    with pytest.raises(ShapeError, match="wrong"):
        Recorded(function)(torch.ones(()))


def test_recording_is_off_where_it_is_said_to_be():
    function, cuda = (lambda x: (x,)), torch.device("cuda")
    assert isinstance(graphs.recorded(function, cuda), Recorded)
    assert graphs.recorded(function, torch.device("cpu")) is function
    off = replace(Runtime.pick(), graphs=Choice("off", "as asked"))
    with off.active():
        assert graphs.recorded(function, cuda) is function


@pytest.mark.filterwarnings("always")
def test_a_warning_is_one_line_on_stderr(corpus, tapes, seqlm_command):
    newton = "--cell lem --set cell.recurrence=diagonal --set cell.solver=newton".split()
    given = "train --preset tiny --steps 1 --set runtime.backend=torch".split()
    ran = seqlm_command(*given, *newton)
    assert ran.code == 0
    assert ran.err.count("warning: Not recorded as a CUDA graph, so slower: ") == 1


@pytest.mark.parametrize("cell", cells.names())
def test_text_by_recorded_steps_is_the_same(tapes, monkeypatch, cell):
    tokenizer = CharTokenizer(" abcd")
    model = LanguageModel(tokenizer.vocab_size, 8, 2, cell, conv=3).eval()

    def texts():
        return [*generate_many(model, tokenizer, "a b", numbers=range(3), chars=9, stop=["c"])]

    with using_backend("torch"):
        plain = texts()
        monkeypatch.setattr(
            "seqlm.generation.generate.recorded", lambda function, _: Recorded(function)
        )
        assert texts() == plain
    assert len(tapes) >= 2  # one by one, and side by side


def test_graphs_are_for_gpus(corpus):
    assert runtime.pick_graphs("auto", "cuda") == ("on", "all kernels of a step launch together")
    assert runtime.pick_graphs("off", "cuda") == ("off", "as asked")
    for wanted in ("auto", "off"):
        assert runtime.pick_graphs(wanted, "cpu") == ("off", "the device is cpu")
    assert not start(corpus, "here").trainer.recorded


def test_the_bench_records_a_layer_of_seqlm_unless_graphs_are_off(tapes):
    config = configuration(None, None, {"model.width": 8, "train.batch": 2, "train.length": 3})[0]
    for graphs_wanted, made in (("off", 0), ("auto", 1)):
        options = {"runtime.backend": "torch", "runtime.graphs": graphs_wanted}
        layer_config = config.updated(options)
        work = seqlm_layer(layer_config)
        with Runtime.pick(layer_config.runtime).active():
            work.call()
            work.call()
        assert len(tapes) == made
