"""Each cell against its published equations, written here once more, plainly; and its options."""

# B batch, T time, D width

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from seqlm import cells
from seqlm.errors import InputError, UsageError

B, T, D = 2, 12, 5
sigmoid = torch.sigmoid


def double(name, **options):
    cell = cells.find(name)(D, **options).double()
    # away from the initial values, so that a bias of 0 or a w of 0 hides nothing
    with torch.no_grad():
        for p in cell.parameters():
            p += 0.3 * torch.randn_like(p)
    return cell


@pytest.fixture
def x():
    return torch.randn(B, T, D, dtype=torch.float64)


def g(u):
    """The paper's positive candidate, in its log form: log g = log(relu(u) + 1/2) or -sp(-u)."""
    return torch.where(u >= 0, torch.log(F.relu(u) + 0.5), -F.softplus(-u)).exp()


@pytest.mark.parametrize("candidate, activation", [("positive", g), ("linear", lambda u: u)])
def test_mingru_is_the_papers(x, candidate, activation):
    cell = double("mingru", candidate=candidate, expansion=2.0)
    k, u = F.linear(x, cell.inputs.weight, cell.inputs.bias).chunk(2, -1)
    h, outputs = torch.zeros(B, 2 * D, dtype=torch.float64), []
    for t in range(T):
        z = sigmoid(k[:, t])
        h = (1 - z) * h + z * activation(u[:, t])
        outputs.append(cell.outputs(h))
    torch.testing.assert_close(cell(x)[0], torch.stack(outputs, 1))


@pytest.mark.parametrize("normalize", [True, False])
def test_minlstm_is_the_papers(x, normalize):
    cell = double("minlstm", normalize=normalize)
    k_f, k_i, u = F.linear(x, cell.inputs.weight, cell.inputs.bias).chunk(3, -1)
    h, outputs = torch.zeros(B, D, dtype=torch.float64), []
    for t in range(T):
        f, i = sigmoid(k_f[:, t]), sigmoid(k_i[:, t])
        if normalize:
            f, i = f / (f + i), i / (f + i)
        h = f * h + i * g(u[:, t])
        outputs.append(cell.outputs(h))
    torch.testing.assert_close(cell(x)[0], torch.stack(outputs, 1))


def test_minlstm_is_finite_where_both_gates_underflow():
    """f / (f + i) would be 0 / 0 in half precision below -17."""
    cell = cells.find("minlstm")(D).to(torch.bfloat16)
    with torch.no_grad():
        cell.inputs.weight.zero_()
        cell.inputs.bias[: 2 * D] = -120.0
    y, (h,) = cell(torch.randn(B, T, D, dtype=torch.bfloat16))
    assert y.isfinite().all() and (h > 0).all()


@pytest.mark.parametrize(
    "name, options, added",
    [
        ("minlstm", {"forget_bias": 2.0}, (2, 0, 0)),
        ("minlstm", {"forget_bias": 4.0, "input_bias": -3.0}, (4, -3, 0)),
        ("mingru", {"forget_bias": 4.0}, (-4, 0)),
    ],
)
def test_a_cell_forgets_less_with_a_forget_bias(name, options, added):
    torch.manual_seed(1)
    plain = cells.find(name)(D)
    torch.manual_seed(1)
    biased = cells.find(name)(D, **options)
    more = torch.tensor(added).repeat_interleave(D).float()
    torch.testing.assert_close(biased.inputs.bias, plain.inputs.bias + more)
    x, state = torch.zeros(1, T, D), (torch.full((1, D), 9.0),)
    assert (biased(x, state)[1][0] > plain(x, state)[1][0]).all()


@pytest.mark.parametrize("name", ["mingru", "minlstm"])
def test_the_carried_state_is_the_state_and_not_its_activation(name):
    """A public implementation applies g twice when minLSTM is continued: 0.809 for 0.655."""
    cell = double(name)
    x, h0 = torch.randn(1, 2, D, dtype=torch.float64), torch.full((1, D), 0.7).double()
    _, (middle,) = cell(x[:, :1], (h0,))
    _, (two_parts,) = cell(x[:, 1:], (middle,))
    torch.testing.assert_close(two_parts, cell(x, (h0,))[1][0])


