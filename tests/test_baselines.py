"""The baselines are what they are named after: torch's own modules, or published equations."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import start
from torch import nn
from torch.autograd import grad

from seqlm import cells
from seqlm.errors import UsageError
from seqlm.model import LanguageModel

B, T, D = 3, 37, 12


def compare(cell, ours, x, theirs, reference):
    """Outputs, and gradients of the input and of parameters given in pairs."""
    weights = torch.arange(B * T * D, dtype=torch.float64).sin().view(B, T, D)
    y, expected = cell(x)[0], reference(x)
    found = grad((y * weights).sum(), [x, *ours])
    true = grad((expected * weights).sum(), [x, *theirs])
    for a, b in zip([y, *found], [expected, *true], strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


def given():
    return torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name, module", [("gru", nn.GRU), ("lstm", nn.LSTM)])
@pytest.mark.parametrize("form", ["sequence", "steps"])
def test_gru_and_lstm_are_torchs(name, module, form):
    cell, torchs = cells.find(name)(D).double(), module(D, D, batch_first=True).double()
    ours = [cell.inputs.weight, cell.from_h.weight, cell.inputs.bias, cell.from_h.bias]
    theirs = list(torchs.parameters())
    with torch.no_grad():
        for own, true in zip(ours, theirs, strict=True):
            true.copy_(own)
    if form == "steps":
        cell.forward = lambda x: super(type(cell).__base__, cell).forward(x)  # the fold of recur
    compare(cell, ours, given(), theirs, lambda x: torchs(x)[0])


def test_indrnn_is_its_equation():
    cell = cells.find("indrnn")(D).double()

    def loop(x):
        h, outputs = torch.zeros(B, D, dtype=x.dtype), []
        for at_t in x.unbind(1):
            h = (at_t @ cell.inputs.weight.T + cell.inputs.bias + cell.u * h).clamp(min=0)
            outputs.append(h)
        return torch.stack(outputs, 1)

    own = list(cell.parameters())
    compare(cell, own, given(), own, loop)


def test_indrnns_weights_stay_within_their_bound_and_go_on_learning(corpus):
    """The clamp of a weight past its bound had no gradient, so that it stayed there for ever."""
    trainer = start(corpus, "wide", cell__name="indrnn", cell__bound=0.3, optim__lr=0.1).trainer
    cell, weights = trainer.model.blocks[0].cell, []
    with torch.no_grad():
        cell.u.fill_(0.3)
    for _ in range(12):
        trainer.step(0.1)
        assert cell.u.grad.ne(0).any()
        weights.append(cell.u.detach().clone())
    found = torch.stack(weights)
    assert found.abs().max() == torch.tensor(0.3)
    at_bound = found == 0.3
    assert (at_bound[:-1] & ~at_bound[1:]).any()  # brought back, and then learned to be smaller


def test_indrnns_loaded_weights_are_brought_within_their_bound():
    cell = cells.find("indrnn")(2, bound=0.5)
    cell.load_state_dict({**cell.state_dict(), "u": torch.tensor([3.0, -0.25])})
    assert cell.u.tolist() == [0.5, -0.25]


def test_cornn_is_its_equations():
    cell = cells.find("cornn")(D, dt=0.2, gamma=2.7, epsilon=4.7).double()
    W, Z = cell.from_state.weight.split(D, dim=1)

    def loop(x):
        y = z = torch.zeros(B, D, dtype=x.dtype)
        outputs = []
        for at_t in x.unbind(1):
            force = y @ W.T + z @ Z.T + at_t @ cell.inputs.weight.T + cell.inputs.bias
            z = z + 0.2 * (force.tanh() - 2.7 * y - 4.7 * z)
            y = y + 0.2 * z
            outputs.append(y)
        return torch.stack(outputs, 1)

    own = list(cell.parameters())
    compare(cell, own, given(), own, loop)


def steps(x, states, step):
    """The outputs of a step (x_t, *states) -> states, whose first state is the output."""
    outputs = []
    for at_t in x.unbind(1):
        states = step(at_t, *states)
        outputs.append(states[0])
    return torch.stack(outputs, 1)


def zeros(count):
    return [torch.zeros(B, D, dtype=torch.float64)] * count


@pytest.mark.parametrize("options", [{}, {"rounds": 2, "rank": 3}, {"rounds": 0}], ids=str)
def test_mogrifier_is_its_equations(options):
    cell = cells.find("mogrifier")(D, **options).double()
    W, b, U = cell.inputs.weight, cell.inputs.bias, cell.from_h.weight
    low = "rank" in options
    gates = [m[1].weight @ m[0].weight if low else m.weight for m in cell.rounds]
    Q, R = gates[::2], gates[1::2]

    def step(x, h, c):
        for i in range(len(Q)):
            x = 2 * torch.sigmoid(h @ Q[i].T) * x
            if i < len(R):
                h = 2 * torch.sigmoid(x @ R[i].T) * h
        i, f, g, o = (x @ W.T + b + h @ U.T).split(D, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    own = list(cell.parameters())
    compare(cell, own, given(), own, lambda x: steps(x, zeros(2), step))


def test_slstm_is_its_equations_without_their_stabiliser():
    cell = cells.find("slstm")(D, heads=3).double()
    with torch.no_grad():
        cell.norm += torch.rand_like(cell.norm)

    def step(x, h, c, n):
        drive = (x @ cell.inputs.weight.T + cell.inputs.bias).view(B, 3, 4, 4)
        mixed = torch.einsum("bhs,hsk->bhk", h.view(B, 3, 4), cell.from_h).view(B, 3, 4, 4)
        i, f, z, o = ((drive + mixed)[:, :, gate].flatten(1) for gate in range(4))
        c = torch.sigmoid(f) * c + i.exp() * torch.tanh(z)
        n = torch.sigmoid(f) * n + i.exp()
        return torch.sigmoid(o) * c / n, c, n

    def loop(x):
        h = steps(x, zeros(3), step).flatten(0, 1)
        return F.group_norm(h, 3, cell.norm).view(B, T, D)

    own = list(cell.parameters())
    compare(cell, own, given(), own, loop)


def test_slstms_state_stays_bounded_whatever_its_gates_say():
    """c / n is a mean of tanh, n at least 1 and at most the number of steps, and m follows i."""
    cell = cells.find("slstm")(4, heads=2)
    with torch.no_grad():
        cell.inputs.bias.view(2, 4, 2)[:, 1] = 30  # nothing is forgotten
    state = cell.initial_state(2)
    scale = torch.tensor([1.0, 1000.0])[:, None]
    with torch.no_grad():
        for _ in range(300):
            drive = cell.project(scale * torch.randn(2, 4))
            y, state = cell.recur(drive, state)
            _, c, n, m = state
            assert (c.abs() <= n * 1.00001).all() and ((n >= 1) & (n <= 300)).all()
            assert (y.abs() <= 1).all() and m.isfinite().all()


def test_slstm_keeps_the_share_that_it_states():
    cell = cells.find("slstm")(D).double()
    x, state = torch.randn(B, D, dtype=torch.float64), [torch.rand(B, D).double() for _ in "hcnm"]
    share = cell.kept(x, state)["c/n"]
    other = [state[0], state[1] + 0.5 * state[2], *state[2:]]  # c / n + 0.5
    means = [c / n for _, c, n, _ in (cell.step(x, s)[1] for s in (other, state))]
    torch.testing.assert_close(means[0] - means[1], 0.5 * share)


@pytest.mark.parametrize("unfolds", [1, 3])
def test_ltc_is_its_equation_by_the_fused_solver(unfolds):
    cell = cells.find("ltc")(D, unfolds=unfolds).double()
    dt = 1 / unfolds

    def step(x, h):
        for _ in range(unfolds):
            drive = x @ cell.inputs.weight.T + cell.inputs.bias
            f = torch.sigmoid(drive + h @ cell.from_h.weight.T)
            h = (h + dt * f * cell.A) / (1 + dt * (cell.log_leak.exp() + f))
        return (h,)

    own = list(cell.parameters())
    compare(cell, own, given(), own, lambda x: steps(x, zeros(1), step))


def test_ltcs_solver_approaches_the_differential_equation():
    """With ever more unfolds, for a constant input, h comes to where dh/dt = 0."""
    cell = cells.find("ltc")(D, unfolds=64).double()
    x, h = torch.randn(1, D, dtype=torch.float64), torch.zeros(1, D, dtype=torch.float64)
    with torch.no_grad():
        cell.log_leak.fill_(1)  # fast enough for 20 characters
        for _ in range(20):
            _, (h,) = cell.step(x, (h,))
        f = torch.sigmoid(cell.project(x) + cell.from_h(h))
        slope = f * cell.A - (cell.log_leak.exp() + f) * h
    assert slope.abs().max() < 1e-6


def test_mamba_is_its_equations():
    cell = cells.find("mamba")(D, expansion=1.5, states=3, kernel=4).double()
    E, N = cell.inner, cell.states

    def loop(x):
        v, gate = (x @ cell.inputs.weight.T + cell.inputs.bias).chunk(2, dim=-1)
        padded = torch.cat([torch.zeros(B, 3, E, dtype=x.dtype), v], 1)
        h, outputs = torch.zeros(B, E, N, dtype=x.dtype), []
        for t in range(T):
            window = padded[:, t : t + 4]
            u = F.silu((window * cell.conv.weight[:, 0].T).sum(1) + cell.conv.bias)
            rank, b, c = (u @ cell.selection.weight.T).split([cell.rank, N, N], dim=1)
            d = F.softplus(rank @ cell.step_size.weight.T + cell.step_size.bias)
            A = -cell.log_A.exp().view(E, N)
            h = torch.exp(d[:, :, None] * A) * h + (d * u)[:, :, None] * b[:, None]
            y = (h * c[:, None]).sum(2) + cell.skip * u
            outputs.append(y * F.silu(gate[:, t]))
        return torch.stack(outputs, 1) @ cell.outputs.weight.T + cell.outputs.bias

    own = list(cell.parameters())
    compare(cell, own, given(), own, loop)


def normed(o, weight):
    return o / (o.square().mean(-1, keepdim=True) + torch.finfo(o.dtype).eps).sqrt() * weight


@pytest.mark.parametrize(
    "options", [{}, {"key": "tied", "heads": 3}, {"decay": "scalar", "heads": 2}], ids=str
)
def test_gla_is_its_equations(options):
    cell = cells.find("gla")(D, **options).double()
    H, K, V = cell.heads, cell.keys, cell.values
    scalar, tied = options.get("decay") == "scalar", options.get("key") == "tied"

    def loop(x):
        r, v = (x @ cell.inputs.weight.T).chunk(2, dim=-1)
        q, *k = (x @ cell.queries.weight.T).split(H * K, dim=-1)
        z = x @ cell.gates.weight.T
        if scalar:
            d = (1 + (z + cell.decays.bias).exp()).log()
            a = torch.exp(-cell.decays.log_A.exp() * d).repeat_interleave(K, -1)
            v = v * d.repeat_interleave(V, -1)
        else:
            a = torch.sigmoid(z @ cell.decays.weight.T + cell.decays.bias) ** (1 / 16)
        q, k, a, v = (y.unflatten(-1, (H, -1)) for y in (q, 1 - a if tied else k[0], a, v))
        S, outputs = torch.zeros(B, H, K, V, dtype=x.dtype), []
        for t in range(T):
            S = torch.einsum("bhk,bhkv->bhkv", a[:, t], S)
            S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
        y = normed(torch.stack(outputs, 1), cell.norm).flatten(2) * r * torch.sigmoid(r)
        return y @ cell.outputs.weight.T + cell.outputs.bias

    own = list(cell.parameters())
    compare(cell, own, given(), own, loop)


def test_deltanet_is_its_equations():
    cell = cells.find("deltanet")(D, heads=2).double()
    H, K = 2, D // 2

    def loop(x):
        r, q, k, v = (y * torch.sigmoid(y) for y in (x @ cell.inputs.weight.T).chunk(4, dim=-1))
        beta, a = (x @ cell.gates.weight.T).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (H, K)) for y in (q, k, v))
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        d = (1 + (a + cell.decay.bias).exp()).log()
        a, beta = torch.exp(-cell.decay.log_A.exp() * d), torch.sigmoid(beta)
        S, outputs = torch.zeros(B, H, K, K, dtype=x.dtype), []
        for t in range(T):
            key, rate = k[:, t, :, :, None], beta[:, t, :, None, None]
            keep = a[:, t, :, None, None] * (torch.eye(K, dtype=x.dtype) - rate * key * key.mT)
            S = keep @ S + rate * key * v[:, t, :, None]
            outputs.append((S.mT @ q[:, t, :, :, None]).squeeze(-1))
        y = normed(torch.stack(outputs, 1), cell.norm).flatten(2) * r
        return y @ cell.outputs.weight.T + cell.outputs.bias

    own = list(cell.parameters())
    compare(cell, own, given(), own, loop)


def test_mlstm_is_its_equations_without_a_stabiliser():
    cell = cells.find("mlstm")(D, heads=2).double()
    H, K = 2, D // 2
    with torch.no_grad():
        for weight in cell.gates.parameters():  # gates that differ, some inputs above and below 1
            weight += torch.randn_like(weight)

    def loop(x):
        q, k, v, r = (x @ cell.inputs.weight.T + cell.inputs.bias).chunk(4, dim=-1)
        f, i = (x @ cell.gates.weight.T + cell.gates.bias).chunk(2, dim=-1)
        f, i = torch.sigmoid(f)[..., None], i.exp()[..., None]
        q, k, v = (y.unflatten(-1, (H, -1)) for y in (q, k / math.sqrt(K), v))
        C, n = torch.zeros(B, H, K, K, dtype=x.dtype), torch.zeros(B, H, K, dtype=x.dtype)
        outputs = []
        for t in range(T):
            new = i[:, t] * k[:, t]
            n = f[:, t] * n + new
            C = f[:, t, :, :, None] * C + torch.einsum("bhk,bhv->bhkv", new, v[:, t])
            scale = (n * q[:, t]).sum(-1, keepdim=True).abs().clamp(min=1)
            outputs.append(torch.einsum("bhkv,bhk->bhv", C, q[:, t]) / scale)
        h = normed(torch.stack(outputs, 1), cell.norm).flatten(2)
        return (h * torch.sigmoid(r)) @ cell.outputs.weight.T + cell.outputs.bias

    own = list(cell.parameters())
    compare(cell, own, given(), own, loop)


def test_mlstm_is_stable_over_100_000_steps():
    """Input gates up to e^30 and forget gates near 1, in float32 and float64; a constant state."""
    cell = cells.find("mlstm")(4)
    with torch.no_grad():
        cell.gates.weight.normal_(std=5)
        cell.gates.bias[0] = 15
    x, ends = torch.randn(1, 10_000, 4), []
    for dtype in (torch.float32, torch.float64):
        cell, state = cell.to(dtype), None
        for _ in range(10):
            y, state = cell(x.to(dtype), state)
        assert [s.shape for s in state] == [(1, 1, 4, 5), (1, 1, 1)]
        assert all(s.isfinite().all() for s in state)
        ends.append(y.double())
    assert (ends[0] - ends[1]).norm() < 1e-3 * ends[1].norm()


def test_mlstm_keeps_the_share_of_its_forget_gate():
    """Of C, which the state holds divided by e^m."""
    cell, x = cells.find("mlstm")(D, heads=2).double(), torch.randn(B, D, dtype=torch.float64)
    C, m = (torch.rand_like(s) for s in cell.initial_state(B))
    after = [cell.step(x, (c, m))[1] for c in (C + 0.5, C)]
    moved = (after[0][0] - after[1][0])[..., 0, 0] * (after[1][1] - m).exp().squeeze(-1)
    torch.testing.assert_close(moved, 0.5 * cell.kept(x, (C, m))["C"])


@pytest.mark.parametrize("width, heads, inner", [(256, 4, 256), (90, 1, 90), (1, 1, 1)])
def test_heads_of_matrices_are_about_64_wide(width, heads, inner):
    cell = cells.find("gla")(width)
    assert (cell.heads, cell.heads * cell.values) == (heads, inner)
    y, (S,) = cell(torch.randn(2, 3, width))
    assert y.shape == (2, 3, width) and S.shape == (2, heads, cell.keys, cell.values)


def test_mambas_first_steps_are_between_a_thousandth_and_a_tenth():
    d = F.softplus(cells.find("mamba")(64).step_size.bias)
    assert d.min() * 1.0001 >= 1e-3 and d.max() <= 0.1001 and d.max() > 10 * d.min()


@pytest.mark.parametrize("context", [5, 16, 37, 100])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_is_softmax_over_a_window_of_turned_keys(context, heads):
    cell = cells.find("attention")(D, context=context, heads=heads).double()
    size = D // heads
    rates = 10000.0 ** (-torch.arange(size // 2, dtype=torch.float64) / (size // 2))

    def turned(x):
        """Pairs of numbers as complex ones, by the place they stand at."""
        angles = torch.arange(T, dtype=torch.float64)[:, None] * rates
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    def whole(x):
        q, k, v = (x @ cell.inputs.weight.T + cell.inputs.bias).chunk(3, dim=-1)
        outputs = []
        for i in range(heads):
            a, b, c = (y[..., i * size : (i + 1) * size] for y in (q, k, v))
            scores = turned(a) @ turned(b).mT / math.sqrt(size)
            distance = torch.arange(T)[:, None] - torch.arange(T)
            scores = scores.masked_fill((distance < 0) | (distance >= context), -torch.inf)
            outputs.append(scores.softmax(-1) @ c)
        return torch.cat(outputs, -1) @ cell.outputs.weight.T + cell.outputs.bias

    own = list(cell.parameters())
    compare(cell, own, given(), own, whole)


@pytest.mark.parametrize(
    "width, heads, inner", [(256, 4, 256), (262, 4, 264), (6, 1, 6), (1, 1, 2)]
)
def test_attentions_heads_are_about_64_wide_and_even(width, heads, inner):
    cell = cells.find("attention")(width)
    assert (cell.heads, cell.inner) == (heads, inner)
    assert cell(torch.randn(2, 3, width))[0].shape == (2, 3, width)


def test_attentions_state_grows_with_its_window_and_not_with_the_text():
    sizes = {}
    for context in (8, 16):
        cell = cells.find("attention")(D, context=context)
        for time in (3, 300):
            _, state = cell(torch.randn(1, time, D))
            sizes[context, time] = sum(s.numel() for s in state)
    assert sizes[8, 3] == sizes[8, 300] == 2 * 8 * D + 1 and sizes[16, 3] == 2 * 16 * D + 1


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("attention", {"heads": 7}, "cell.heads is 7; it must be from 1 to 6"),
        ("attention", {"context": 0}, "cell.context is 0; it must be from 1 to"),
        ("indrnn", {"bound": 1.5}, "cell.bound is 1.5; it must be above 0 and at most 1"),
        ("cornn", {"dt": 0.0}, "cell.dt is 0.0; it must be above 0"),
        ("mogrifier", {"rounds": 65}, "cell.rounds is 65; it must be from 0 to 64"),
        ("mogrifier", {"rank": 13}, "cell.rank is 13; it must be from 1 to 12, the model's"),
        ("slstm", {"heads": 5}, "cell.heads is 5; it must be from 1 to 12 and divide the model's"),
        ("ltc", {"unfolds": 0}, "cell.unfolds is 0; it must be from 1 to 64"),
        (
            "gla",
            {"heads": 13},
            "cell.heads is 13; it must be from 1 to 12, the model's width, or 0",
        ),
        (
            "gla",
            {"decay": "scalar", "key": "tied"},
            "cell.key is tied, but a scalar decay gives no",
        ),
        ("mamba", {"states": 0}, "cell.states is 0; it must be above 0 and at most 1024"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        LanguageModel(5, width=D, layers=1, cell=name, cell_options=options)
