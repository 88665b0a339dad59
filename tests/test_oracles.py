"""The cells give the values and gradients of the field's own packages, in float64.

The packages are the extra `oracles`; without one, its tests are skipped.
"""

# B batch, T time, D width

from collections.abc import Callable

import pytest
import torch
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
