"""Every backend's scans equal the plain loop, in values and gradients."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad, gradcheck

from seqlm import ops
from seqlm.errors import ShapeError, UsageError

BACKENDS = [name for name in ops.BACKENDS if name != "reference"]
# relative to the norm: float64 and float32 differ in the order of sums; bfloat16 values are equal
# up to their own rounding, and gradients also up to that of the h they are computed from
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}
LENGTHS = [1, 2, 3, 7, 63, 64, 65, 250]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty gives NaN, so that an element a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def close(x: torch.Tensor, y: torch.Tensor, tolerance: float) -> None:
    assert x.dtype == y.dtype and x.shape == y.shape
    x, y = x.double(), y.double()
    assert x.isfinite().all()
    assert (x - y).norm() <= tolerance * y.norm() + 1e-30


def gated_scan(k, u, h0, candidate="positive"):
    """The scan of gates and candidates that come apart."""
    return ops.gated_scan(torch.cat([k, u], dim=-1), h0, candidate)


SCANS = [gated_scan, ops.linear_scan]


def compare(function, inputs, backend) -> None:
    """Values and gradients of h and the last state, on the backend and by the loop."""
    results = []
    for name in (backend, "reference"):
        with ops.using(name):
            h, last = function(*inputs)
        weights = torch.arange(1, h.numel() + 1, dtype=torch.float64).sin().view_as(h)
        loss = (h.double() * weights).sum() + (last.double() ** 2).sum()
        results.append((h.detach(), last.detach(), *grad(loss, inputs)))
    for ours, truth in zip(*results, strict=True):
        close(ours, truth, TOLERANCE[inputs[0].dtype])


def state_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("candidate", ["positive", "linear"])
@pytest.mark.parametrize("T", LENGTHS)
def test_gated_scan_equals_the_loop(backend, dtype, candidate, T):
    k = (3 * torch.randn(3, T, 5)).to(dtype).requires_grad_()
    u = torch.randn(3, T, 5).to(dtype).requires_grad_()
    h0 = torch.randn(3, 5, dtype=state_dtype(dtype)).requires_grad_()
    compare(lambda *x: gated_scan(*x, candidate), (k, u, h0), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("candidate", ["positive", "linear"])
@pytest.mark.parametrize("shape", [(3, 1, 5), (1, 64, 1), (2, 65, 130), (1, 33, 300)])
def test_gated_scan_of_two_gates_equals_the_loop(backend, dtype, candidate, shape):
    """Widths below, at and above a block of channels."""
    batch, time, width = shape
    drive = (3 * torch.randn(batch, time, 3 * width)).to(dtype).requires_grad_()
    h0 = torch.randn(batch, width, dtype=state_dtype(dtype)).requires_grad_()
    compare(lambda *x: ops.gated_scan(*x, candidate), (drive, h0), backend)


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("logit", [-120.0, -30.0, 30.0, 120.0])
def test_two_gates_that_are_both_nearly_0_or_1_share_the_state(backend, logit):
    """i / (f + i) of two equal gates is 1/2, where f + i underflows too."""
    drive = torch.full((1, 4, 6), logit)
    drive[..., 4:] = 0.25
    with ops.using(backend):
        h, _ = ops.gated_scan(drive, torch.zeros(1, 2))
    expected = 0.75 * (1 - 0.5 ** torch.arange(1, 5))
    assert (h[0, :, 0] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("k_f, k_i", [(-120.0, -100.0), (-100.0, -104.0), (-1.0, -95.0)])
def test_two_gates_however_small_are_told_apart(backend, k_f, k_i):
    drive = torch.tensor([k_f, k_i, 0.5]).view(1, 1, 3)
    with ops.using(backend):
        _, last = ops.gated_scan(drive, torch.full((1, 1), 3.0))
    exact = drive.double().flatten()
    z = torch.sigmoid(F.softplus(-exact[0]) - F.softplus(-exact[1]))
    assert last.item() == pytest.approx(((1 - z) * 3 + z).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["drive", "h0"])
def test_compiled_loops_let_nan_through(dtype, where):
    drive, h0 = torch.zeros(1, 5, 8).to(dtype), torch.zeros(1, 4)
    (drive[0, 2] if where == "drive" else h0[0])[1] = float("nan")
    with ops.using("cpu"):
        h, last = ops.gated_scan(drive, h0)
    assert h[0, 2:, 1].isnan().all() and last[0, 1].isnan() and h[0, :, 0].isfinite().all()


def test_compiled_loops_may_be_entered_by_many_threads_at_once():
    drive, h0 = torch.randn(2, 300, 512), torch.randn(2, 256)
    with ops.using("cpu"):
        alone = ops.gated_scan(drive, h0)[0]
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: ops.gated_scan(drive, h0)[0], range(64)))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(h, alone) for h in found)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(threads):
    drive, h0 = torch.randn(3, 40, 2 * 200), torch.randn(3, 200)
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        results.append(ops.gated_scan(drive, h0)[0])
    torch.set_num_threads(1)
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", LENGTHS)
def test_linear_scan_equals_the_loop(backend, dtype, T):
    a = (torch.rand(3, T, 5) * 2.2 - 1.1).to(dtype).requires_grad_()
    b = torch.randn(3, T, 5).to(dtype).requires_grad_()
    h0 = torch.randn(3, 5, dtype=state_dtype(dtype)).requires_grad_()
    compare(ops.linear_scan, (a, b, h0), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_linear_scan_is_right_for_gates_that_are_exactly_0_and_1(backend, gate):
    a = torch.full((2, 65, 3), gate, requires_grad=True)
    b = torch.randn(2, 65, 3, requires_grad=True)
    compare(ops.linear_scan, (a, b, torch.randn(2, 3, requires_grad=True)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_gated_scan_is_right_for_gates_that_round_to_0_and_1(backend, logit):
    k = torch.full((2, 65, 3), logit, requires_grad=True)
    u = torch.randn(2, 65, 3, requires_grad=True)
    compare(gated_scan, (k, u, torch.randn(2, 3, requires_grad=True)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scans_take_input_that_is_not_contiguous(backend):
    both = torch.randn(4, 33, 28, requires_grad=True)

    def scan(both, h0):
        return ops.gated_scan(both[:, :, ::2], h0)

    compare(scan, (both, torch.randn(7, 4).mT.detach().requires_grad_()), backend)


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("scan", SCANS)
def test_gradients_are_those_of_finite_differences(backend, scan):
    inputs = [torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    h0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with ops.using(backend):
        assert gradcheck(scan, (*inputs, h0))


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("scan", SCANS)
def test_the_last_state_is_exact_and_owns_its_memory(backend, scan):
    """float32 under bfloat16 storage, and no view that keeps the whole sequence alive."""
    x, y = (torch.randn(2, 100, 3, dtype=torch.bfloat16) for _ in range(2))
    with ops.using(backend):
        h, last = scan(x, y, torch.zeros(2, 3))
    assert (h.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert last.untyped_storage().nbytes() == last.numel() * 4
    assert torch.equal(last.bfloat16(), h[:, -1]) and not torch.equal(last, h[:, -1].float())


@pytest.mark.parametrize("T", [4096, 65536])
def test_a_long_scan_loses_no_digits(T):
    """The log-space form is off by 4e-4 at T = 4096 and by 8e-3 at 65,536 (float32)."""
    k, u = torch.randn(1, T, 16), torch.randn(1, T, 16)
    h, _ = gated_scan(k, u, torch.zeros(1, 16))
    with ops.using("reference"):
        truth, _ = gated_scan(k.double(), u.double(), torch.zeros(1, 16).double())
    assert ((h - truth).abs() / truth.abs()).max() < 1e-6


@pytest.mark.parametrize(
    "scan, shapes",
    [
        (ops.linear_scan, ((2, 5, 3), (2, 5, 4), (2, 3))),
        (ops.linear_scan, ((2, 5, 3), (2, 5, 3), (3, 3))),
        (ops.linear_scan, ((2, 0, 3), (2, 0, 3), (2, 3))),
        (ops.gated_scan, ((2, 5, 7), (2, 3))),
        (ops.gated_scan, ((2, 5, 6), (3, 3))),
        (ops.gated_scan, ((2, 0, 6), (2, 3))),
        (ops.gated_scan, ((5, 6), (5, 3))),
    ],
)
def test_shapes_that_disagree_are_refused_with_all_of_them(scan, shapes):
    with pytest.raises(ShapeError) as error:
        scan(*(torch.zeros(shape) for shape in shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)


def test_an_unknown_backend_is_refused():
    with pytest.raises(UsageError, match="Unknown backend 'troch'. Did you mean 'torch'"):
        ops.pick("troch", "cpu")


def test_auto_picks_what_the_device_has_and_says_why(monkeypatch):
    assert ops.pick("auto", "cpu") == ("cpu", "compiled loops")
    assert ops.pick("auto", "cuda") == ("torch", "works on any device")
    with pytest.raises(UsageError, match="runtime.backend is cpu, and the device is cuda"):
        ops.pick("cpu", "cuda")
    monkeypatch.setattr(ops.backend, "_compiled", lambda: False)
    assert ops.pick("auto", "cpu") == ("torch", "numba is not installed")
    with pytest.raises(UsageError, match="runtime.backend is cpu, and numba is not installed"):
        ops.pick("cpu", "cpu")


def test_the_backend_is_that_of_the_block_only():
    x = torch.zeros(1)
    assert ops.backend.of(x) == "cpu" and ops.backend.of(x.double()) == "torch"
    with ops.using("reference"):
        assert ops.backend.of(x) == "reference"
    assert ops.backend.of(x) == "cpu"


def test_a_forked_process_has_threads_of_its_own():
    """A pool of the parent's would be one without threads, that waits for ever."""
    code = (
        "import os, torch; from seqlm import ops; torch.set_num_threads(2);"
        "x, h = torch.randn(4, 50, 64), torch.zeros(4, 32); a = ops.gated_scan(x, h)[0];"
        "child = os.fork();"
        "same = torch.equal(ops.gated_scan(x, h)[0], a);"
        "os._exit(0 if same else 1) if child == 0 else None;"
        "print(os.waitpid(child, 0)[1], same)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "0 True\n", ran.stderr


@pytest.mark.parametrize("shape", [(3, 7), (2, 300, 96), (257, 40), (1, 1, 10_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_equals_its_equation(shape, dtype):
    x = (torch.randn(shape, dtype=dtype) * 3).requires_grad_()
    weight = torch.randn(shape[-1], dtype=dtype, requires_grad=True)
    exact, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    y = ops.rms_norm(x, weight)
    mean = exact.square().mean(-1, keepdim=True)
    truth = exact_weight * exact / (mean + torch.finfo(dtype).eps).sqrt()
    weights = torch.arange(1, y.numel() + 1).sin().view_as(y)
    ours = grad((y.double() * weights).sum(), (x, weight))
    theirs = grad((truth * weights).sum(), (exact, exact_weight))
    for found, expected in zip((y, *ours), (truth, *theirs), strict=True):
        close(
            found.detach(), expected.detach().to(dtype), 2e-6 if dtype == torch.float32 else 1e-13
        )


def test_the_norm_comes_in_autocasts_dtype_with_the_gradients_of_the_rounded_one():
    x, weight = torch.randn(5, 300, 64, requires_grad=True), torch.rand(64, requires_grad=True)
    results = []
    for backend in ("cpu", "torch"):
        with ops.using(backend), torch.autocast("cpu", torch.bfloat16):
            y = ops.rms_norm(x, weight).bfloat16()
        results.append((y.detach(), *grad((y * y).sum(), (x, weight))))
    for found, expected in zip(*results, strict=True):
        close(found, expected, 1e-2)


def test_the_norms_weight_has_the_same_gradient_on_any_number_of_threads():
    x, weight = torch.randn(3000, 40), torch.rand(40, requires_grad=True)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(grad(ops.rms_norm(x, weight).sum(), weight)[0])
    torch.set_num_threads(1)
    assert torch.equal(*found)


def test_a_norm_of_nothing_is_nothing():
    assert ops.rms_norm(torch.zeros(0, 4), torch.ones(4)).shape == (0, 4)


def test_where_compiled_code_cannot_be_kept_it_runs_all_the_same():
    code = (
        "from numba.core import caching; caching.CompileResultCacheImpl._locator_classes = [];"
        "import torch; from seqlm import ops;"
        "print(ops.gated_scan(torch.zeros(1, 2, 2), torch.ones(1, 1))[1].item())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert ran.stdout == "0.625\n", ran.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_lems_loop_lets_nan_through(backend):
    drive = torch.zeros(2, 5, 12)
    drive[0, 2, 0] = float("nan")
    state, weights = torch.zeros(2, 3), (torch.randn(9, 3), torch.randn(3, 3))
    with ops.using(backend):
        h, _, z = ops.lem_scan(drive, state, state, *weights, 1.0)
    assert h[0, 2:].isnan().all() and z[0].isnan().any() and h[1].isfinite().all()
