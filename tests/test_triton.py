"""The kernels of triton equal the plain loop: under Triton's interpreter, or on a GPU if asked."""

import os
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GPU, close
from torch.autograd import grad

from seqlm import cells, ops, runtime
from seqlm.cells import cfc
from seqlm.errors import UsageError
from seqlm.runtime import pick_backend, using_backend

triton = pytest.importorskip("triton", reason="triton is not installed (it is for Linux)")
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
if VERSION < (3, 7) and not GPU and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("Triton's interpreter knows numpy 2.4 from 3.7 on", allow_module_level=True)
if GPU and not torch.cuda.is_available():
    pytest.skip("torch finds no GPU here", allow_module_level=True)

# without triton the file ends above
from triton.runtime.interpreter import interpreter_builder  # noqa: E402

from seqlm.ops import dispatch, trial  # noqa: E402
from seqlm.ops.dispatch import Op  # noqa: E402
from seqlm.ops.triton import causal_conv as in_conv  # noqa: E402
from seqlm.ops.triton import lanes, launch, scans, tiles  # noqa: E402
from seqlm.ops.triton import rms_norm as in_norm  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("uninitialised_memory_is_nan"),
    # by the interpreter of triton 3.6
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]

DEVICE = "cuda" if GPU else "cpu"
# relative to the norm, against float64: the order of sums and exp; the rounding of what is stored
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LENGTHS = [1, 2, 15, 16, 17, 33]  # 16 steps are loaded together


@pytest.fixture(scope="module", autouse=True)
def tried(quick_interpreter):
    """Trials count as passed, so that tests see the launches of their own kernels only; one test
    runs them all."""
    with pytest.MonkeyPatch.context() as patch:
        passed = {(op, DEVICE, dtype): None for op in trial.CASES for dtype in TOLERANCE}
        patch.setattr(trial, "_faults", passed)
        yield


def compare(function, inputs, cell=None, times=1) -> None:
    """Outputs and gradients of kernels, and of the loop in float64, to `times` the tolerance; of a
    cell's recurrent weights, too, where the function is of a cell."""
    results = []
    for backend, device, dtype in (("triton", DEVICE, None), ("reference", "cpu", torch.float64)):
        own = [x.to(device, dtype).clone(memory_format=torch.contiguous_format) for x in inputs]
        own = [x.requires_grad_() for x in own]
        given, weights = own, []
        if cell is not None:
            copied = deepcopy(cell).to(device, dtype)
            given = [copied, *own]
            read = "from_h", "from_y", "from_z", "heads"
            weights = [p for name, p in copied.named_parameters() if name.startswith(read)]
        with using_backend(backend):
            assert runs_on(own[0]) == backend
            outputs = function(*given)
        loss = 0
        for y in outputs:
            factors = torch.arange(1, y.numel() + 1, dtype=torch.float64).sin().view_as(y)
            loss = loss + (y.double() * factors.to(device)).sum()
        results.append([x.detach().cpu() for x in (*outputs, *grad(loss, [*own, *weights]))])
    for ours, truth in zip(*results, strict=True):
        close(ours, truth.to(ours.dtype), times * TOLERANCE[inputs[0].dtype])


def runs_on(*tensors) -> str:
    return Op("linear_scan").code(tensors, {}).backend


def over_time(cell, drive, *state):
    h, state = cell.scan(drive, state)
    return h, *state


def in_chunks(count, monkeypatch) -> None:
    monkeypatch.setattr(scans, "chunk_count", lambda *_: count)


