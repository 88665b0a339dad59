"""Every backend's scans equal the plain loop, in values and gradients."""

import pytest
import torch
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
    assert (x - y).norm() <= tolerance * y.norm().clamp_min(1e-30)


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
    compare(lambda *x: ops.gated_scan(*x, candidate), (k, u, h0), backend)


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
    compare(ops.gated_scan, (k, u, torch.randn(2, 3, requires_grad=True)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scans_take_input_that_is_not_contiguous(backend):
    both = torch.randn(4, 33, 14, requires_grad=True)

    def scan(both, h0):
        k, u = both.mT.mT[:, :, ::2], both[:, :, 1::2]
        return ops.gated_scan(k, u, h0)

    compare(scan, (both, torch.randn(7, 4).mT.detach().requires_grad_()), backend)


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("scan", [ops.gated_scan, ops.linear_scan])
def test_gradients_are_those_of_finite_differences(backend, scan):
    inputs = [torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    h0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with ops.using(backend):
        assert gradcheck(scan, (*inputs, h0))


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("scan", [ops.gated_scan, ops.linear_scan])
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
    h, _ = ops.gated_scan(k, u, torch.zeros(1, 16))
    with ops.using("reference"):
        truth, _ = ops.gated_scan(k.double(), u.double(), torch.zeros(1, 16).double())
    assert ((h - truth).abs() / truth.abs()).max() < 1e-6


@pytest.mark.parametrize("scan", [ops.gated_scan, ops.linear_scan])
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 5, 3), (2, 5, 4), (2, 3)),
        ((2, 5, 3), (2, 5, 3), (3, 3)),
        ((2, 0, 3), (2, 0, 3), (2, 3)),
    ],
)
def test_shapes_that_disagree_are_refused_with_the_three(scan, shapes):
    with pytest.raises(ShapeError) as error:
        scan(*(torch.zeros(shape) for shape in shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)


def test_an_unknown_backend_is_refused():
    with pytest.raises(UsageError, match="Unknown backend 'troch'. Did you mean 'torch'"):
        ops.pick("troch")


def test_the_backend_is_that_of_the_block_only():
    before = ops.current()
    with ops.using("reference"):
        assert ops.current() == "reference"
    assert ops.current() == before
