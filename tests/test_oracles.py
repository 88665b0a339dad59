"""The cells give the values and gradients of the field's own packages, in float64.

The packages are the extra `oracles`; without one, its tests are skipped.  Cells for which there is
none are compared with the equations of their papers, in a form that shares no code with the cell.
"""

# B batch, T time, D width

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm import cells

B, T, D = 3, 21, 12
Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]
CLOSE = dict(rtol=1e-10, atol=1e-12)  # only the order of sums differs


def package(name: str):
    return pytest.importorskip(
        name, reason=f"{name.split('.')[0]} is not installed: pip install -e '.[oracles]'"
    )


def given() -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)


def drawn(name: str, **options) -> nn.Module:
    """A cell in float64, away from its initial values: a bias of 0 would hide that it is unused."""
    cell = cells.find(name)(D, **options).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return cell


def compare(
    cell: nn.Module, theirs: nn.Module, run: Callable[[Tensor], Tensor], rename: Rename
) -> None:
    """The outputs and all gradients of a cell and of a package's module of the same weights.

    run: x -> the module's output.  rename: the cell's tensors by name -> the module's; it only puts
    them in another order, so it does the same to gradients.
    """
    theirs.load_state_dict(rename({n: p.detach() for n, p in cell.named_parameters()}))
    x = given()
    weights = torch.arange(B * T * D, dtype=torch.float64).sin().view(B, T, D)
    ours, expected = cell(x)[0], run(x)
    torch.testing.assert_close(ours, expected, **CLOSE)
    (d_x,) = torch.autograd.grad((expected * weights).sum(), x, retain_graph=True)
    (expected * weights).sum().backward(inputs=[*theirs.parameters()])
    (ours * weights).sum().backward()
    torch.testing.assert_close(x.grad, d_x, **CLOSE)
    found = rename({name: p.grad for name, p in cell.named_parameters()})
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, **CLOSE, msg=name)


def without_biases(cell: nn.Module) -> nn.Module:
    with torch.no_grad():
        cell.inputs.bias.zero_()
        cell.outputs.bias.zero_()
    return cell


def parts(matrix: Tensor, *order: int) -> Tensor:
    """The parts of a matrix in another order."""
    return torch.cat([matrix.chunk(len(order))[i] for i in order])


MINIMAL = {
    # the package's layer: candidate, gate
    "mingru": ("minGRU", "to_hidden_and_gate", (1, 0)),
    # the package's layer: candidate, forget gate, input gate
    "minlstm": ("minLSTM", "to_hidden_and_f_i_gate", (2, 0, 1)),
}


