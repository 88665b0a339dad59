"""Recurrences whose units see only themselves: solved in parallel over time as in a loop."""

import json

import pytest
import torch
from conftest import start
from torch.autograd import grad

from seqlm import cells, ops
from seqlm.errors import UsageError
from seqlm.model import LanguageModel
from seqlm.runtime import using_backend

D = 8
FORMS = [
    ("lem", {"recurrence": "diagonal"}),
    ("lem", {"recurrence": "diagonal", "dt": 0.3}),
    ("cfc", {"recurrence": "diagonal"}),
    ("cfc", {"recurrence": "leaky"}),
    ("cfc", {"recurrence": "leaky", "mode": "no_gate", "timespan": 0.7}),
]
every_form = pytest.mark.parametrize("name, options", FORMS)


def results(cell, x, state, solver, backend="torch"):
    """Output, last state and all gradients, and what the solver did."""
    cell.solver = solver
    inputs = [x.clone().requires_grad_(), *(s.clone().requires_grad_() for s in state)]
    with using_backend(backend), ops.count_newton(ops.NewtonCounts()) as solves:
        y, end = cell(inputs[0], tuple(inputs[1:]))
    loss = (y * torch.arange(y.numel()).view_as(y).sin()).sum() + sum((s**2).sum() for s in end)
    return (y.detach(), *end, *grad(loss, [*inputs, *cell.parameters()])), solves


def recurrent_weights(cell):
    return [p for name, p in cell.named_parameters() if name.endswith("raw")]


def inputs_of(cell, batch, time, dtype):
    x = torch.randn(batch, time, D, dtype=torch.float64).to(dtype)
    return x, tuple(2 * torch.rand_like(s) - 1 for s in cell.initial_state(batch))


def agree(found, expected, tolerance):
    for x, y in zip(found, expected, strict=True):
        assert (x - y).norm() <= tolerance * y.norm()


@every_form
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("time", [1, 2, 31, 64, 1000])
def test_newton_equals_the_loop_from_any_state(name, options, dtype, tolerance, time):
    cell = cells.find(name)(D, **options).to(dtype)
    given = inputs_of(cell, 2, time, dtype)
    expected, _ = results(cell, *given, "sequential")
    found, solves = results(cell, *given, "newton")
    agree(found, expected, tolerance)
    assert solves.calls == 1 and solves.fell_back == 0


@every_form
def test_newton_equals_the_compiled_loop_over_16384_steps(name, options):
    cell = cells.find(name)(D, **options)
    given = inputs_of(cell, 1, 16384, torch.float32)
    expected, _ = results(cell, *given, "sequential", "cpu")
    found, solves = results(cell, *given, "newton")
    agree(found, expected, 1e-5)
    assert solves.calls == 1 and solves.fell_back == 0


def test_newton_equals_the_loop_over_16384_steps_in_float64():
    cell = cells.find("cfc")(D, recurrence="leaky").double()
    given = inputs_of(cell, 1, 16384, torch.float64)
    expected, _ = results(cell, *given, "sequential")
    found, solves = results(cell, *given, "newton")
    agree(found, expected, 1e-10)
    assert solves.calls == 1 and solves.fell_back == 0


