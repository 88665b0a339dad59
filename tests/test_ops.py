"""Every backend's scans equal the plain loop, in values and gradients."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numba
import pytest
import torch
import torch.nn.functional as F
from conftest import close
from safetensors.torch import load_file
from torch.autograd import grad, gradcheck, gradgradcheck

from seqlm import cells, ops, runtime
from seqlm.cells.cfc import ACTIVATIONS
from seqlm.errors import ShapeError, UsageError
from seqlm.model import LanguageModel
from seqlm.ops.cpu import compile
from seqlm.ops.cpu import gated_scan as in_gated
from seqlm.ops.cpu import linear as in_linear
from seqlm.ops.dispatch import Op
from seqlm.runtime import pick_backend, using_backend

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")
BACKENDS = ["torch", "cpu"]  # and triton, by itself: its interpreter takes time
# relative to the norm: float64 and float32 differ in the order of sums; bfloat16 values are equal
# up to their own rounding, and gradients also up to that of the h they are computed from
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}
LENGTHS = [1, 2, 3, 7, 63, 64, 65, 250]


def gated_scan(k, u, h0, candidate="positive"):
    """The scan of gates and candidates that come apart."""
    return ops.gated_scan(torch.cat([k, u], dim=-1), h0, candidate)


SCANS = [gated_scan, ops.linear_scan]


def compare(function, inputs, backend) -> None:
    """Values and gradients of h and the last state, on the backend and by the loop."""
    results = []
    for name in (backend, "reference"):
        with using_backend(name):
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


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("logit", [-120.0, -30.0, 30.0, 120.0])
def test_two_gates_that_are_both_nearly_0_or_1_share_the_state(backend, logit):
    """i / (f + i) of two equal gates is 1/2, where f + i underflows too."""
    drive = torch.full((1, 4, 6), logit)
    drive[..., 4:] = 0.25
    with using_backend(backend):
        h, _ = ops.gated_scan(drive, torch.zeros(1, 2))
    expected = 0.75 * (1 - 0.5 ** torch.arange(1, 5))
    assert (h[0, :, 0] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("k_f, k_i", [(-120.0, -100.0), (-100.0, -104.0), (-1.0, -95.0)])
def test_two_gates_however_small_are_told_apart(backend, k_f, k_i):
    drive = torch.tensor([k_f, k_i, 0.5]).view(1, 1, 3)
    with using_backend(backend):
        _, last = ops.gated_scan(drive, torch.full((1, 1), 3.0))
    exact = drive.double().flatten()
    z = torch.sigmoid(F.softplus(-exact[0]) - F.softplus(-exact[1]))
    assert last.item() == pytest.approx(((1 - z) * 3 + z).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["drive", "h0"])
def test_compiled_loops_let_nan_through(dtype, where):
    drive, h0 = torch.zeros(1, 5, 8).to(dtype), torch.zeros(1, 4)
    (drive[0, 2] if where == "drive" else h0[0])[1] = float("nan")
    with using_backend("cpu"):
        h, last = ops.gated_scan(drive, h0)
    assert h[0, 2:, 1].isnan().all() and last[0, 1].isnan() and h[0, :, 0].isfinite().all()


def test_compiled_loops_may_be_entered_by_many_threads_at_once():
    drive, h0 = torch.randn(2, 300, 512), torch.randn(2, 256)
    with using_backend("cpu"):
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
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", LENGTHS)
def test_block_scan_equals_the_loop(backend, dtype, T):
    a = (torch.randn(3, T, 2, 2, 5) * 0.6).to(dtype).requires_grad_()
    b = torch.randn(3, T, 2, 5).to(dtype).requires_grad_()
    h0 = torch.randn(3, 2, 5, dtype=state_dtype(dtype)).requires_grad_()
    compare(ops.block_scan, (a, b, h0), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_block_scan_takes_any_width_and_input_that_is_not_contiguous(backend):
    a = torch.randn(2, 9, 2, 1100, 2, requires_grad=True)
    b = torch.randn(2, 1100, 9, 2, requires_grad=True)
    h0 = torch.randn(2, 1100, 2, requires_grad=True)

    def scan(a, b, h0):
        return ops.block_scan(a.mT / 3, b.permute(0, 2, 3, 1), h0.mT)

    compare(scan, (a, b, h0), backend)


def test_blocks_that_are_diagonal_are_two_linear_scans():
    a, b, h0 = torch.rand(2, 40, 2, 3), torch.randn(2, 40, 2, 3), torch.randn(2, 2, 3)
    blocks = torch.zeros(2, 40, 2, 2, 3)
    blocks[:, :, 0, 0], blocks[:, :, 1, 1] = a.unbind(2)
    h, _ = ops.block_scan(blocks, b, h0)
    for i in range(2):
        close(h[:, :, i], ops.linear_scan(a[:, :, i], b[:, :, i], h0[:, i])[0], 1e-6)


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


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("scan", SCANS)
def test_gradients_are_those_of_finite_differences(backend, scan):
    inputs = [torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    h0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with using_backend(backend):
        assert gradcheck(scan, (*inputs, h0))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("scan", SCANS)
def test_the_last_state_is_exact_and_owns_its_memory(backend, scan):
    """float32 under bfloat16 storage, and no view that keeps the whole sequence alive."""
    x, y = (torch.randn(2, 100, 3, dtype=torch.bfloat16) for _ in range(2))
    with using_backend(backend):
        h, last = scan(x, y, torch.zeros(2, 3))
    assert (h.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert last.untyped_storage().nbytes() == last.numel() * 4
    assert torch.equal(last.bfloat16(), h[:, -1]) and not torch.equal(last, h[:, -1].float())


KEYS = (2, 5, 3, 4)  # B, T, H, K


def matrix_inputs(T, decays, dtype=torch.float32, keys=5):
    """Two rows of three heads whose values are 7 wide; every tenth decay is 0 up to rounding."""
    log_a = -(torch.rand(2, T, 3, decays) ** 4)
    log_a[torch.rand(log_a.shape) < 0.1] = -80
    shapes = (2, T, 3, keys), (2, T, 3, keys), (2, T, 3, 7)
    inputs = [*(torch.randn(shape) for shape in shapes), log_a]
    first = torch.randn(2, 3, keys, 7, dtype=state_dtype(dtype))
    return [*(x.to(dtype).requires_grad_() for x in inputs), first.requires_grad_()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("decays", [1, 5])
@pytest.mark.parametrize("T", [1, 2, 16, 53])
def test_matrix_scan_equals_the_loop(backend, dtype, decays, T):
    compare(ops.matrix_scan, matrix_inputs(T, decays, dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("log_a", [-1e4, -80.0, -1e-9, 0.0])
def test_matrix_scan_is_right_for_decays_that_are_all_nearly_0_or_1(backend, log_a):
    q, k, v, _, S0 = matrix_inputs(37, 5)
    decays = torch.full((2, 37, 3, 5), log_a, requires_grad=True)
    compare(ops.matrix_scan, (q, k, v, decays, S0), backend)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("keys", ["all alike", "any"])
@pytest.mark.parametrize("T", [1, 2, 32, 53])
def test_delta_scan_equals_the_loop(dtype, keys, T):
    """Also where every step corrects all that the steps before it wrote: one key, beta = 1."""
    q, k, v, log_a, S0 = matrix_inputs(T, 1, dtype)
    beta = torch.rand(2, T, 3, 1).to(dtype)
    if keys == "all alike":
        k, beta = k[:, :1].expand_as(k), torch.ones_like(beta)
    k = F.normalize(k.detach().float(), dim=-1).to(dtype).requires_grad_()
    compare(ops.delta_scan, (q, k, v, log_a, beta.requires_grad_(), S0), "torch")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_last_matrix_is_exact_and_owns_its_memory(backend):
    """As of the other scans, and from input that is not contiguous."""
    q, k, v, log_a, S0 = (x.detach() for x in matrix_inputs(33, 5, torch.bfloat16))
    with using_backend(backend):
        o, last = ops.matrix_scan(q, k, v, log_a, S0)
        other = ops.matrix_scan(*(x.mT.contiguous().mT for x in (q, k, v, log_a, S0)))
    assert (o.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert last.untyped_storage().nbytes() == last.numel() * 4
    assert torch.equal(o, other[0]) and torch.equal(last, other[1])


@pytest.mark.parametrize("T", [16_384])
def test_a_long_scan_loses_no_digits(T):
    """The log-space form is off by 4e-4 at T = 4096 and by 8e-3 at 65,536 (float32)."""
    k, u = torch.randn(1, T, 16), torch.randn(1, T, 16)
    h, _ = gated_scan(k, u, torch.zeros(1, 16))
    with using_backend("reference"):
        truth, _ = gated_scan(k.double(), u.double(), torch.zeros(1, 16).double())
    assert ((h - truth).abs() / truth.abs()).max() < 1e-6


@pytest.mark.parametrize(
    "scan, shapes",
    [
        (ops.linear_scan, ((2, 5, 3), (2, 5, 4), (2, 3))),
        (ops.linear_scan, ((2, 5, 3), (2, 5, 3), (3, 3))),
        (ops.linear_scan, ((2, 0, 3), (2, 0, 3), (2, 3))),
        (ops.block_scan, ((2, 5, 2, 2, 3), (2, 5, 3), (2, 2, 3))),
        (ops.block_scan, ((2, 5, 2, 3), (2, 5, 2, 3), (2, 2, 3))),
        (ops.block_scan, ((2, 0, 2, 2, 3), (2, 0, 2, 3), (2, 2, 3))),
        (ops.gated_scan, ((2, 5, 7), (2, 3))),
        (ops.gated_scan, ((2, 5, 6), (3, 3))),
        (ops.gated_scan, ((2, 0, 6), (2, 3))),
        (ops.gated_scan, ((5, 6), (5, 3))),
        (ops.matrix_scan, (KEYS, KEYS, (2, 5, 3, 7), (2, 5, 3, 3), (2, 3, 4, 7))),
        (ops.matrix_scan, (KEYS, (2, 5, 3, 3), (2, 5, 3, 7), KEYS, (2, 3, 4, 7))),
        (ops.matrix_scan, (KEYS, KEYS, (2, 5, 3, 7), KEYS, (2, 3, 7, 4))),
        (ops.delta_scan, (KEYS, KEYS, (2, 5, 3, 7), (2, 5, 3, 1), KEYS, (2, 3, 4, 7))),
        (ops.delta_scan, (KEYS, KEYS, (2, 5, 3, 7), (2, 5, 3, 1), (2, 5, 3, 1), (2, 3, 7, 4))),
    ],
)
def test_shapes_that_disagree_are_refused_with_all_of_them(scan, shapes):
    with pytest.raises(ShapeError) as error:
        scan(*(torch.zeros(shape) for shape in shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)


def test_an_unknown_backend_is_refused():
    with pytest.raises(UsageError, match="Unknown backend 'troch'. Did you mean 'torch'"):
        pick_backend("troch", "cpu")


def test_auto_picks_what_the_device_has_and_says_why(monkeypatch):
    assert pick_backend("auto", "cpu") == ("cpu", "compiled loops")
    assert pick_backend("auto", "mps") == ("torch", "works on any device")
    assert pick_backend("auto", "cuda") == ("torch", "torch finds no such device here")
    with pytest.raises(UsageError, match="runtime.backend is cpu, but the device is cuda"):
        pick_backend("cpu", "cuda")
    monkeypatch.setattr(runtime, "_numba_fault", lambda: "numba is not installed")
    assert pick_backend("auto", "cpu") == ("torch", "numba is not installed")
    with pytest.raises(UsageError, match="runtime.backend is cpu, but numba is not installed"):
        pick_backend("cpu", "cpu")


def backend_of(name, *tensors):
    return Op(name).code(tensors, {}).backend


def test_the_backend_is_that_of_the_block_only():
    x = torch.zeros(1)
    assert backend_of("linear_scan", x) == "cpu"
    with using_backend("reference"):
        assert backend_of("linear_scan", x) == "reference"
    assert backend_of("linear_scan", x) == "cpu"


def test_what_a_backend_does_not_do_the_next_one_does():
    """Compiled loops read float32 and bfloat16; torch has no CfC; everything has a reference."""
    x = torch.zeros(1)
    assert backend_of("linear_scan", x.double()) == backend_of("linear_scan", x.half()) == "torch"
    assert backend_of("linear_scan", x, x.double()) == "torch"
    with using_backend("torch"):
        assert backend_of("cfc_scan", x) == "reference" and not ops.fused("cfc_scan", x)
    assert backend_of("cfc_scan", x) == "cpu" and ops.fused("cfc_scan", x)
    folder = Path(ops.__file__).parent
    files = {path.stem for path in folder.glob("[!_]*.py")}
    in_reference = {path.stem for path in (folder / "reference").glob("*.py")}
    in_backends = {path.stem for path in folder.glob("[ct]*/*_[sc]*.py")} - {"through_time"}
    assert in_backends <= in_reference and in_backends - {"gated_step"} <= files


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
        with using_backend(backend), torch.autocast("cpu", torch.bfloat16):
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


def test_where_compiled_code_cannot_be_kept_it_runs_all_the_same(monkeypatch):
    monkeypatch.setattr(compile._CacheFiles, "_locator_classes", [])  # numba finds no folder
    loop = compile.compiled()(lambda x: x + 0.75)
    assert loop(1.0) == 1.75 and not loop.stats.cache_path


def test_what_was_just_compiled_and_what_is_loaded_from_disk_agree_to_the_bit(
    tmp_path, monkeypatch
):
    """Compiled in another process, and loaded in this one."""
    code = (
        "import torch; from safetensors.torch import save_file;"
        "from seqlm.ops.cpu.gated_scan import forward; torch.manual_seed(0);"
        "h, last = forward(torch.randn(4, 16, 32), torch.zeros(4, 16), 'positive')[0];"
        "save_file({'h': h, 'last': last}, 'found')"
    )
    cached = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=cached, check=True, timeout=100)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    spec = spec_from_file_location("again", in_gated.__file__)
    again = module_from_spec(spec)
    spec.loader.exec_module(again)
    torch.manual_seed(0)
    (h, last), _ = again.forward(torch.randn(4, 16, 32), torch.zeros(4, 16), "positive")
    assert again.gated_forward.stats.cache_hits and not again.gated_forward.stats.cache_misses
    found = load_file("found")
    assert torch.equal(found["h"], h) and torch.equal(found["last"], last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lems_loop_lets_nan_through(backend):
    drive = torch.zeros(2, 5, 12)
    drive[0, 2, 0] = float("nan")
    state, weights = torch.zeros(2, 3), lem_weights(3, torch.float32)
    with using_backend(backend):
        h, _, z = ops.lem_scan(drive, state, state, *weights, 1.0)
    assert h[0, 2:].isnan().all() and z[0].isnan().any() and h[1].isfinite().all()


def lem_weights(width, dtype):
    return [torch.randn(n * width, width, dtype=dtype) / width**0.5 for n in (3, 1)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(19, 7, 13), (8, 3, 4), (1, 9, 70), (2, 1, 1)])
def test_lems_loops_agree(dtype, shape):
    """Rows by eights and what is left, terms by fours and what is left."""
    batch, time, width = shape
    drive = torch.randn(batch, time, 4 * width).to(dtype)
    exact = state_dtype(dtype)
    states = [torch.randn(batch, width, dtype=exact) for _ in range(2)]
    inputs = [drive, *states, *lem_weights(width, exact)]
    results = []
    for backend in ("reference", *BACKENDS):
        own = [x.clone().requires_grad_() for x in inputs]
        with using_backend(backend):
            outputs = ops.lem_scan(*own, 0.7)
        loss = sum((y.double() * torch.arange(y.numel()).sin().view_as(y)).sum() for y in outputs)
        results.append([*(y.detach() for y in outputs), *grad(loss, own)])
    for expected, *found in zip(*results, strict=True):
        for ours in found:
            close(ours, expected, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rounds", [1, 4])
def test_mogrifiers_loop_equals_the_plain_loop(dtype, rounds):
    exact = state_dtype(dtype)
    shapes = [(3, 5), (3, 5), (rounds, 5, 5), (20, 10), (20,)]
    rest = [(torch.randn(*shape, dtype=exact) / 2).requires_grad_() for shape in shapes]
    x = torch.randn(3, 7, 5).to(dtype).requires_grad_()

    def scan(*inputs):
        h, *last = ops.mogrifier_scan(*inputs)
        return h, torch.cat(last)

    compare(scan, (x, *rest), "torch")


lem_scan = partial(ops.lem_scan, dt=1.0)
MOGRIFIER = ((2, 3), (2, 3), (2, 3, 3), (12, 6), (12,))


@pytest.mark.parametrize(
    "scan, shapes",
    [
        (lem_scan, ((2, 5, 11), (2, 3), (2, 3), (9, 3), (3, 3))),
        (lem_scan, ((2, 5, 12), (2, 3), (1, 3), (9, 3), (3, 3))),
        (lem_scan, ((2, 0, 12), (2, 3), (2, 3), (9, 3), (3, 3))),
        (lem_scan, ((2, 5, 12), (2, 3), (2, 3), (3, 9), (3, 3))),
        (lem_scan, ((5, 12), (5, 3), (5, 3), (9, 3), (3, 3))),
        (ops.mogrifier_scan, ((2, 5, 4), *MOGRIFIER)),
        (ops.mogrifier_scan, ((2, 0, 3), *MOGRIFIER)),
        (partial(ops.diagonal_lem_scan, dt=1.0), ((2, 5, 12), (2, 3), (2, 3), (3, 3))),
        (partial(ops.diagonal_lem_scan, dt=1.0), ((2, 0, 12), (2, 3), (2, 3), (4, 3))),
        (partial(ops.diagonal_cfc_scan, gated=True, tau=1.0), ((2, 5, 6), (2, 3), (3, 3))),
        (partial(ops.diagonal_cfc_scan, gated=True, tau=1.0), ((2, 5, 9), (2, 3), (4, 3))),
        (lambda *x: ops.cfc_scan(*x, "tanh", True), ((2, 5, 4), (2, 3), (4, 3), (9, 5), (9,))),
        (lambda *x: ops.cfc_scan(*x, "tanh", True), ((2, 5, 4), (3, 3), (4, 3), (9, 4), (9,))),
    ],
)
def test_shapes_that_disagree_are_refused_by_the_scans_of_lem_and_cfc(scan, shapes):
    with pytest.raises(ShapeError) as error:
        scan(*(torch.zeros(shape) for shape in shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_with_few_rows_equals_torchs(rows, bias):
    layer = ops.Linear(37, 21, bias=bias)
    x = torch.randn(37, rows).mT  # not contiguous
    with torch.no_grad():
        close(layer(x), F.linear(x, layer.weight, layer.bias), 1e-6)
        close(layer(x.view(1, rows, 37)), F.linear(x, layer.weight, layer.bias)[None], 1e-6)


def test_a_product_that_needs_a_gradient_has_it():
    layer, x = ops.Linear(5, 3), torch.randn(2, 5)
    close(grad(layer(x).sum(), layer.weight)[0], x.sum(0).expand(3, 5), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_product_in_another_dtype_stays_in_it(dtype):
    with torch.no_grad():
        assert ops.Linear(5, 3).to(dtype)(torch.randn(2, 5).to(dtype)).dtype == dtype


def test_few_numbers_have_the_same_gelu_and_norm():
    x = torch.cat([torch.linspace(-30, 30, 999), torch.tensor([0.0, 1e-30, float("inf")])])
    rows, weight = torch.randn(4, 50), torch.randn(50)
    with torch.no_grad():
        assert (ops.gelu(x)[:-1] - F.gelu(x)[:-1]).abs().max() < 2e-6
        assert ops.gelu(torch.full((1,), float("nan"))).isnan().all()
        close(ops.rms_norm(rows.mT.contiguous().mT, weight), F.rms_norm(rows, (50,), weight), 1e-6)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("candidate", ["positive", "linear"])
def test_a_compiled_step_equals_the_formula(parts, candidate):
    drive, h = 3 * torch.randn(4, parts * 9), torch.randn(4, 9)
    with torch.no_grad():
        found = ops.gated_step(drive, h, candidate)
        with using_backend("reference"):
            close(found, ops.gated_step(drive, h, candidate), 1e-6)


def gradients_of_both(function, inputs, dtype, rest=None):
    """Outputs and gradients by the compiled loop, the first input in the dtype and others in `rest`
    if that is given, and by torch in float64."""
    results = []
    for backend, kind in (("cpu", dtype), ("torch", torch.float64)):
        kinds = [kind] + [rest if rest and kind == dtype else kind] * (len(inputs) - 1)
        own = [x.to(k).clone().requires_grad_() for x, k in zip(inputs, kinds, strict=True)]
        with using_backend(backend):
            found = function(*own)
        found = found if isinstance(found, tuple) else (found,)
        loss = sum((y.double() * torch.arange(y.numel()).sin().view_as(y)).sum() for y in found)
        results.append([y.detach().double() for y in (*found, *grad(loss, own))])
    return zip(*results, strict=True)


@pytest.mark.parametrize("shape, kernel", [((3, 9, 7), 3), ((1, 2, 1), 2), ((5, 40, 33), 4)])
def test_the_convolution_and_its_gradients_equal_torchs(shape, kernel):
    batch, time, width = shape
    x = torch.randn(batch, width, time + kernel - 1).mT
    inputs = [x, torch.randn(width, 1, kernel), torch.randn(width)]
    for found, expected in gradients_of_both(ops.causal_conv, inputs, torch.float32):
        close(found, expected, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 8.0, -8.0])
def test_saturated_gates_of_lem_keep_their_gradient(dtype, shift):
    """What 1 - gate is made of is not the rounded gate."""
    width = 6
    drive = (torch.randn(2, 9, 4 * width) + shift).to(dtype)
    states = [torch.randn(2, width) for _ in range(2)]
    inputs = [drive, *states, *(w / 8 for w in lem_weights(width, torch.float32))]
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    found = gradients_of_both(lem_scan, inputs, dtype, torch.float32)
    for ours, expected in found:
        close(ours, expected, tolerance)


def cfc_loop(drive, h0, from_h, heads, bias, act, gated):
    """The recurrence of `ops.cfc_scan` as it is written there."""
    outputs, h = [], h0
    for at_t in drive.unbind(1):
        p = ACTIVATIONS[act](at_t + h @ from_h.T)
        f_1, f_2, k = (p @ heads.T + bias).chunk(3, dim=-1)
        s = torch.sigmoid(k)
        h = (torch.tanh(f_1) * (1 - s) if gated else torch.tanh(f_1)) + s * torch.tanh(f_2)
        outputs.append(h)
    return torch.stack(outputs, 1), h


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(19, 7, 13, 5), (8, 3, 4, 8), (1, 9, 30, 17), (2, 1, 1, 1)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 4e-6), (torch.bfloat16, 3e-2)])
def test_cfcs_loop_equals_its_equations(act, gated, shape, dtype, tolerance):
    batch, time, width, units = shape
    exact = [
        *(torch.randn(batch, time, units).to(dtype), torch.randn(batch, width)),
        *(torch.randn(units, width) / width**0.5, torch.randn(3 * width, units) / units**0.5),
        3 * torch.randn(3 * width),
    ]
    results = []
    for function, kind in ((ops.cfc_scan, torch.float32), (cfc_loop, torch.float64)):
        own = [x.to(dtype if x is exact[0] and kind == torch.float32 else kind) for x in exact]
        own = [x.clone().requires_grad_() for x in own]
        h, last = function(*own, act, gated)
        weights = torch.arange(h.numel()).sin().view_as(h)
        loss = (h.double() * weights).sum() + (last.double() ** 2).sum()
        results.append([x.detach().double() for x in (h, last, *grad(loss, own))])
    for found, expected in zip(*results, strict=True):
        close(found, expected, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_none_is_none(backend):
    with using_backend(backend):
        h, y, z = ops.lem_scan(
            torch.zeros(0, 3, 8), *[torch.zeros(0, 2)] * 2, *lem_weights(2, None), 1.0
        )
    assert (h.shape, y.shape, z.shape) == ((0, 3, 2), (0, 2), (0, 2))


def test_steps_refuse_what_does_not_fit_as_torch_does():
    """The compiled loops read memory by its address: a wrong shape must not reach them."""
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            ops.Linear(4, 3)(torch.randn(2, 6))
        with pytest.raises(RuntimeError):
            ops.rms_norm(torch.ones(2, 6), torch.ones(4))
        with pytest.raises(RuntimeError):
            ops.rms_norm(torch.ones(20_000, 8), torch.ones(4))
        with pytest.raises(RuntimeError):
            ops.gated_step(torch.randn(3, 8), torch.randn(2, 4))


def test_a_step_takes_one_state_for_many_rows_and_strided_memory_as_torch_does():
    drive, h, layer = torch.randn(4, 8), torch.randn(1, 4), ops.Linear(4, 3)
    layer.bias = torch.nn.Parameter(torch.randn(6)[::2])
    with torch.no_grad():
        with using_backend("torch"):
            expected = ops.gated_step(drive, h), layer(drive[:, :4])
        close(ops.gated_step(drive, h), expected[0], 1e-6)
        close(layer(drive[:, :4]), expected[1], 1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_with_many_rows_and_its_gradients_equal_torchs(bias):
    inputs = [torch.randn(13, 37, 30), torch.randn(21, 37), *([torch.randn(21)] if bias else [])]

    def product(x, *weights):
        return ops.linear(x.mT, *weights)  # not contiguous

    for found, expected in gradients_of_both(product, inputs, torch.float32):
        close(found, expected, 2e-6)


def test_a_product_under_autocast_is_in_its_dtype():
    layer, x = ops.Linear(37, 21), torch.randn(100, 37)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert layer(x).dtype == torch.bfloat16


def hand_written():
    """Every op whose gradient is written by hand, with tensors for it."""

    def n(*shape):
        return torch.randn(*shape) / 2

    state, lem = n(2, 3), [n(9, 3), n(3, 3)]
    return {
        "linear_scan": (ops.linear_scan, (n(2, 5, 3), n(2, 5, 3), state)),
        "block_scan": (ops.block_scan, (n(2, 5, 2, 2, 3), n(2, 5, 2, 3), n(2, 2, 3))),
        "gated_scan": (ops.gated_scan, (n(2, 5, 6), state)),
        "lem_scan": (lem_scan, (n(2, 5, 12), state, state, *lem)),
        "cfc_scan": (
            lambda *x: ops.cfc_scan(*x, "tanh", True),
            (n(2, 5, 4), state, n(4, 3), n(9, 4), n(9)),
        ),
        "mogrifier_scan": (
            ops.mogrifier_scan,
            (n(2, 5, 3), state, state, n(2, 3, 3), n(12, 6), n(12)),
        ),
        "diagonal_lem_scan": (
            partial(ops.diagonal_lem_scan, dt=1.0),
            (n(2, 5, 12), state, state, n(4, 3)),
        ),
        "diagonal_cfc_scan": (
            partial(ops.diagonal_cfc_scan, gated=True, tau=1.0),
            (n(2, 5, 12), state, n(3, 3)),
        ),
        "through_time": (
            partial(ops.diagonal_scan, lambda x, s: (s[0], (torch.tanh(x + s[0]),))),
            (n(2, 5, 3), (state,)),
        ),
        "causal_conv": (ops.causal_conv, (n(2, 8, 3), n(3, 1, 4), n(3))),
        "rms_norm": (ops.rms_norm, (n(300, 40), n(40))),
        "linear": (ops.linear, (n(70, 5), n(3, 5), n(3))),
    }


def first_output(function, x, rest):
    y = function(x, *rest)
    return y[0] if isinstance(y, tuple) else y


IN_TORCH = ["linear_scan", "block_scan", "gated_scan", "lem_scan", "mogrifier_scan", "through_time"]


@pytest.mark.parametrize(
    "name, backend",
    [(name, "cpu") for name in hand_written()] + [(name, "torch") for name in IN_TORCH],
)
def test_a_gradient_written_by_hand_is_not_differentiated_again(name, backend):
    """Where the loss is linear in the output, the gradient's gradient was wrong without a word."""
    function, (x, *rest) = hand_written()[name]
    x.requires_grad_()
    with using_backend(backend):
        y = first_output(function, x, rest)
        with pytest.raises(RuntimeError, match=f"gradient of {name} is written by hand.*reference"):
            grad(y.sum(), x, create_graph=True)
        assert grad(first_output(function, x, rest).sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("name", hand_written())
def test_the_reference_has_right_second_derivatives(name):
    function, (x, *rest) = hand_written()[name]

    def double(y):
        return tuple(map(double, y)) if isinstance(y, tuple) else y.double()

    x, rest = x[:2].double().requires_grad_(), [double(y) for y in rest]
    if name == "rms_norm":
        rest = [rest[0]]
    with using_backend("reference"):
        assert gradgradcheck(lambda x: first_output(function, x, rest), x)


def test_the_second_derivative_of_a_diagonal_lem_is_the_references():
    """It was 0.827 in the place of 0.427."""
    torch.manual_seed(0)
    cell = cells.find("lem")(4, recurrence="diagonal")
    x = torch.randn(1, 6, 4, requires_grad=True)
    with using_backend("reference"):
        (d,) = grad(cell(x)[0].sum(), x, create_graph=True)
        (second,) = grad(d.square().sum(), x)
    step = 1e-2 * torch.randn_like(x)
    changes = []
    for at in (x + step, x - step):
        at = at.detach().requires_grad_()
        changes.append(grad(cell(at)[0].sum(), at)[0].square().sum())
    assert (second * step).sum() == pytest.approx(((changes[0] - changes[1]) / 2).item(), rel=2e-2)


SLOPES = [
    ("indrnn", {}),
    ("lem", {"recurrence": "diagonal", "solver": "newton"}),
    ("cfc", {"recurrence": "leaky", "mode": "pure"}),
]


@pytest.mark.parametrize("name, options", SLOPES)
def test_cells_that_take_slopes_may_be_called_by_many_threads_at_once(name, options):
    """Slopes are gradients that are taken within the forward pass."""
    cell, x = cells.find(name)(8, **options), torch.randn(2, 20, 8)
    alone = cell(x)[0].detach()

    def call(_):
        y = cell(x)[0]
        y.sum().backward()
        return y.detach()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, range(20)))
    assert all(torch.equal(y, alone) for y in found)