def last_first(monkeypatch) -> None:
    """The interpreter runs the programs of a grid from the last to the first."""
    put = interpreter_builder.set_grid_idx

    def from_the_last(*at):
        put(*(n - 1 - i for i, n in zip(at, interpreter_builder.grid_dim, strict=True)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", from_the_last)


def gated(batch, time, width, parts=2, dtype=torch.float32):
    return [(3 * torch.randn(batch, time, parts * width)).to(dtype), torch.randn(batch, width)]


@pytest.mark.parametrize("T", LENGTHS)
def test_gated_scan_equals_the_loop(T):
    compare(ops.gated_scan, gated(1 + (T < 10), T, 5))


@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize("candidate", ["positive", "linear"])
def test_gated_scan_of_two_gates_equals_the_loop(T, candidate):
    compare(lambda *x: ops.gated_scan(*x, candidate), gated(2, T, 5, 3))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("parts, candidate", [(2, "linear"), (3, "positive")])
def test_gated_scan_takes_every_dtype_and_more_channels_than_a_program(dtype, parts, candidate):
    compare(lambda *x: ops.gated_scan(*x, candidate), gated(1, 3, 70, parts, dtype))


@pytest.mark.parametrize("count, T, parts", [(2, 19, 3), (3, 50, 2), (5, 6, 2), (4, 4, 3)])
def test_gated_scan_equals_the_loop_in_any_number_of_chunks(monkeypatch, count, T, parts):
    in_chunks(count, monkeypatch)
    compare(ops.gated_scan, gated(1, T, 3, parts))


@pytest.mark.parametrize("parts, dtype", [(2, torch.float32), (3, torch.bfloat16)])
def test_a_step_without_a_gradient_is_one_launch_and_equals_the_loop(monkeypatch, parts, dtype):
    drive, h = (x.to(DEVICE) for x in gated(3, 1, 5, parts, dtype))
    launched = []

    def spy(kernel, *arguments, **constants):
        launched.append(kernel)
        launch.launch(kernel, *arguments, **constants)

    monkeypatch.setattr(lanes, "launch", spy)
    with using_backend("triton"), torch.no_grad():
        stepped = ops.gated_step(drive[:, 0], h)
    with using_backend("reference"):
        close(stepped, ops.gated_step(drive[:, 0], h), 1e-6)
    assert len(launched) == 1


@pytest.mark.parametrize("logit", [-200.0, 200.0])
@pytest.mark.parametrize("count", [1, 4])
def test_gated_scan_is_right_for_gates_that_round_to_0_and_1(monkeypatch, logit, count):
    in_chunks(count, monkeypatch)
    drive, h0 = gated(2, 9, 3)
    drive[..., :3] = logit
    compare(ops.gated_scan, [drive, h0])


@pytest.mark.parametrize("k_f, k_i", [(-120.0, -100.0), (-100.0, -104.0), (-1.0, -95.0), (90, -90)])
def test_two_gates_however_small_are_told_apart(k_f, k_i):
    drive, h0 = gated(1, 3, 2, 3)
    drive[..., :2], drive[..., 2:4] = k_f, k_i
    compare(ops.gated_scan, [drive, h0])


def linear(batch, time, width):
    gates = torch.rand(batch, time, width) * 2 - 1
    return [gates, torch.randn(batch, time, width), torch.randn(batch, width)]


@pytest.mark.parametrize("T", [1, 16, 33])
def test_linear_scan_equals_the_loop(T):
    a, b = torch.rand(1, T, 5) * 2.2 - 1.1, torch.randn(1, T, 5)
    compare(ops.linear_scan, [a, b, torch.randn(1, 5)])


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_linear_scan_takes_every_dtype_in_chunks(monkeypatch, dtype, count):
    in_chunks(count, monkeypatch)
    a, b, h0 = linear(1, 20, 3)
    compare(ops.linear_scan, [a.to(dtype), b.to(dtype), h0])


@pytest.mark.parametrize("gate", [0.0, 1.0])
@pytest.mark.parametrize("count", [1, 4])
def test_linear_scan_is_right_for_gates_that_are_exactly_0_and_1(monkeypatch, gate, count):
    in_chunks(count, monkeypatch)
    a = torch.full((2, 9, 3), gate)
    compare(ops.linear_scan, [a, torch.randn(2, 9, 3), torch.randn(2, 3)])


def test_scans_take_input_that_is_not_contiguous():
    drive, _ = gated(2, 9, 14)
    compare(lambda x, h: ops.gated_scan(x[:, :, ::2], h.mT), [drive, torch.randn(7, 2)])
    a, b, h0 = torch.rand(2, 5, 9), torch.randn(2, 5, 9), torch.randn(5, 2)
    compare(lambda a, b, h: ops.linear_scan(a.mT, b.mT, h.mT), [a, b, h0])


DIAGONAL = [
    ("lem", {"dt": 0.3}),
    ("cfc", {"recurrence": "diagonal", "timespan": 1.5}),
    ("cfc", {"recurrence": "leaky", "mode": "no_gate"}),
    ("cfc", {"recurrence": "leaky"}),
]


def diagonal(name, options, batch, time, width, dtype=torch.float32):
    """A cell, and a drive and states for it."""
    cell = cells.find(name)(width, **{"recurrence": "diagonal", **options})
    drive = 3 * torch.randn(batch, time, cell.inputs.out_features)
    states = [2 * torch.rand_like(s) - 1 for s in cell.initial_state(batch)]
    return cell, [drive.to(dtype), *states]


@pytest.mark.parametrize("name, options", DIAGONAL)
@pytest.mark.parametrize("shape", [(2, 1, 3), (1, 7, 40)])
def test_diagonal_recurrences_equal_the_loop(name, options, shape):
    cell, inputs = diagonal(name, options, *shape)
    compare(over_time, inputs, cell)


@pytest.mark.parametrize("case, T", [(0, 2), (0, 8), (0, 17), (3, 9)])
def test_diagonal_recurrences_of_any_length_equal_the_loop(case, T):
    cell, inputs = diagonal(*DIAGONAL[case], 1, T, 2)
    compare(over_time, inputs, cell)


@pytest.mark.parametrize("name, options", [DIAGONAL[0], DIAGONAL[3]])
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_diagonal_recurrences_take_every_dtype(name, options, dtype):
    cell, inputs = diagonal(name, options, 2, 9, 3, dtype)
    compare(over_time, inputs, cell)


@pytest.mark.parametrize("name, options", [DIAGONAL[0], DIAGONAL[3]])
@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_diagonal_recurrences_are_right_where_everything_saturates(name, options, shift):
    cell, inputs = diagonal(name, options, 2, 5, 3)
    inputs[0][:, 1:3] += shift
    compare(over_time, inputs, cell)


def dense_lem(batch, time, width, dtype=torch.float32):
    """A LEM, and a drive and states for it."""
    cell = cells.find("lem")(width, dt=0.7)
    drive = torch.randn(batch, time, cell.inputs.out_features)
    return cell, [drive.to(dtype), *(2 * torch.rand_like(s) - 1 for s in cell.initial_state(batch))]


@pytest.mark.parametrize("shape", [(17, 3, 10), (2, 1, 3), (1, 2, 33), (1, 7, 16), (2, 1, 144)])
def test_dense_lem_equals_the_loop(shape):
    cell, inputs = dense_lem(*shape)
    compare(over_time, inputs, cell)


def test_dense_lem_takes_bfloat16():
    cell, inputs = dense_lem(2, 5, 8, torch.bfloat16)
    compare(over_time, inputs, cell)


def test_dense_lem_takes_what_is_not_contiguous():
    cell, inputs = dense_lem(2, 5, 8)
    compare(transposed, [x.mT for x in inputs], cell)


def dense_cfc(batch, time, width, units, dtype=torch.float32, **options):
    """A CfC with a backbone, and a drive and a state for it."""
    cell = cells.find("cfc")(width, backbone_units=units, timespan=1.5, **options)
    torch.nn.init.uniform_(cell.heads.bias, -1, 1)
    return cell, [torch.randn(batch, time, units).to(dtype), 2 * torch.rand(batch, width) - 1]


@pytest.mark.parametrize("act", cfc.ACTIVATIONS)
@pytest.mark.parametrize("mode", ["default", "no_gate"])
def test_dense_cfc_equals_the_loop(act, mode):
    cell, inputs = dense_cfc(3, 3, 5, 7, backbone_activation=act, mode=mode)
    compare(over_time, inputs, cell)


@pytest.mark.parametrize("shape", [(17, 2, 33, 130), (1, 1, 140, 1), (2, 7, 1, 16)])
def test_dense_cfc_of_any_shape_equals_the_loop(shape):
    cell, inputs = dense_cfc(*shape)
    compare(over_time, inputs, cell)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_dense_cfc_takes_every_dtype(dtype):
    cell, inputs = dense_cfc(2, 5, 4, 8, dtype)
    # weights, p and all of h are rounded for the products: at most twice it in 12 seeds
    compare(over_time, inputs, cell, times=3)


def test_dense_cfc_takes_what_is_not_contiguous():
    cell, inputs = dense_cfc(2, 5, 4, 8)
    compare(transposed, [x.mT for x in inputs], cell)


@pytest.mark.parametrize("made, shape", [(dense_lem, (33, 2, 65)), (dense_cfc, (33, 2, 65, 40))])
def test_steps_take_larger_tiles_of_a_large_batch(monkeypatch, made, shape):
    monkeypatch.setattr(tiles, "ENOUGH_PROGRAMS", 1)
    cell, inputs = made(*shape)
    compare(over_time, inputs, cell)


@pytest.mark.skipif(GPU, reason="it has an order of its own")
@pytest.mark.parametrize("made, shape", [(dense_lem, (17, 2, 33)), (dense_cfc, (17, 2, 33, 40))])
def test_steps_do_not_care_which_program_runs_first(monkeypatch, made, shape):
    last_first(monkeypatch)
    cell, inputs = made(*shape)
    compare(over_time, inputs, cell)


@pytest.mark.parametrize("made, shape", [(dense_lem, (1, 3, 65)), (dense_cfc, (1, 3, 4, 5))])
def test_a_step_is_two_launches_each_way(monkeypatch, made, shape):
    """And one more for the gradient of the first state."""
    launched = []
    monkeypatch.setattr(tiles, "launch", lambda kernel, *_, **__: launched.append(kernel))
    cell, inputs = made(*shape)
    with using_backend("triton"):
        h, *_ = over_time(cell.to(DEVICE), *(x.to(DEVICE) for x in inputs))
        assert len(launched) == 6
        h.sum().backward()
    assert len(launched) == 13


def transposed(cell, *inputs):
    """Inputs, outputs and with them their gradients are not contiguous."""
    return [y.mT for y in over_time(cell, *(x.mT for x in inputs))]


@pytest.mark.parametrize("name, options", [DIAGONAL[0], DIAGONAL[3]])
def test_diagonal_recurrences_take_what_is_not_contiguous(name, options):
    cell, inputs = diagonal(name, options, 2, 5, 3)
    compare(transposed, [x.mT for x in inputs], cell)


# gates or inputs, and how far off what is float32 may be: da is of h, which is as narrow as b
@pytest.mark.parametrize("narrow, tolerance", [(0, 1e-6), (1, 1e-2)])
def test_a_scan_takes_gates_and_inputs_of_two_dtypes(monkeypatch, narrow, tolerance):
    in_chunks(2, monkeypatch)
    given = linear(1, 5, 3)
    given[narrow] = given[narrow].bfloat16()
    results = []
    for own in (given, [x.float() for x in given]):
        own = [x.to(DEVICE).requires_grad_() for x in own]
        with using_backend("triton"):
            h, last = ops.linear_scan(*own)
        results.append((h, last, *grad(h.float().sum() + last.sum(), own)))
    dtypes = [x.dtype for x in results[0]]
    assert dtypes == [given[1].dtype, torch.float32, *(x.dtype for x in given)]
    for ours, whole in zip(*results, strict=True):
        rounded = tolerance if ours.dtype == torch.float32 else 1e-2
        close(ours, whole.to(ours.dtype), rounded)


def test_a_scan_copies_nothing_into_a_wider_dtype_but_states(monkeypatch):
    seen = []

    def spy(kernel, grid, *arguments, **constants):
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        seen.extend(x for x in tensors if x.shape[1] == 5)
        launch.launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(lanes, "launch", spy)
    a, b, h0 = linear(1, 5, 3)
    own = [x.to(DEVICE).requires_grad_() for x in (a.bfloat16(), b.bfloat16(), h0.bfloat16())]
    with using_backend("triton"):
        h, last = ops.linear_scan(*own)
        gradients = grad(h.sum() + last.sum(), own)
    assert {x.dtype for x in seen} == {torch.bfloat16} and last.dtype == torch.float32
    assert {x.data_ptr() for x in own[:2]} <= {x.data_ptr() for x in seen}
    assert {x.dtype for x in gradients} == {torch.bfloat16}


def conv(batch, time, width, kernel, dtype=torch.float32):
    x = torch.randn(batch, kernel - 1 + time, width).to(dtype)
    return [x, torch.randn(width, 1, kernel), torch.randn(width)]


def convolved(*inputs):
    return [ops.causal_conv(*inputs)]


SHAPES = [(3, 1, 5, 4), (1, 7, 70, 4), (2, 9, 3, 1), (1, 8, 130, 2), (2, 13, 6, 5), (1, 2, 3, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_convolution_equals_torchs_in_float64(shape):
    compare(convolved, conv(*shape))


@pytest.mark.parametrize("length, kernel", [(1, 4), (2, 4), (3, 1), (7, 2), (9, 5), (10, 3)])
def test_the_convolution_is_the_same_in_chunks_of_any_length(monkeypatch, length, kernel):
    monkeypatch.setattr(in_conv, "chunk_length", lambda *_: length)
    compare(convolved, conv(2, 13, 3, kernel))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_convolution_takes_every_dtype_and_gives_it_back(dtype):
    inputs = conv(2, 9, 5, 4, dtype)
    compare(convolved, inputs)
    own = [x.to(DEVICE).requires_grad_() for x in inputs]
    with using_backend("triton"), torch.autocast(DEVICE, torch.bfloat16):
        y = ops.causal_conv(*own)
    assert y.dtype == dtype and [x.dtype for x in grad(y.sum(), own)] == [x.dtype for x in own]


def test_the_convolution_takes_what_is_not_contiguous():
    x, weight, bias = conv(2, 9, 14, 3)
    inputs = [x.mT, weight.transpose(0, 2), bias.repeat(2)]
    compare(lambda x, w, b: [ops.causal_conv(x.mT, w.transpose(0, 2), b[::2]).mT], inputs)


def test_a_kernel_too_long_for_registers_is_torchs(monkeypatch):
    inputs = [x.to(DEVICE) for x in conv(2, 5, 3, in_conv.LONGEST_KERNEL + 1)]
    monkeypatch.setattr(lanes, "launch", None)
    with using_backend("torch"):
        expected = ops.causal_conv(*inputs)
    with using_backend("triton"):
        close(ops.causal_conv(*inputs), expected, 1e-6)


@pytest.mark.parametrize("x", [(2, 5, 4), (2, 3, 3)])
def test_a_convolution_of_what_does_not_fit_is_refused(x):
    _, weight, bias = (x.to(DEVICE) for x in conv(2, 2, 3, 4))
    with using_backend("triton"):
        with pytest.raises(RuntimeError):
            ops.causal_conv(torch.ones(x, device=DEVICE), weight, bias)
        with pytest.raises(RuntimeError):
            ops.causal_conv(torch.ones(2, 5, 3, device=DEVICE), weight, bias[:2])


def test_a_convolution_has_programs_enough_and_no_more_chunks_than_a_grid():
    def chunks(batch, time, width):
        x = torch.empty(1, 1, 1).expand(batch, time, width)
        return triton.cdiv(time, in_conv.chunk_length(x))

    assert [chunks(64, 256, 384), chunks(1, 256, 384), chunks(4000, 256, 64)] == [6, 16, 1]
    assert chunks(1, 1, 1) == 1 and chunks(0, 100, 1) == 7 and chunks(1, 10**9, 1) < 1 << 16


def norm(*shape, dtype=torch.float32):
    return [3 * torch.randn(shape).to(dtype), torch.randn(shape[-1])]


def normed(*inputs):
    return [ops.rms_norm(*inputs)]


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 70), (1, 2), (200, 16), (1, 1, 2100), (9,)])
def test_the_norm_equals_torchs_in_float64(shape):
    compare(normed, norm(*shape))


@pytest.mark.parametrize("warps", [4, 8, 12])
def test_the_norm_is_the_same_by_any_number_of_programs(monkeypatch, warps):
    monkeypatch.setattr(in_norm, "BACKWARD_WARPS", warps)
    compare(normed, norm(27, 300))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_norm_takes_every_dtype_and_gives_autocasts(dtype):
    inputs = norm(2, 5, 70, dtype=dtype)
    compare(normed, inputs)
    own = [x.to(DEVICE).requires_grad_() for x in inputs]
    with using_backend("triton"):
        plain = ops.rms_norm(*own)
        with torch.autocast(DEVICE, torch.bfloat16):
            y = ops.rms_norm(*own)
    assert plain.dtype == dtype
    close(y, plain.bfloat16(), 1e-2)
    ours, whole = (grad((z.double() ** 2).sum(), own) for z in (y, plain))
    for found, expected in zip(ours, whole, strict=True):
        close(found, expected, 1e-2)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_norm_of_small_numbers_is_torchs(dtype):
    x, weight = torch.full((2, 8), 1e-4, dtype=dtype), torch.ones(8, dtype=dtype)
    with using_backend("torch"):
        expected = ops.rms_norm(x, weight)
    with using_backend("triton"):
        close(ops.rms_norm(x.to(DEVICE), weight.to(DEVICE)).cpu(), expected, TOLERANCE[dtype])


def test_the_norm_takes_what_is_not_contiguous():
    x, weight = norm(9, 3, 14)
    inputs = [x.mT, weight.repeat(2)]
    compare(lambda x, w: [ops.rms_norm(x.mT, w[::2]).mT], inputs)


def test_a_row_too_wide_for_a_program_is_torchs(monkeypatch):
    monkeypatch.setattr(in_norm, "WIDEST_ROW", 69)
    monkeypatch.setattr(in_norm, "launch", None)
    compare(normed, norm(3, 70))


@pytest.mark.parametrize("function, inputs", [(convolved, conv(0, 3, 2, 2)), (normed, norm(0, 5))])
def test_a_convolution_and_a_norm_of_none_are_none(function, inputs):
    own = [x.to(DEVICE).requires_grad_() for x in inputs]
    with using_backend("triton"):
        (y,) = function(*own)
    assert not y.numel() and not any(x.any() for x in grad(y.sum(), own))


def test_one_character_is_one_launch_of_either(monkeypatch):
    launched = []
    for module in (lanes, in_norm):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel))
    with using_backend("triton"), torch.no_grad():
        ops.causal_conv(*(x.to(DEVICE) for x in conv(2, 1, 6, 4)))
        ops.rms_norm(*(x.to(DEVICE) for x in norm(2, 6)))
    assert launched == [in_conv.conv_forward, in_norm.norm_forward]