@every_form
@pytest.mark.parametrize("shape", [(1, 90, 1), (2, 33, 70), (1, 5, 700)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_compiled_pass_equals_the_loop(name, options, shape, dtype, tolerance):
    batch, time, width = shape
    cell = cells.find(name)(width, **options)
    drive = cell.project(torch.randn(batch, time, width)).detach().to(dtype)
    outcomes = []
    for backend in ("cpu", "reference"):
        own = drive.clone().requires_grad_()
        state = tuple(
            torch.full_like(s, 0.5, requires_grad=True) for s in cell.initial_state(batch)
        )
        with using_backend(backend):
            h, end = cell.scan(own, state)
        loss = (h.float() * torch.arange(h.numel()).view_as(h).sin().square()).sum()
        loss = loss + sum((s**3).sum() for s in end)
        outcomes.append((h.detach(), *end, *grad(loss, [own, *state, *recurrent_weights(cell)])))
    agree(*outcomes, tolerance)


@every_form
def test_newton_equals_the_loop_after_training(name, options, corpus):
    given = {f"cell__{key}": value for key, value in options.items()}
    setup = start(corpus, "trained", cell__name=name, **given)
    list(setup.reports())
    cell = setup.trainer.model.blocks[0].cell
    x, state = torch.randn(2, 300, 16), tuple(torch.rand_like(s) for s in cell.initial_state(2))
    expected, _ = results(cell, x, state, "sequential")
    found, solves = results(cell, x, state, "newton")
    agree(found, expected, 1e-5)
    assert solves.fell_back == 0


@pytest.mark.parametrize("bound, iterations", [(0.1, 5), (0.5, 6), (1.0, 7)])
def test_bounded_weights_converge_in_a_few_iterations(bound, iterations):
    """In float64; the last iteration only finds that nothing is left to do."""
    cell = cells.find("lem")(64, recurrence="diagonal", bound=bound).double()
    for raw in recurrent_weights(cell):
        torch.nn.init.uniform_(raw, -3, 3)
    x = torch.randn(1, 1024, 64, dtype=torch.float64)
    _, solves = results(cell, x, cell.initial_state(1), "newton")
    assert solves.iterations <= iterations and solves.fell_back == 0


@every_form
def test_where_newton_does_not_converge_the_loop_takes_its_place(name, options):
    cell = cells.find(name)(D, **options, bound=8.0).double()
    for raw in recurrent_weights(cell):
        torch.nn.init.uniform_(raw, -3, 3)
    x, state = inputs_of(cell, 3, 60, torch.float64)
    expected, _ = results(cell, x, state, "sequential")
    found, solves = results(cell, x, state, "newton")
    assert 0 < solves.fell_back < solves.lanes == 3 * D
    agree(found, expected, 1e-10)


@pytest.mark.parametrize(
    "name, options", [("lem", {"bound": 2.0}), ("cfc", {"mode": "no_gate", "bound": 1.0})]
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_a_small_residual_alone_does_not_make_a_solution(name, options, dtype, tolerance):
    """From beside a state that does not last: a small correction grows over time."""
    cell = cells.find(name)(D, recurrence="diagonal", **options).to(dtype)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        for raw in recurrent_weights(cell):
            raw.fill_(5.0)
    x = torch.zeros(1, 400, D, dtype=dtype)
    state = tuple(torch.full_like(s, 1e-7) for s in cell.initial_state(1))
    expected, _ = results(cell, x, state, "sequential")
    found, _ = results(cell, x, state, "newton")
    assert expected[0].abs().max() > 0.1
    agree(found[:2], expected[:2], tolerance)


def test_the_gradient_goes_back_by_the_backend_that_went_forward(monkeypatch):
    def called(*_):
        raise AssertionError("the compiled loops ran")

    cell = cells.find("cfc")(D, recurrence="leaky", solver="newton")
    x = torch.randn(1, 40, D, requires_grad=True)
    with using_backend("torch"):
        y, _ = cell(x)
    monkeypatch.setattr("seqlm.ops.cpu.linear_scan.run_channels", called)
    y.sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_model_made_in_inference_mode_reads_and_writes():
    with torch.inference_mode():
        options = {"recurrence": "leaky", "mode": "pure"}
        model = LanguageModel(5, width=D, layers=1, cell="cfc", cell_options=options)
        logits, _ = model(torch.zeros(1, 50, dtype=torch.long))
    assert logits.isfinite().all()


def test_auto_is_newton_for_many_steps_of_few_units_and_else_a_loop():
    cell = cells.find("cfc")(D, recurrence="leaky")
    calls = {}
    for batch, time in ((1, 255), (32, 256), (33, 256)):
        with using_backend("torch"), ops.count_newton(ops.NewtonCounts()) as solves:
            cell(torch.randn(batch, time, D))
        calls[batch, time] = solves.calls
    assert calls == {(1, 255): 0, (32, 256): 1, (33, 256): 0}


def test_what_is_not_watched_is_not_counted():
    cell = cells.find("lem")(D, recurrence="diagonal", solver="newton")
    with ops.count_newton(ops.NewtonCounts()) as solves:
        cell(torch.randn(2, 9, D))
    before = solves.lanes
    cell(torch.randn(2, 9, D))
    assert solves.lanes == before == 2 * D


def test_not_a_number_goes_through_the_solver():
    cell = cells.find("cfc")(D, recurrence="leaky", solver="newton")
    drive = cell.project(torch.randn(2, 20, D)).detach()
    drive[0, 5, 3] = torch.nan
    h, _ = cell.scan(drive, cell.initial_state(2))
    assert h[0, 5:, 3].isnan().all() and h[0, :5].isfinite().all() and h[1].isfinite().all()


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("lem", {"recurrence": "diagonal", "bound": 0.0}, "cell.bound is 0.0; it must be above 0"),
        ("lem", {"solver": "newton"}, "a dense recurrence is always solved step by step"),
        ("lem", {"bound": 0.5}, "cell.bound is 0.5, but a dense recurrence has no bound"),
        ("cfc", {"bound": -1.0}, "cell.bound is -1.0"),
        ("cfc", {"recurrence": "leaky", "backbone_units": 0}, "cell.backbone_units is 0; it must"),
        ("cfc", {"recurrence": "leaky", "mixed_memory": True}, "mixed_memory needs a dense recurr"),
        ("cfc", {"recurrence": "diagonal", "backbone_layers": 2}, "backbone_layers needs a dense"),
        ("cfc", {"recurrence": "leaky", "backbone_activation": "relu"}, "activation needs a dense"),
    ],
)
def test_options_that_do_not_go_together_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        LanguageModel(5, width=D, layers=1, cell=name, cell_options=options)


def test_check_finds_a_run_sound_that_newton_solves(seqlm_command, corpus):
    shape = "--preset tiny --width 8 --layers 1 --batch 2 --length 20 --steps 2 --cell lem"
    options = ["--set", "cell.recurrence=diagonal", "--set", "cell.solver=newton"]
    seqlm_command("train", "--data", corpus, *shape.split(), *options, "--run", "solved")
    result = seqlm_command("check", "--run", "solved", "--json")
    assert result.code == 0 and result.json["passed"], result.err


def test_training_says_how_often_newton_did_not_converge(seqlm_command, corpus):
    shape = "--preset tiny --width 16 --layers 1 --batch 4 --length 40 --steps 3 --cell lem"
    options = ["--set", "cell.recurrence=diagonal", "--set", "cell.solver=newton"]
    command = ["train", "--data", corpus, *shape.split(), *options]
    result = seqlm_command(*command, "--run", "calm", "--json")
    assert result.json["newton_fell_back"] == 0 and "Newton" not in result.err
    result = seqlm_command(*command, "--set", "cell.bound=60", "--run", "wild", "--json")
    assert 0 < result.json["newton_fell_back"] < 1
    share = f"{result.json['newton_fell_back']:.2%}"
    assert f"Newton's method did not converge for {share} of the units" in result.err
    assert "To turn the method off: --set cell.lem.solver=sequential" in result.err
    more = ["--set", "cell.lem.solver=sequential", "--steps", "5", "--json"]
    resumed = seqlm_command("train", "--resume", "--run", "wild", *more)
    assert resumed.json["newton_fell_back"] is None and resumed.json["steps"] == 5
    dense = seqlm_command(*command[:-4], "--run", "dense", "--json").json
    assert json.dumps(dense["newton_fell_back"]) == "null"
