"""The laws: what every cell obeys, on every backend.  A new cell is tested by being there."""

# B batch, T time, D model width

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad, gradcheck

from seqlm import cells, ops
from seqlm.model import LanguageModel
from seqlm.runtime import using_backend

B, D = 3, 6
LENGTHS = [1, 2, 7, 63, 64, 65]
VARIANTS = [
    ("mingru", {"candidate": "linear", "expansion": 1.5}),
    ("minlstm", {"candidate": "linear", "forget_bias": 1.0, "expansion": 2.0}),
    ("minlstm", {"normalize": False}),
    ("lem", {"dt": 0.3}),
    ("cfc", {"mode": "no_gate", "backbone_layers": 2, "backbone_activation": "silu"}),
    ("cfc", {"mode": "pure", "timespan": 0.5}),
    ("cfc", {"mixed_memory": True}),
    ("lem", {"recurrence": "diagonal"}),
    ("lem", {"recurrence": "diagonal", "solver": "newton", "dt": 0.3}),
    ("cfc", {"recurrence": "diagonal", "timespan": 1.5}),
    ("cfc", {"recurrence": "leaky", "mode": "no_gate"}),
    ("cfc", {"recurrence": "leaky", "solver": "newton"}),
    ("cfc", {"recurrence": "leaky", "mode": "pure"}),
    ("attention", {"context": 8, "heads": 3}),
    ("mamba", {"expansion": 1.0, "states": 3, "kernel": 2}),
    ("gla", {"decay": "scalar", "heads": 2}),
    ("gla", {"key": "tied"}),
    ("mogrifier", {"rank": 2, "rounds": 2}),
]
CASES = [(name, {}) for name in cells.names()] + VARIANTS


def label(case):
    return f"{case[0]}-{'-'.join(f'{k}={v}' for k, v in case[1].items())}"


every_cell = pytest.mark.parametrize("case", CASES, ids=label)
# only operations of PyTorch on every backend
NO_OP = "gru lstm cornn attention slstm ltc s4d tcn none".split()
# "cpu" alone asks two backends, because "torch" computes float64; test_ops.py asks the reference
ONE_OP = "mogrifier deltanet gla mlstm rglru aaren h3 hyena".split()


def backends(name):
    """Those that a cell is asked on; triton's interpreter takes time, so test_triton.py asks it."""
    if name in NO_OP:
        return ("torch",)
    return ("cpu",) if name in ONE_OP else ("reference", "torch", "cpu")


def every_cell_on_every_backend(*dtypes):
    """Cases, backends and, if there are several, dtypes; in float64 "cpu" computes as "torch"."""
    return pytest.mark.parametrize(
        "case, backend, dtype" if len(dtypes) > 1 else "case, backend",
        [
            pytest.param(case, backend, *([dtype] if len(dtypes) > 1 else []), id="-".join(names))
            for case in CASES
            for backend in backends(case[0])
            for dtype in dtypes
            if (backend, dtype) != ("cpu", torch.float64) or case[0] in ONE_OP
            for names in [(label(case), backend, str(dtype).removeprefix("torch."))]
        ],
    )


# smaller states and fewer repetitions than by default, where they are many
SMALLER = {
    "attention": {"context": 64},
    "hyena": {"context": 20},
    "s4d": {"states": 3},
    "h3": {"states": 2},
    "ltc": {"unfolds": 2},
    "mogrifier": {"rounds": 3},
}

# for finite differences, of which each number of a state needs two
TINY_STATE = {
    "attention": {"context": 4},
    "hyena": {"context": 4},
    "mamba": {"states": 2, "kernel": 3},
    "tcn": {"levels": 2},
}