@pytest.mark.parametrize("dt", [1.0, 0.3])
def test_lem_is_the_papers(x, dt):
    cell = double("lem", dt=dt)
    V, b = cell.inputs.weight.chunk(4), cell.inputs.bias.chunk(4)
    W1, W2, Wz = cell.from_y.weight.chunk(3)
    y = z = torch.zeros(B, D, dtype=torch.float64)
    outputs = []
    for t in range(T):
        u = x[:, t]
        step_z = dt * sigmoid(y @ W1.T + u @ V[0].T + b[0])
        step_y = dt * sigmoid(y @ W2.T + u @ V[1].T + b[1])
        z = (1 - step_z) * z + step_z * torch.tanh(y @ Wz.T + u @ V[2].T + b[2])
        y = (1 - step_y) * y + step_y * torch.tanh(z @ cell.from_z.weight.T + u @ V[3].T + b[3])
        outputs.append(y)
    torch.testing.assert_close(cell(x)[0], torch.stack(outputs, 1))


def test_lem_has_the_equations_parameters_and_range():
    """4 D (D + D + 1), as an LSTM with one bias; the authors' code has 4 D more."""
    cell = cells.find("lem")(D)
    assert sum(p.numel() for p in cell.parameters()) == 4 * D * (D + D + 1)
    assert all(p.abs().max() <= D**-0.5 for p in cell.parameters())
    y, end = cell(30 * torch.randn(B, 200, D))
    assert all(s.abs().max() <= 1 for s in (y, *end))


def heads(cell, p, count):
    return F.linear(p, cell.heads.weight, cell.heads.bias).chunk(count, -1)


@pytest.mark.parametrize("mode", ["default", "no_gate", "pure"])
@pytest.mark.parametrize("layers", [1, 2])
def test_cfc_is_the_papers(x, mode, layers):
    tau = 0.7
    cell = double("cfc", mode=mode, backbone_layers=layers, backbone_units=7, timespan=tau)
    first = torch.cat([cell.from_x.weight, cell.from_h.weight], 1)  # one layer over [x, h]
    h, outputs = torch.zeros(B, D, dtype=torch.float64), []
    for t in range(T):
        p = F.linear(torch.cat([x[:, t], h], 1), first, cell.from_x.bias)
        p = 1.7159 * torch.tanh(0.666 * p)
        for layer in cell.backbone:
            p = 1.7159 * torch.tanh(0.666 * layer(p))
        if mode == "pure":
            (f,) = heads(cell, p, 1)
            h = -cell.A * torch.exp(-tau * (cell.w.abs() + f.abs())) * f + cell.A
        else:
            f1, f2, ta, tb = heads(cell, p, 4)
            s = sigmoid(ta * tau + tb)
            keep = 1.0 if mode == "no_gate" else 1 - s
            h = torch.tanh(f1) * keep + s * torch.tanh(f2)
        outputs.append(h)
    torch.testing.assert_close(cell(x)[0], torch.stack(outputs, 1))


def test_cfc_with_mixed_memory_puts_an_lstm_in_front(x):
    cell, same = double("cfc", mixed_memory=True), double("cfc")
    same.load_state_dict(cell.state_dict(), strict=False)
    lstm = torch.nn.LSTMCell(D, D).double()
    with torch.no_grad():
        # ours: new, i, f, o, and 1 added to the forget gate; torch's: i, f, new, o
        order = [1, 2, 0, 3]
        lstm.weight_ih.copy_(torch.cat([cell.lstm_x.weight.chunk(4)[i] for i in order]))
        lstm.weight_hh.copy_(torch.cat([cell.lstm_h.weight.chunk(4)[i] for i in order]))
        lstm.bias_ih.copy_(torch.cat([cell.lstm_x.bias.chunk(4)[i] for i in order]))
        lstm.bias_hh.copy_(torch.cat([torch.full((D,), float(i == 2)) for i in order]))
    h = c = torch.zeros(B, D, dtype=torch.float64)
    outputs = []
    for t in range(T):
        h, c = lstm(x[:, t], (h, c))
        (h,) = same.step(x[:, t], (h,))[1]
        outputs.append(h)
    torch.testing.assert_close(cell(x)[0], torch.stack(outputs, 1))