CELLS = [
    ("mingru", {"expansion": 1.5}),
    ("minlstm", {"candidate": "linear"}),
    ("minlstm", {"normalize": False}),
    ("lem", {}),
    ("lem", {"recurrence": "diagonal"}),
    ("lem", {"recurrence": "diagonal", "solver": "newton"}),
    ("cfc", {"recurrence": "leaky"}),
    ("cfc", {"backbone_units": 9}),
    ("mamba", {"expansion": 1.0, "states": 3, "kernel": 2}),
]


@pytest.mark.parametrize("name, options", CELLS)
def test_cells_obey_the_laws_on_kernels(name, options):
    """A sequence is its steps, may be split, does not see its future or other rows, and is finite
    where inputs are large."""
    cell = cells.find(name)(6, **options).to(DEVICE)
    x = torch.randn(2, 7, 6, device=DEVICE)
    state = tuple(torch.rand_like(s) for s in cell.initial_state(2))
    later = x.clone()
    later[0, 5:], later[1] = 0, 1
    with using_backend("triton"), torch.no_grad():
        whole, end = cell(x, state)
        left, middle = cell(x[:, :3], state)
        right, end_2 = cell(x[:, 3:], middle)
        other, _ = cell(later, state)
        large, _ = cell(30 * x.sign(), state)
        stepped = []
        for at_t in x.unbind(1):
            y, state = cell.step(at_t, state)
            stepped.append(y)
    for y, ends in ((torch.cat([left, right], 1), end_2), (torch.stack(stepped, 1), state)):
        for found, expected in zip((y, *ends), (whole, *end), strict=True):
            close(found, expected, 1e-5)
    same = 2e-6 if options.get("solver") == "newton" else 0.0
    assert (other[0, :5] - whole[0, :5]).abs().max() <= same and large.isfinite().all()