# A unit keeps about 0.999 of its state in a step if a part of a weight has a value: the weight, the
# number of its parts, which part, and the value
LONG_MEMORY = [
    ("gru", {}, "inputs.bias", 3, 1, 7),
    ("lstm", {}, "inputs.bias", 4, 1, 7),
    ("mogrifier", {}, "inputs.bias", 4, 1, 7),
    ("slstm", {"heads": 1}, "inputs.bias", 4, 1, 7),
    ("mingru", {}, "inputs.bias", 2, 0, -7),
    ("minlstm", {}, "inputs.bias", 3, 1, -7),
    ("minlstm", {"normalize": False}, "inputs.bias", 3, 0, 7),
    ("lem", {}, "inputs.bias", 2, 0, -7),
    ("lem", {"recurrence": "diagonal"}, "inputs.bias", 2, 0, -7),
    ("cfc", {"recurrence": "leaky"}, "inputs.bias", 4, 3, -7),
    ("cfc", {"mixed_memory": True}, "lstm_x.bias", 4, 2, 6),
    ("indrnn", {"bound": 1.0}, "u", 1, 0, 0.999),
    ("rglru", {}, "inputs.bias", 3, 0, -3),
    ("mamba", {"states": 2}, "step_size.bias", 1, 0, -7),
    ("gla", {}, "decays.bias", 1, 0, 4),
    ("mlstm", {}, "gates.bias", 2, 0, 7),
    ("deltanet", {}, "decay.bias", 1, 0, -9),
]

# relative to the norm of the whole tensor.  float64, float32: only the order of sums differs, over
# up to 250 steps.  bfloat16: 8 bits of mantissa in the inputs of every product.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def close(x, y, dtype=torch.float64):
    assert x.shape == y.shape and x.dtype == y.dtype
    assert (x.double() - y.double()).norm() <= TOLERANCE[dtype] * y.double().norm() + 1e-30


def same(x, y, solves):
    """Equal to the bit; where Newton's method solved for them, in float32, to its tolerance: 8
    units in the last place, which as many steps as a unit remembers add up to some more."""
    assert torch.equal(x, y) if not solves.calls else ((x - y).abs() <= 2e-6).all()


def make(case, dtype=torch.float64, **smaller):
    name, options = case
    return cells.find(name)(D, **{**SMALLER.get(name, {}), **smaller, **options}).to(dtype)


def random_state(cell, batch=B):
    """Not zero, and within what a state can be: cells of positive candidates stay positive."""
    return tuple(torch.rand_like(s) for s in cell.initial_state(batch))