def test_cfc_starts_as_published():
    """Xavier over the whole layer [x, h] and over each head; A = 1, not drawn over as a matrix."""
    cell = cells.find("cfc")(64, mode="pure", backbone_units=96)
    bound = math.sqrt(6 / (128 + 96))
    for weight in (cell.from_x.weight, cell.from_h.weight):
        assert 0.95 * bound < weight.abs().max() <= bound
    assert torch.equal(cell.A, torch.ones(64))
    four = cells.find("cfc")(64, backbone_units=96)
    bound = math.sqrt(6 / (96 + 64))
    assert 0.95 * bound < four.heads.weight.abs().max() <= bound


def test_the_names_are_the_files():
    ours, baselines = {"cfc", "lem", "mingru", "minlstm"}, {"gru", "lstm", "indrnn", "cornn"}
    gated, matrices = {"mogrifier", "slstm", "ltc"}, {"gla", "mlstm", "deltanet"}
    others = {"mamba", "attention", "rglru", "aaren", "s4d", "h3", "hyena", "tcn", "none"}
    assert cells.names() == sorted({*ours, *baselines, *gated, *matrices, *others})


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("mingruu", {}, "Unknown cell 'mingruu'. Did you mean 'mingru'"),
        ("lem", {"dtt": 1.0}, "Unknown option of lem 'dtt'. Did you mean 'dt'"),
        ("mingru", {"dt": 1.0}, "Unknown option of mingru 'dt'"),
        ("mingru,lem", {"expansion": 2.0}, "Unknown option of lem 'expansion'"),
        ("mingru", {"lem": {"dt": 1.0}}, "cell.lem is set, but lem is not in the stack 'mingru'"),
        ("mingru", {"candidate": "odd"}, "cell.mingru.candidate is 'odd'; it must be one of: pos"),
        ("lem", {"dt": "fast"}, "cell.lem.dt is 'fast'; it must be a number"),
        ("minlstm", {"normalize": 1}, "cell.minlstm.normalize is 1; it must be true or false"),
    ],
)
def test_an_option_that_cannot_be_is_refused(name, given, message):
    with pytest.raises(UsageError) as error:
        cells.resolved_options(name, given)
    assert message in str(error.value)


def test_two_cells_of_a_stack_cannot_have_one_name(tmp_path):
    own = tmp_path / "mingru.py"
    own.write_text("from seqlm.cells.mingru import MinGRU\n\n\nclass Own(MinGRU):\n    pass\n")
    with pytest.raises(UsageError, match="has two cells called mingru. Rename the file"):
        cells.resolved_options(f"mingru,{own}", {})


@pytest.mark.parametrize(
    "name, options",
    [
        ("lem", {"dt": 0.0}),
        ("lem", {"dt": 1.5}),
        ("mingru", {"expansion": 0.0}),
        ("minlstm", {"expansion": -1.0}),
        ("cfc", {"backbone_units": 0}),
        ("cfc", {"backbone_layers": 0}),
        ("cfc", {"timespan": 0.0}),
        ("rglru", {"expansion": 65.0}),
        ("aaren", {"heads": D + 1}),
        ("aaren", {"heads": -1}),
        ("s4d", {"states": 0}),
        ("h3", {"states": 1025}),
        ("h3", {"kernel": 65}),
        ("hyena", {"context": 4097}),
        ("hyena", {"kernel": 0}),
        ("tcn", {"levels": 11}),
        ("tcn", {"kernel": 1}),
    ],
)
def test_an_option_out_of_range_is_refused_by_its_name(name, options):
    with pytest.raises(UsageError, match=f"cell.{next(iter(options))} is .*; it must be "):
        cells.find(name)(D, **options)