@pytest.mark.parametrize("where", ["drive", "h0"])
@pytest.mark.parametrize("parts", [2, 3])
def test_kernels_let_nan_through(where, parts):
    drive, h0 = torch.zeros(1, 5, 4 * parts, device=DEVICE), torch.zeros(1, 4, device=DEVICE)
    (drive[0, 2] if where == "drive" else h0[0])[1] = float("nan")
    with using_backend("triton"):
        h, last = ops.gated_scan(drive, h0)
    assert h[0, 2:, 1].isnan().all() and last[0, 1].isnan() and h[0, :, 0].isfinite().all()


@pytest.mark.skipif(GPU, reason="they run in any order there")
def test_programs_of_a_convolution_and_a_norm_may_run_in_any_order(monkeypatch):
    last_first(monkeypatch)
    monkeypatch.setattr(in_conv, "chunk_length", lambda *_: 5)
    monkeypatch.setattr(in_norm, "BACKWARD_WARPS", 8)
    compare(convolved, conv(1, 14, 3, 4))
    compare(normed, norm(27, 300))


@pytest.mark.skipif(GPU, reason="they run in any order there")
@pytest.mark.parametrize("scan, inputs", [(ops.gated_scan, gated), (ops.linear_scan, linear)])
def test_chunks_may_run_in_any_order(monkeypatch, scan, inputs):
    last_first(monkeypatch)
    in_chunks(3, monkeypatch)
    compare(scan, inputs(1, 5, 2))