def steps(cell, x, state):
    outputs = []
    for at_t in x.unbind(1):
        y, state = cell.step(at_t, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


@cache
def stepped(number, dtype):
    """A cell, what goes into it, and what comes out of its steps, with the state after each.

    They are many, slow, and the same for every backend and, as far as it goes, length.
    """
    torch.manual_seed(0)
    cell = make(CASES[number], dtype)
    x, state = torch.randn(B, max(LENGTHS), D, dtype=dtype), random_state(cell)
    outputs, states = [], [state]
    with torch.no_grad():
        for at_t in x.unbind(1):
            y, state = cell.step(at_t, states[-1])
            outputs.append(y)
            states.append(state)
    return cell, x, torch.stack(outputs, 1), states


@every_cell_on_every_backend(*TOLERANCE)
def test_1_a_sequence_equals_its_steps(case, backend, dtype):
    cell, x, outputs, states = stepped(CASES.index(case), dtype)
    for T in LENGTHS:
        with using_backend(backend), torch.no_grad():
            whole, end = cell(x[:, :T], states[0])
        close(whole, outputs[:, :T], dtype)
        for s, s2 in zip(end, states[T], strict=True):
            close(s, s2, dtype)


@every_cell
def test_1_no_state_is_the_initial_state(case):
    cell, x = make(case), torch.randn(B, 9, D, dtype=torch.float64)
    assert torch.equal(cell(x)[0], cell(x, cell.initial_state(B))[0])


@every_cell_on_every_backend(torch.float64)
def test_2_a_sequence_may_be_split_anywhere_from_any_state(case, backend):
    cell, x = make(case), torch.randn(B, 64, D, dtype=torch.float64)
    state = random_state(cell)
    with using_backend(backend):
        whole, end = cell(x, state)
        for k in (1, 31, 63):
            left, middle = cell(x[:, :k], state)
            right, end2 = cell(x[:, k:], middle)
            close(torch.cat([left, right], 1), whole)
            for s, s2 in zip(end, end2, strict=True):
                close(s2, s)


@every_cell_on_every_backend(torch.float32)
def test_3_the_future_changes_nothing_before_it(case, backend):
    cell, x = make(case, torch.float32), torch.randn(B, 50, D)
    with using_backend(backend), ops.count_newton(ops.NewtonCounts()) as solves:
        before = cell(x)[0]
        for t in (0, 1, 31, 49):
            other = x.clone()
            other[:, t] += 1
            after = cell(other)[0]
            same(before[:, :t], after[:, :t], solves)
            assert not torch.equal(before[:, t], after[:, t])


@every_cell_on_every_backend(torch.float32)
def test_4_a_state_owns_its_bytes_whatever_the_length(case, backend):
    cell = make(case, torch.float32)
    with using_backend(backend):
        _, end = cell(torch.randn(B, 200, D))
    for s, first in zip(end, cell.initial_state(B), strict=True):
        assert s.shape == first.shape
        assert s.untyped_storage().nbytes() == s.numel() * s.element_size()


@every_cell_on_every_backend(torch.float64)
def test_5_the_gradients_of_both_forms_agree(case, backend):
    cell, x = make(case), torch.randn(B, 17, D, dtype=torch.float64, requires_grad=True)
    state = tuple(s.requires_grad_() for s in random_state(cell))
    wanted = (x, *state, *cell.parameters())
    gradients = []
    for form in (cell, partial(steps, cell)):
        with using_backend(backend):
            y, end = form(x, state)
        loss = (y * torch.arange(y.numel()).view_as(y).sin()).sum() + sum((s**2).sum() for s in end)
        gradients.append(grad(loss, wanted, allow_unused=True))
    for g, g2 in zip(*gradients, strict=True):
        assert (g is None) == (g2 is None)
        if g is not None:
            close(g, g2)


@every_cell
def test_5_the_gradients_are_those_of_finite_differences(case):
    cell = make(case, **TINY_STATE.get(case[0], {}))
    x = torch.randn(1, 3, D, dtype=torch.float64, requires_grad=True)
    state = tuple(s.requires_grad_() for s in random_state(cell, 1))

    def outputs(x, *state):
        y, end = cell(x, state)
        return y, *end

    assert gradcheck(outputs, (x, *state), fast_mode=True)  # along a random direction


@every_cell
def test_5_every_parameter_learns(case):
    cell = make(case)
    y, _ = cell(torch.randn(B, 9, D, dtype=torch.float64, requires_grad=True))
    (y**2).sum().backward()
    for name, parameter in cell.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@every_cell_on_every_backend(torch.float32)
def test_6_the_rows_of_a_batch_do_not_meet(case, backend):
    cell, x = make(case, torch.float32), torch.randn(B, 20, D)
    other = x.clone()
    other[1] += 1
    with using_backend(backend), ops.count_newton(ops.NewtonCounts()) as solves:
        before, after = cell(x)[0], cell(other)[0]
    same(before[[0, 2]], after[[0, 2]], solves)


@every_cell_on_every_backend(torch.float32, torch.bfloat16)
def test_7_large_inputs_stay_finite_forwards_and_backwards(case, backend, dtype):
    cell = make(case, dtype)
    x = (30 * torch.randn(B, 50, D).sign()).to(dtype).requires_grad_()
    with using_backend(backend):
        y, end = cell(x)
    y.float().sum().backward()
    for tensor in (y, *end, x.grad, *(p.grad for p in cell.parameters())):
        assert tensor.isfinite().all()


@every_cell
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_8_state_and_output_follow_the_cell(case, dtype):
    cell = make(case, dtype)
    y, end = cell(torch.randn(B, 5, D, dtype=dtype))
    exact = torch.promote_types(dtype, torch.float32)
    assert y.dtype == dtype
    assert all(s.dtype == exact for s in (*end, *cell.initial_state(B)))
    on_meta = cell.to("meta").initial_state(B)
    assert all(s.device.type == "meta" for s in on_meta)


@every_cell
def test_8_the_weights_and_buffers_of_a_cell_are_all_that_it_is(case):
    """So a run that is read computes, and is trained on, as the cell that was saved."""
    cell, x = make(case), torch.randn(B, 9, D, dtype=torch.float64)
    with torch.no_grad():
        for weight in cell.parameters():
            weight.add_(torch.randn_like(weight) / 10)
    cell.after_step()
    cell(x)
    other = make(case)
    other.load_state_dict(cell.state_dict())
    assert torch.equal(cell(x)[0], other(x)[0])


@every_cell
def test_8_autocast_returns_the_state_in_float32(case):
    cell = make(case, torch.float32)
    x = torch.randn(B, 33, D)
    with torch.autocast("cpu", torch.bfloat16):
        y, end = cell(x)
        stepped, end2 = steps(cell, x, cell.initial_state(B))
    assert all(s.dtype == torch.float32 for s in (*end, *end2))
    close(y.float(), stepped.float(), torch.bfloat16)


@pytest.mark.parametrize("name, options, weight, parts, part, value", LONG_MEMORY)
@torch.no_grad()
def test_8_autocast_keeps_the_state_in_float32(name, options, weight, parts, part, value):
    """In bfloat16 a gate above 0.998 is 1, and a state loses what is below 1/512 of it."""
    torch.manual_seed(0)
    cell = make((name, options), torch.float32)
    cell.get_parameter(weight).chunk(parts)[part].fill_(value)
    x = 1 + torch.randn(1, 700, D) / 10
    _, expected = cell(x)
    assert all(share.mean() > 0.99 for share in cell.kept(x[:, -1], expected).values())
    with torch.autocast("cpu", torch.bfloat16):
        ends = cell(x)[1], steps(cell, x, cell.initial_state(1))[1]
    for end in ends:
        for s, s2 in zip(end, expected, strict=True):
            close(s, s2, torch.bfloat16)


@every_cell
def test_8_gradients_may_be_taken_under_autocast_and_are_the_same(case):
    cell, x = make(case, torch.float32), torch.randn(B, 9, D, requires_grad=True)
    weights = [x, *cell.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = cell(x)[0].float().square().sum()
        inside = grad(loss, weights, retain_graph=True, allow_unused=True)
    outside = grad(loss, weights, allow_unused=True)
    for found, expected in zip(inside, outside, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            close(found, expected, torch.bfloat16)


@pytest.mark.parametrize("name", ["mingru", "minlstm", "lem", "cfc"])
def test_the_cell_remembers(name):
    """Without a convolution, a character 100 back changes the logits now.

    Untrained gates forget half at every step, and 2^-100 is lost even in float64: the model first
    learns to recall a character over 1 to 5 others, and is then asked over 100.
    """
    model = LanguageModel(4, width=32, layers=1, cell=name)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(200):
        tokens = torch.zeros(32, 2 + step // 40, dtype=torch.long)
        tokens[:, 0] = torch.randint(1, 4, (32,))
        loss = F.cross_entropy(model(tokens)[0][:, -1], tokens[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = torch.zeros(3, 101, dtype=torch.long)
    tokens[:, 0] = torch.tensor([1, 2, 3])
    now = model.double()(tokens)[0][:, -1]
    assert (now[0] - now[1]).abs().max() > 1e-6