def minimal(name: str) -> tuple[nn.Module, nn.Module, Rename]:
    """A minimal cell, minGRU-pytorch's, and how the weights are named there."""
    module, layer, order = MINIMAL[name]
    kind = getattr(package(f"minGRU_pytorch.{module}"), module)

    def rename(own: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = parts(own["inputs.weight"], *order)
        return {f"{layer}.weight": inputs, "to_out.weight": own["outputs.weight"]}

    return without_biases(drawn(name, expansion=2.0)), kind(D, 2.0).double(), rename


@pytest.mark.parametrize("name", MINIMAL)
def test_mingru_and_minlstm_are_mingru_pytorchs(name):
    cell, theirs, rename = minimal(name)
    compare(cell, theirs, theirs, rename)


@pytest.mark.parametrize("name", MINIMAL)
def test_mingru_and_minlstm_go_on_step_by_step_as_mingru_pytorchs(name):
    """By single steps: its minLSTM over a sequence applies g to the state once more."""
    cell, theirs, rename = minimal(name)
    theirs.load_state_dict(rename(dict(cell.named_parameters())))
    state, hidden = cell.initial_state(B), None
    with torch.no_grad():
        for x in given().unbind(1):
            y, state = cell.step(x, state)
            expected, hidden = theirs(x[:, None], hidden, return_next_prev_hidden=True)
            torch.testing.assert_close(y, expected[:, 0], **CLOSE)
            torch.testing.assert_close(state[0], hidden[:, 0], **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        *({"mode": mode, "timespan": 0.7} for mode in ("default", "no_gate", "pure")),
        {"backbone_layers": 3},
        {"mixed_memory": True},
        *({"backbone_activation": name} for name in ("tanh", "relu", "silu", "gelu")),
    ],
    ids=str,
)
def test_cfc_is_ncps(options):
    kind = package("ncps.torch").CfC
    cell = drawn("cfc", backbone_units=7, **options)
    mode, mixed = options.get("mode", "default"), options.get("mixed_memory", False)
    layers, tau = options.get("backbone_layers", 1), options.get("timespan", 1.0)
    form = dict(mode=mode, mixed_memory=mixed, backbone_layers=layers, backbone_units=7)
    form["activation"] = options.get("backbone_activation", "lecun_tanh")
    theirs = kind(D, D, **form).double()

    def rename(own: dict[str, Tensor]) -> dict[str, Tensor]:
        first = torch.cat([own["from_x.weight"], own["from_h.weight"]], 1)
        found = {"backbone.0.weight": first, "backbone.0.bias": own["from_x.bias"]}
        for i in range(layers - 1):
            for part in ("weight", "bias"):
                found[f"backbone.{2 * i + 2}.{part}"] = own[f"backbone.{i}.{part}"]
        heads = ["ff1"] if mode == "pure" else ["ff1", "ff2", "time_a", "time_b"]
        for part in ("weight", "bias"):
            chunks = own[f"heads.{part}"].chunk(len(heads))
            found |= {f"{head}.{part}": c for head, c in zip(heads, chunks, strict=True)}
        if mode == "pure":
            found |= {"w_tau": own["w"][None], "A": own["A"][None]}
        found = {f"rnn_cell.{name}": tensor for name, tensor in found.items()}
        if mixed:
            names = {"input_map.weight": "lstm_x.weight", "input_map.bias": "lstm_x.bias"}
            names["recurrent_map.weight"] = "lstm_h.weight"
            found |= {f"lstm.{name}": own[same] for name, same in names.items()}
        return found

    def run(x: Tensor) -> Tensor:
        zeros = torch.zeros(B, D, dtype=x.dtype)
        spans = torch.full((1, T), tau, dtype=x.dtype)
        return theirs(x, (zeros, zeros) if mixed else zeros, spans)[0]

    compare(cell, theirs, run, rename)