def test_options_are_complete_and_one_cells_own_wins():
    given = {"expansion": 2.0, "minlstm": {"expansion": 3.0}}
    found = cells.resolved_options("minlstm,mingru,minlstm", given)
    assert found["mingru"] == {"forget_bias": 0.0, "candidate": "positive", "expansion": 2.0}
    assert found["minlstm"]["expansion"] == 3.0 and len(found["minlstm"]) == 5


OWN = """
from torch import nn
from seqlm.cells import Recurrence

class Leaky(Recurrence):
    '''h' = rate h + (1 - rate) tanh(W x).'''

    def __init__(self, width: int, *, rate: float = 0.9):
        super().__init__()
        self.rate, self.width, self.inputs = rate, width, nn.Linear(width, width)

    def initial_state(self, batch):
        return (self.zeros(batch, self.width),)

    def project(self, x):
        return self.inputs(x).tanh()

    def recur(self, drive, state):
        h = self.rate * state[0] + (1 - self.rate) * drive
        return h, (h,)
"""


def test_a_researchers_own_file_is_a_cell(tmp_path):
    (tmp_path / "leaky.py").write_text(OWN)
    from seqlm.model import LanguageModel

    name = str(tmp_path / "leaky.py")
    model = LanguageModel(
        9, width=8, layers=3, cell=f"mingru,{name}", cell_options={"leaky": {"rate": 0.5}}
    )
    assert model.blocks[1].cell.rate == 0.5
    assert model(torch.zeros(2, 7, dtype=torch.long))[0].shape == (2, 7, 9)


def test_a_file_that_is_no_cell_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing.py does not exist"):
        cells.find("./nothing.py")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(InputError, match="broken.py cannot be imported: ModuleNotFoundError"):
        cells.find(str(tmp_path / "broken.py"))
    (tmp_path / "exits.py").write_text("raise SystemExit(5)")
    with pytest.raises(InputError, match="exits.py cannot be imported: SystemExit: 5"):
        cells.find(str(tmp_path / "exits.py"))
    (tmp_path / "name.py").write_text(OWN)
    with pytest.raises(UsageError, match="cannot be called name.py"):
        cells.resolved_options(str(tmp_path / "name.py"), {})
    (tmp_path / "needs.py").write_text(OWN.replace("rate: float = 0.9", "rate: float"))
    with pytest.raises(UsageError, match="cell.needs.rate has no default"):
        cells.resolved_options(str(tmp_path / "needs.py"), {})
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(InputError, match="defines 0 cells. A cell's file defines one subclass"):
        cells.find(str(tmp_path / "empty.py"))


def own(folder, text=OWN, name="leaky"):
    """The path of a cell file with this text."""
    (folder / f"{name}.py").write_text(text)
    return str(folder / f"{name}.py")


