"""A step of a model in one compiled call gives what the step itself gives."""

import time
from functools import partial
from itertools import count

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from seqlm import runtime
from seqlm.cells.mingru import MinGRU
from seqlm.generation.context import single_step
from seqlm.model import LanguageModel, round_matrices

if fault := runtime.why_not("cpu", "cpu"):
    pytest.skip(fault, allow_module_level=True)

from seqlm.ops.cpu.helpers import helpers, threads
from seqlm.ops.cpu.program import HALF_LINEAR, OPERATION, THREADS
from seqlm.ops.cpu.recording import MOST_ROWS, OneCall

V = 11
# float32: sums have another order, and PyTorch's tanh is another approximation
close = partial(assert_close, rtol=1e-4, atol=1e-5)


def plain_step(model):
    def step(symbols, *state):
        logits, state = model.step(symbols, state)
        return logits, *state

    return step


def made(cell="mingru", options=None, *, rounded=False, **form):
    """A model of two blocks, and its step in one call.  rounded: its matrices are bfloat16's."""
    torch.manual_seed(0)
    with torch.inference_mode(False):  # PyTorch sees changes only of tensors made outside
        model = LanguageModel(V, 24, 2, cell, options, **form).eval()
        if rounded:
            round_matrices(model, torch.bfloat16)
    return model, OneCall(model, plain_step(model))


def inputs_of(model, rows):
    """Random symbols, not contiguous in memory, and a random state."""
    state = (torch.randn_like(part) for part in model.initial_state(rows))
    return torch.randint(V + 1, (rows, 2))[:, 0], *state


STEPS = [
    ("mingru", {"expansion": 1.5}, dict(conv=4)),
    ("mingru", {"candidate": "linear"}, dict(conv=2, tie=True, activation="swiglu")),
    ("minlstm", {"expansion": 1.5}, dict(conv=4, tie=True)),
    ("minlstm", {}, dict(mlp=0)),
    ("lem", {"dt": 0.5}, dict(conv=3, activation="swiglu")),
    ("lem", {"recurrence": "diagonal"}, {}),
    ("cfc", {}, dict(conv=4, tie=True)),
    ("cfc", {"timespan": 0.5, "mixed_memory": True, "backbone_activation": "gelu"}, {}),
    ("cfc", {"recurrence": "leaky"}, dict(conv=2)),
    ("mingru,lem", {}, dict(conv=4)),
]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("cell, options, form", STEPS)
@torch.inference_mode()
def test_one_call_gives_the_logits_and_the_state_of_a_step(cell, options, form, rounded):
    model, call = made(cell, options, rounded=rounded, **form)
    for rows in (3, 1, MOST_ROWS):
        symbols, *state = inputs_of(model, rows)
        for _ in range(2):
            logits, *after = call(symbols, *state)
            expected, expected_after = model.step(symbols, tuple(state))
            close((logits, *after), (expected, *expected_after))
            symbols, state = logits.argmax(-1), after
        assert call.recording is not None
        assert rounded == any(p[OPERATION] == HALF_LINEAR for p in call.recording.program)


@torch.inference_mode()
def test_a_row_depends_neither_on_the_others_nor_on_the_number_of_threads():
    """To the last bit, so that a seed gives one text."""
    model, call = made("mingru,cfc", conv=4)
    inputs = inputs_of(model, 9)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = call(*inputs)
        for row in range(9):
            alone = call(*(part[row : row + 1] for part in inputs))
            assert all(torch.equal(x[0], y[row]) for x, y in zip(alone, expected, strict=True))
        torch.set_num_threads(3)
        if threads() == 1:
            pytest.skip("this process has one processor")
        helpers().shared[THREADS], deadline = 1, time.monotonic() + 60
        while helpers().shared[THREADS] == 1:
            assert time.monotonic() < deadline
            helpers().excess = 0  # else calls on a busy machine leave the helpers out
            assert all(map(torch.equal, call(*inputs), expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rounded", [False, True])
@torch.inference_mode()
def test_weights_that_change_are_noticed(rounded):
    """In place, with new memory, and as another tensor."""
    model, call = made("minlstm", rounded=rounded, conv=2)
    inputs = inputs_of(model, 2)
    call(*inputs)
    changes = [
        lambda weight: weight.mul_(2),
        lambda weight: setattr(weight, "data", weight + 1),
        lambda _: setattr(model.head, "weight", nn.Parameter(torch.randn(V, 24))),
    ]
    for change in changes:
        before = call(*inputs)[0]
        change(model.head.weight)
        after = call(*inputs)[0]
        close(after, plain_step(model)(*inputs)[0])
        assert not torch.allclose(before, after) and call.recording is not None


@torch.inference_mode()
def test_results_have_memory_of_their_own():
    model, call = made(conv=2)
    inputs = inputs_of(model, 2)
    first = call(*inputs)
    copies = [x.clone() for x in first]
    call(*inputs_of(model, 2))
    assert all(map(torch.equal, first, copies))


class Foreign(MinGRU):
    """Reads a tensor that is no weight, so that its later changes would go unnoticed."""

    def recur(self, drive, state):
        return super().recur(drive * self.scale, state)


class Branching(MinGRU):
    def recur(self, drive, state):
        return super().recur(drive if drive.max() > 0 else -drive, state)


@pytest.mark.parametrize("kind", [Foreign, Branching])
@torch.inference_mode()
def test_a_step_that_a_program_cannot_repeat_is_run_itself(kind):
    model, call = made()
    model.blocks[0].cell.__class__ = kind
    model.blocks[0].cell.scale = torch.full((48,), 0.5)
    inputs = inputs_of(model, 2)
    assert all(map(torch.equal, call(*inputs), plain_step(model)(*inputs)))
    assert call.recording is None


@torch.inference_mode()
def test_a_program_with_other_numbers_than_the_step_is_dropped():
    model, _ = made()
    calls = count(1)

    def step(symbols, *state):
        logits, *state = plain_step(model)(symbols, *state)
        return logits * next(calls), *state

    call = OneCall(model, step)
    with pytest.warns(RuntimeWarning, match="Not compiled as one call, so slower: its replay"):
        call(*inputs_of(model, 1))
    assert call.recording is None


@pytest.mark.parametrize("rows", [1, 2])
@torch.inference_mode()
def test_a_symbol_that_does_not_exist_is_an_error(rows):
    model, call = made()
    symbols, *state = inputs_of(model, rows)
    call(symbols, *state)
    with pytest.raises(IndexError):
        call(torch.tensor([0, V + 1])[-rows:], *state)


def test_gradients_autocast_and_float64_take_the_step_itself():
    model, _ = made()
    step, inputs = single_step(model), inputs_of(model, 2)
    assert step(*inputs)[0].requires_grad
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert step(*inputs)[0].dtype == torch.bfloat16
        close(step(*inputs), plain_step(model)(*inputs))
        model.double()
        exact = step(inputs[0], *model.initial_state(2))
        assert exact[0].dtype == torch.float64