@pytest.mark.parametrize("parallel", [True, False])
def test_mamba_is_mambapys(parallel, monkeypatch):
    package("mambapy")
    mamba = package("mambapy.mamba")
    cell = drawn("mamba", expansion=2, states=5, kernel=4)
    form = dict(d_model=D, n_layers=1, d_state=5, d_conv=4, bias=True, pscan=parallel)
    theirs = mamba.MambaBlock(mamba.MambaConfig(**form)).double()
    # it computes A and D in float32 whatever the dtype, and begins with zeros of the default one
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    names = {"inputs": "in_proj", "conv": "conv1d", "selection": "x_proj", "step_size": "dt_proj"}
    names["outputs"] = "out_proj"

    def rename(own: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {"A_log": own["log_A"].view(cell.inner, 5), "D": own["skip"]}
        for name, tensor in own.items():
            module, _, part = name.rpartition(".")
            found |= {f"{names[module]}.{part}": tensor} if module else {}
        return found

    compare(cell, theirs, theirs, rename)


# Equations


def follows(
    cell: nn.Module, formula: Callable[[Tensor], Tensor], tolerance: dict[str, float] = CLOSE
) -> None:
    """A cell's outputs, and the gradients of its input and of every parameter, are a formula's."""
    x = given()
    weights = torch.arange(B * T * D, dtype=torch.float64).sin().view(B, T, D)
    ours, expected = cell(x)[0], formula(x)
    torch.testing.assert_close(ours, expected, **tolerance)
    wanted = [x, *cell.parameters()]
    found = torch.autograd.grad((ours * weights).sum(), wanted)
    for gradient, true in zip(
        found, torch.autograd.grad((expected * weights).sum(), wanted), strict=True
    ):
        torch.testing.assert_close(gradient, true, **tolerance)


def affine(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight.T + layer.bias


def test_rglru_is_the_papers_equations():
    """With a = sigmoid(-L), the paper's a_t is a^(8 r_t)."""
    cell = drawn("rglru", expansion=1.5)

    def formula(x: Tensor) -> Tensor:
        r, i, u = affine(x, cell.inputs).chunk(3, dim=-1)
        a = torch.sigmoid(-cell.L) ** (8 * torch.sigmoid(r))
        new = (1 - a**2).sqrt() * torch.sigmoid(i) * u
        # h_t is the sum over s <= t of a_t a_{t-1} ... a_{s+1} new_s
        h = [sum(a[:, s + 1 : t + 1].prod(1) * new[:, s] for s in range(t + 1)) for t in range(T)]
        return affine(torch.stack(h, 1), cell.outputs)

    follows(cell, formula)


def test_a_unit_of_rglru_keeps_from_9_tenths_to_999_thousandths_at_the_start():
    least = torch.exp(-8 * F.softplus(cells.find("rglru")(2000).L))
    assert 0.9 <= least.min() < 0.901 and 0.998 < least.max() <= 0.9991
    assert abs(least.mean() - 0.9495) < 0.003


def test_aaren_is_softmax_over_the_past_with_one_query_for_each_head():
    cell = drawn("aaren", heads=3)

    def formula(x: Tensor) -> Tensor:
        s, v = affine(x, cell.inputs).split([3, D], dim=-1)
        scores = s.mT[:, :, None].expand(B, 3, T, T)  # the query of every place is the same
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        h = scores.softmax(-1) @ v.unflatten(-1, (3, -1)).transpose(1, 2)
        return affine(h.transpose(1, 2).flatten(2), cell.outputs)

    follows(cell, formula)


def test_aaren_is_exact_for_large_scores_and_a_long_text():
    """Scores from -600 to 600, whose exponentials overflow float32, in 3 parts of 1,000."""
    cell = cells.find("aaren")(D, heads=2)
    with torch.no_grad():
        cell.inputs.weight[:2] *= 600
    x, state, parts = torch.randn(2, 3000, D), cell.initial_state(2), []
    for part in x.split(1000, dim=1):
        y, state = cell(part, state)
        parts.append(y)
    s, v = affine(x.double(), cell.inputs.double()).split([2, D], dim=-1)
    weights = (s - s.amax(1, keepdim=True)).exp()
    h = (weights.mT.unsqueeze(2) @ v.unflatten(-1, (2, -1)).transpose(1, 2)).squeeze(2)
    last = affine((h / weights.sum(1).unsqueeze(-1)).flatten(1), cell.outputs.double())
    torch.testing.assert_close(parts[-1][:, -1].double(), last, rtol=1e-3, atol=1e-4)
    assert all(s.isfinite().all() for s in state)


def convolved(kernel: Tensor, u: Tensor) -> Tensor:
    """sum over j of kernel_j u_{t-j}; kernel: (J, D), u: (B, T, D) -> (B, T, D)"""
    terms = [sum(k * u[:, t - j] for j, k in enumerate(kernel) if j <= t) for t in range(T)]
    return torch.stack(terms, 1)


def held(ssm: nn.Module, u: Tensor) -> Tensor:
    """A diagonal state space model whose input is constant between two characters, by the matrix
    exponential of its equation dh/dt = A h + u as one of real numbers, and its impulse response."""
    N = ssm.states
    rate, w = (-ssm.log_rate.exp()).view(D, N), ssm.frequency.view(D, N)
    zero, one = torch.zeros_like(rate), torch.ones_like(rate)
    rows = [[rate, -w, one], [w, rate, zero], [zero, zero, zero]]
    equation = torch.stack([torch.stack(row, -1) for row in rows], -2)  # d/dt of (Re h, Im h, u)
    moved = torch.linalg.matrix_exp(equation * ssm.log_dt.exp()[:, None, None, None])
    h, kernel = moved[..., :2, 2:], []
    c, c_i = ssm.C.chunk(2, dim=-1)
    for _ in range(T):
        kernel.append(2 * (c * h[..., 0, 0] - c_i * h[..., 1, 0]).sum(-1))
        h = moved[..., :2, :2] @ h
    return convolved(torch.stack(kernel), u) + ssm.skip * u


def test_s4d_is_the_convolution_with_its_impulse_response():
    cell = drawn("s4d", states=3, frequencies="inv")
    follows(cell, lambda x: F.glu(affine(F.gelu(held(cell.ssm, x)), cell.outputs), -1))


@pytest.mark.parametrize("name", ["s4d", "h3"])
def test_without_input_a_complex_state_keeps_the_share_that_its_cell_states(name):
    cell = drawn(name, states=3)
    ssm, state = cell.ssm, tuple(torch.randn(B, 3 * D).double() for _ in range(2))
    own = cell.initial_state(B)[:-2] + state
    share = cell.kept(given()[:, 0], own)["h"]
    after = torch.complex(*ssm.step(torch.zeros(B, D).double(), state)[1])
    torch.testing.assert_close(after.abs(), share * torch.complex(*state).abs(), **CLOSE)


PUBLISHED = {
    "lin": [0, math.pi, 2 * math.pi, 3 * math.pi],
    "inv": [56 / math.pi, 40 / 3 / math.pi, 24 / 5 / math.pi, 8 / 7 / math.pi],
}


@pytest.mark.parametrize("frequencies", PUBLISHED)
def test_s4d_starts_as_published(frequencies):
    """4 complex numbers stand for 8."""
    ssm = cells.find("s4d")(500, states=4, frequencies=frequencies).ssm
    expected = torch.tensor(PUBLISHED[frequencies]).repeat(500)
    torch.testing.assert_close(ssm.frequency.data, expected)
    assert (ssm.log_rate.exp() - 0.5).abs().max() < 1e-6
    dt = ssm.log_dt.exp()
    assert 0.00099 < dt.min() < 0.0012 and 0.085 < dt.max() < 0.1001


def test_h3_multiplies_a_shifted_key_a_value_and_a_query():
    cell = drawn("h3", states=3, kernel=5)

    def formula(x: Tensor) -> Tensor:
        q, k, v = affine(x, cell.inputs).chunk(3, dim=-1)
        shifted = convolved(cell.shift.weight[:, 0].flip(1).T, k) + cell.shift.bias
        return affine(q * held(cell.ssm, shifted * v), cell.outputs)

    follows(cell, formula)


def test_hyena_is_a_convolution_with_the_filter_that_its_network_writes():
    W = 9  # shorter than the text
    cell = drawn("hyena", context=W, kernel=3)

    def formula(x: Tensor) -> Tensor:
        weight = cell.conv.weight[:, 0].flip(1).T
        q, k, v = (convolved(weight, affine(x, cell.inputs)) + cell.conv.bias).chunk(3, dim=-1)
        filters = []
        for j in range(W):
            angles = 2 * torch.pi * j / W * torch.arange(16).double()
            f = torch.cat([torch.full_like(angles[:1], j / W), angles.cos(), angles.sin()])
            first, second, last = cell.network
            f = affine(torch.sin(10 * affine(torch.sin(10 * affine(f, first)), second)), last)
            ends = math.log(100) / 1.5, math.log(100) / 0.3
            rates = torch.linspace(*ends, D, dtype=torch.float64)
            filters.append(f * torch.exp(-rates * j / W))
        z = k * v
        return affine(q * (convolved(torch.stack(filters), z) + cell.skip * z), cell.outputs)

    follows(cell, formula, dict(rtol=1e-8, atol=1e-10))  # sines of large numbers lose digits


def test_tcn_is_two_dilated_convolutions_and_a_residual_at_each_level():
    cell = drawn("tcn", levels=3, kernel=2)

    def formula(x: Tensor) -> Tensor:
        y = x.mT
        for level in range(3):
            inner = y
            for conv in cell.convs[2 * level : 2 * level + 2]:
                weight = conv.taps.weight.view(D, 2, D).transpose(1, 2)
                padded = F.pad(inner, (2**level, 0))
                inner = F.conv1d(padded, weight, conv.taps.bias, dilation=2**level).relu()
            y = (y + inner).relu()
        return affine(y.mT, cell.outputs)

    follows(cell, formula)