@pytest.mark.parametrize(
    "signature, given, value",
    [
        ("rate=0.9", {}, 0.9),
        ("rate=0.9", {"rate": 1}, 1.0),
        ("rate: 'float' = 0.9", {"rate": 0.5}, 0.5),
        ("rate: Literal[1, 2] = 1", {"rate": 2}, 2),
        ("rate: float = 1", {}, 1.0),
    ],
)
@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
def test_an_option_has_its_type_by_annotation_or_default(tmp_path, future, signature, given, value):
    """Without annotation this was a KeyError, and with one as text a TypeError."""
    text = future + "from typing import Literal\n" + OWN.replace("rate: float = 0.9", signature)
    found = cells.resolved_options(own(tmp_path, text), given)["leaky"]["rate"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "signature, given, error, message",
    [
        ("rate=0.9", {"rate": "fast"}, UsageError, "cell.leaky.rate is 'fast'; it must be a num"),
        ("rate: Literal[1, 2] = 1", {"rate": 3}, UsageError, "rate is 3; it must be one of: 1, 2"),
        ("rate: Literal[1, 2] = 1", {"rate": True}, UsageError, "rate is True; it must be one of"),
        ("rate: Literal[1, 2] = 1", {"rate": [1]}, UsageError, "is [1]; it must be one of: 1, 2"),
        ("rate: float | None = None", {}, InputError, "The option rate of Leaky is of the type fl"),
        ("rate: list = ()", {}, InputError, "is of the type list. Make it int, float, bool, str"),
        ("rate=None", {}, InputError, "of the type NoneType. Make it int, float, bool, str or"),
        ("rate: 'Tensor' = 0.9", {}, InputError, "name 'Tensor' is not defined. Make it int, fl"),
        ("rate", {}, InputError, "has neither a type nor a default. Write it as rate: float = 1"),
        ("rate: int = 0.9", {}, InputError, "its default is 0.9; it must be a whole number"),
    ],
)
def test_an_own_option_that_cannot_be_is_refused(tmp_path, signature, given, error, message):
    path = own(
        tmp_path, "from typing import Literal\n" + OWN.replace("rate: float = 0.9", signature)
    )
    with pytest.raises(error) as raised:
        cells.resolved_options(path, given)
    assert message in str(raised.value)


def test_an_annotation_beside_the_options_may_name_what_only_a_type_checker_knows(tmp_path):
    text = OWN.replace("width: int,", "width: 'Width',")
    assert cells.resolved_options(own(tmp_path, text), {}) == {"leaky": {"rate": 0.9}}


def test_a_cell_file_runs_once_for_all_layers_and_again_when_it_has_changed(tmp_path, capsys):
    from seqlm.model import LanguageModel

    path = own(tmp_path, OWN + "\nprint('runs')\n")
    model = LanguageModel(9, width=8, layers=3, cell=path)
    assert len({type(block.cell) for block in model.blocks}) == 1
    assert capsys.readouterr().out == "runs\n"
    # the same size in the same second, by which Python knows its bytecode
    own(tmp_path, OWN.replace("0.9", "0.8"))
    assert cells.resolved_options(path, {})["leaky"]["rate"] == 0.8
    assert not (tmp_path / "__pycache__").exists()


def test_a_cell_file_may_hold_dataclasses_a_base_class_and_import_a_file_beside_it(tmp_path):
    """@dataclass looks its module up in sys.modules; the folder is importable only meanwhile."""
    before = [*sys.path]
    for folder, rate in (("a", 0.25), ("b", 0.75)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "beside.py").write_text(f"RATE = {rate}\n")
        text = "from __future__ import annotations\nfrom dataclasses import dataclass, KW_ONLY\n"
        text += "from beside import RATE\n" + OWN.replace("0.9", "RATE")
        text += "\n@dataclass\nclass Setting:\n    x: int\n    _: KW_ONLY\n    y: int = 2\n"
        path = own(tmp_path / folder, text + "\nclass Slow(Leaky):\n    pass\n\nAlias = Slow\n")
        assert cells.find(path).__name__ == "Slow"
        assert cells.resolved_options(path, {})["leaky"]["rate"] == rate
        assert sys.path == before and "beside" not in sys.modules


def test_a_file_with_two_cells_is_refused_by_their_names(tmp_path):
    text = OWN + "\nclass Slow(Leaky):\n    pass\n\nclass Fast(Leaky):\n    pass\n"
    with pytest.raises(InputError, match="leaky.py defines 2 cells: Slow, Fast. A cell's file def"):
        cells.find(own(tmp_path, text))


def test_a_cell_file_that_raises_leaves_nothing(tmp_path):
    path, before = own(tmp_path, "raise ValueError('no')"), {*sys.modules}
    for _ in range(2):
        with pytest.raises(InputError, match="leaky.py cannot be imported: ValueError: no"):
            cells.find(path)
    assert not any(name.startswith("seqlm_cell_leaky") for name in sys.modules.keys() - before)
    own(tmp_path, "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        cells.find(path)