@pytest.mark.parametrize("scan, inputs", [(ops.gated_scan, gated), (ops.linear_scan, linear)])
def test_the_last_state_is_exact_and_owns_its_memory(scan, inputs):
    *given, h0 = (x.to(DEVICE) for x in inputs(2, 9, 3))
    with using_backend("triton"):
        h, last = scan(*(x.bfloat16() for x in given), h0)
    assert (h.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert last.untyped_storage().nbytes() == last.numel() * 4
    close(last, h[:, -1].float(), 1e-2)
    assert not torch.equal(last, h[:, -1].float())


@pytest.mark.parametrize("scan, inputs", [(ops.gated_scan, gated), (ops.linear_scan, linear)])
def test_a_batch_of_none_is_none(scan, inputs):
    given = [x.to(DEVICE) for x in inputs(0, 3, 2)]
    with using_backend("triton"):
        h, last = scan(*given)
    assert last.shape == given[-1].shape and h.shape == (0, 3, *last.shape[1:])


def test_time_is_cut_where_lanes_alone_do_not_fill_the_device(monkeypatch):
    class Device:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Device)
    cuda = torch.device("cuda")
    counts = [scans.chunk_count(*case, cuda) for case in ((64 * 768, 256), (512, 255), (512, 256))]
    assert counts == [1, 1, 4]
    assert scans.chunk_count(512, 65536, cuda) == 132 and scans.chunk_count(1, 65536, cuda) == 256
    assert scans.chunk_count(0, 4096, cuda) == 64
    assert scans.chunk_count(1, 4096, torch.device("cpu")) == 1