@pytest.mark.filterwarnings("ignore")  # Dynamo's own, of several kinds
def test_a_model_under_torch_compile_is_the_same():
    """Dynamo, which reads Python, must not follow the ops into compiled loops.

    One test, because Dynamo takes seconds to load in each process.
    """
    for cell, options, compiler in [
        ("mingru", {}, "aot_eager"),
        ("lem", {}, "eager"),
        (*SLOPES[1], "eager"),
    ]:
        model = LanguageModel(11, width=8, layers=1, cell=cell, cell_options=options, conv=3)
        tokens = torch.randint(11, (3, 9))
        results = []
        for forward in (model, torch.compile(model, backend=compiler)):
            logits, _ = forward(tokens)
            results.append((logits.detach(), *grad(logits.sin().sum(), model.parameters())))
        for found, expected in zip(*results, strict=True):
            close(found, expected, 1e-6)
        torch._dynamo.reset()


def test_a_changed_helper_gives_the_compiled_code_another_folder(monkeypatch, tmp_path):
    for path in Path(compile.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(compile, "__file__", str(tmp_path / "compile.py"))
    assert compile._hash_of_sources() == compile.SOURCES
    with (tmp_path / "numbers.py").open("a") as file:
        file.write("\n")
    assert compile._hash_of_sources() != compile.SOURCES


def test_compiled_code_of_other_sources_is_deleted_after_a_week(tmp_path):
    """Before that a process with those sources may still run."""
    new, old, own, foreign = (tmp_path / name for name in ("seqlm-1", "seqlm-2", "seqlm-3", "x"))
    for folder in (new, old, own, foreign):
        folder.mkdir()
        (folder / "loop.nbc").touch()
    for folder in (old, own, foreign):
        os.utime(folder, (0, 0))
    compile.remove_stale(own)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seqlm-1", "seqlm-3", "x"]


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_a_pytorch_without_the_operator_of_onednn_takes_its_own_product(monkeypatch, error):
    def missing(*_):
        raise error("another version of PyTorch")

    monkeypatch.setattr(in_linear, "product", missing)
    monkeypatch.setattr(in_linear, "onednn", in_linear.onednn.__wrapped__)
    layer, x = ops.Linear(5, 3), torch.randn(70, 5)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