def test_auto_takes_the_kernels_on_a_gpu_and_says_why_not(monkeypatch):
    monkeypatch.setattr(runtime, "_triton_fault", lambda device: None)
    assert pick_backend("auto", "cuda") == ("triton", "fused kernels")
    assert pick_backend("auto", "cpu").value == "cpu"
    assert pick_backend("triton", "cpu") == ("triton", "as asked")
    monkeypatch.setattr(runtime, "_triton_fault", lambda device: "triton is not installed")
    assert pick_backend("auto", "cuda") == ("torch", "triton is not installed")
    with pytest.raises(UsageError) as error:
        pick_backend("triton", "cuda")
    message = "runtime.backend is triton, but triton is not installed. Choose torch or auto."
    assert str(error.value) == message


@pytest.fixture
def untried(monkeypatch):
    """As in a process in which no kernel has run."""
    monkeypatch.setattr(trial, "_faults", {})
    dispatch._code.cache_clear()
    yield
    dispatch._code.cache_clear()


def test_where_triton_cannot_run_the_reason_is_its_first_line(monkeypatch, untried):
    def broken(*_):
        raise RuntimeError("Failed to find C compiler.\nand many lines more")

    reason = runtime._triton_fault.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert reason("cuda") == "its compute capability is 7.5, below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr("seqlm.ops.triton.linear_scan.scan", broken)
    with pytest.warns(RuntimeWarning, match="linear_scan are left out"):
        assert runtime.TRIALS["triton"](DEVICE) == "triton fails here: Failed to find C compiler."


def test_the_kernels_take_what_they_can_and_torch_the_rest():
    x = torch.zeros(1, device=DEVICE)
    with using_backend("triton"):
        assert runs_on(x) == runs_on(x.bfloat16()) == "triton"
        assert runs_on(x.double()) == runs_on(x, x.double()) == runs_on(x.half()) == "torch"


def test_every_op_that_has_kernels_has_a_trial_and_passes_it(untried):
    folder = Path(launch.__file__).parent
    with_kernels = {path.stem for path in folder.glob("*.py") if "def forward(" in path.read_text()}
    assert with_kernels == set(trial.CASES)
    found = ops.try_kernels(DEVICE)
    assert len(found) == 2 * len(with_kernels) and set(found.values()) == {"passed"}
    assert f"lem_scan on {DEVICE} in bfloat16" in found


@pytest.mark.parametrize("way, kind", [("forward", "value"), ("backward", "gradient")])
def test_a_wrong_kernel_is_named_and_left_to_torch(monkeypatch, untried, way, kind):
    from seqlm.ops.triton import gated_scan as kernels

    right = getattr(kernels, way)

    def wrong(*given, **form):
        first, *rest = right(*given, **form)
        if way == "forward":
            return ((first[0] * 1.01, first[1]), *rest)
        return (first * 1.01, *rest)

    monkeypatch.setattr(kernels, way, wrong)
    drive, h0 = (x.to(DEVICE).requires_grad_() for x in gated(2, 5, 3))
    with using_backend("triton"):
        with pytest.warns(RuntimeWarning) as warned:
            h, last = ops.gated_scan(drive, h0)
        ours = grad(h.sum() + last.sum(), (drive, h0))
        ops.gated_scan(drive, h0)  # one warning is enough: another would be an error here
        ops.linear_scan(*(x.to(DEVICE) for x in linear(1, 3, 2)))
    message = str(warned[0].message)
    assert len(warned) == 1 and f"a {kind} is off" in message
    assert f"Triton's kernels of gated_scan are left out on this {DEVICE} in float32" in message
    assert trial.results()[f"gated_scan on {DEVICE} in float32"].startswith(f"a {kind} is off by")
    assert trial.results()[f"linear_scan on {DEVICE} in float32"] == "passed"
    with using_backend("torch"):
        h_2, last_2 = ops.gated_scan(drive, h0)
    theirs = grad(h_2.sum() + last_2.sum(), (drive, h0))
    for found, expected in zip((h, last, *ours), (h_2, last_2, *theirs), strict=True):
        assert torch.equal(found, expected)


def outside(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """The command where the interpreter is off."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, *command]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True)


def test_without_the_interpreter_the_cpu_is_refused_before_triton_is_loaded(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(runtime, "_triton_fault", runtime._triton_fault.__wrapped__)
    monkeypatch.setitem(sys.modules, "triton", None)  # to load it is an error
    ops.gated_scan(torch.zeros(1, 2, 2), torch.zeros(1, 1))
    assert pick_backend("auto", "cpu").value == "cpu"
    with pytest.raises(UsageError) as error:
        pick_backend("triton", "cpu")
    reason = "runtime.backend is triton, but the device is cpu. Choose torch or auto."
    assert str(error.value) == reason


def test_all_kernels_compile_for_a_gpu_that_is_not_here():
    """Types and their lowering, which the interpreter does not look at, up to machine code."""
    ran = outside(str(Path(__file__).with_name("compile_kernels.py")))
    assert ran.returncode == 0, ran.stderr
    assert {line.split()[0] for line in ran.stdout.splitlines()} == KERNELS


KERNELS = set(
    """scan_forward scan_backward scan_ends conv_forward
    conv_backward norm_forward norm_backward lem_forward_z lem_forward_y lem_backward_y
    lem_backward_z cfc_forward_p cfc_forward_h cfc_backward_h cfc_backward_p
    diagonal_lem_forward diagonal_lem_backward diagonal_cfc_forward diagonal_cfc_backward""".split()
)


@pytest.mark.skipif(GPU, reason="it is what runs here")
@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no NVIDIA GPU here")
def test_the_same_on_a_gpu():
    given = dict(SEQLM_TEST_GPU="1", CUDA_VISIBLE_DEVICES=os.environ["SEQLM_TEST_GPUS"])
    files = __file__, str(Path(__file__).with_name("test_gpu.py"))
    ran = outside("-m", "pytest", "-p", "no:xdist", "-rs", *files, **given)
    assert ran.returncode in (0, 5), ran.stdout  # 5: torch finds none
