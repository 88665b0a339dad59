"""Muon: what it makes of a matrix, which weights it trains, and how processes share it."""

import numpy as np
import pytest
import torch
from torch import nn

from seqlm.config import Config
from seqlm.model import LanguageModel
from seqlm.training import optimizer, parallel
from seqlm.training.optimizer import (
    POLYNOMIALS,
    SMALLEST,
    Muon,
    hidden_matrices,
    make_optimizers,
    orthogonal,
)


def spread(outputs, inputs):
    """A matrix whose singular values fall from 1 to SMALLEST."""
    k = min(outputs, inputs)
    u, v = (torch.linalg.qr(torch.randn(n, k, dtype=torch.float64))[0] for n in (outputs, inputs))
    return u * torch.logspace(0, np.log10(SMALLEST), k, dtype=torch.float64) @ v.T


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_a_change_has_the_singular_vectors_of_the_momentum_and_singular_values_near_1(shape):
    x = spread(*shape)
    y = orthogonal(x[None])[0]
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    values = u.T @ y @ v.T
    assert (values.diag() - 1).abs().max() < 0.13
    assert (values - values.diag().diag()).abs().max() < 1e-9


def test_in_bfloat16_the_singular_values_stay_near_1():
    values = torch.linalg.svdvals(orthogonal(spread(24, 16)[None].bfloat16()).float())
    assert values.max() < 1.5 and values.median() > 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [-50, -33, -27, -20, 20, 33, 50])
def test_a_change_does_not_depend_on_the_size_of_the_gradient(dtype, power):
    x = torch.randn(1, 24, 16).to(dtype)
    assert torch.equal(orthogonal(x * 2.0**power), orthogonal(x))


def test_a_matrix_without_gradient_does_not_move():
    assert not orthogonal(torch.zeros(2, 3, 4)).any()


def best_polynomial(low, high):
    """a, b, c of the polynomial a s + b s^3 + c s^5 nearest to 1 on the interval (Remez)."""
    s = np.linspace(low, high, 4)
    while True:
        *abc, error = np.linalg.solve(np.stack([s, s**3, s**5, [1, -1, 1, -1]], 1), np.ones(4))
        turns = np.sort(np.sqrt(np.roots([5 * abc[2], 3 * abc[1], abc[0]])))
        if np.allclose(turns, s[1:3], rtol=1e-6):
            return abc, abs(error)
        s = np.array([low, *turns, high])


def test_each_polynomial_is_the_best_for_what_the_one_before_it_leaves():
    low, high = SMALLEST, 1.0
    for row in POLYNOMIALS:
        best, error = best_polynomial(low, high)
        assert row == pytest.approx(best, abs=1e-4)
        low, high = 1 - error, 1 + error
    assert error < 0.12


def test_matrices_that_share_a_weight_are_changed_one_by_one():
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(12, 5))
    parts = [nn.Parameter(part.clone()) for part in whole.detach().chunk(3)]
    whole.grad = torch.randn(12, 5)
    for part, gradient in zip(parts, whole.grad.chunk(3), strict=True):
        part.grad = gradient.clone()
    for muon in (Muon({whole: 3}, 0.1, 0.1), Muon(dict.fromkeys(parts, 1), 0.1, 0.1)):
        for _ in range(2):
            muon.step()
    torch.testing.assert_close(whole, torch.cat(parts))


def test_a_step_decays_the_weight_and_moves_it_by_the_rate():
    weight = nn.Parameter(torch.eye(4))
    weight.grad = -torch.eye(4)
    Muon({weight: 1}, lr=0.1, weight_decay=0.5).step()
    scale = orthogonal(torch.eye(4)[None])[0, 0, 0]
    torch.testing.assert_close(weight.data, torch.eye(4) * (0.95 + 0.1 * scale))


@pytest.mark.parametrize("cell", ["mingru", "minlstm", "lem", "cfc", "lstm", "mamba", "attention"])
def test_muon_trains_the_linear_layers_of_the_blocks_and_adamw_all_else(cell):
    model = LanguageModel(9, width=8, layers=1, cell=cell, conv=3)
    config = Config().updated({"optim.name": "muon", "optim.lr": 0.02, "optim.adam_lr": 0.003})
    muon, adamw = make_optimizers(model, config)
    assert (muon.defaults["lr"], adamw.defaults["lr"]) == (0.02, 0.003)
    names = {weight: name for name, weight in model.named_parameters()}
    ours = {names[w] for w in muon.param_groups[0]["params"]}
    theirs = {names[w] for group in adamw.param_groups for w in group["params"]}
    assert ours | theirs == {*names.values()} and not ours & theirs
    assert "embedding.weight" in theirs and "head.weight" in theirs
    assert all(name.startswith("blocks") and name.endswith("weight") for name in ours)
    assert {"blocks.0.mlp.inputs.weight", "blocks.0.cell.inputs.weight"} & ours
    _, usual = make_optimizers(model, config.updated({"optim.adam_lr": 0.0}))
    assert usual.defaults["lr"] == 0.002, "a tenth of Muon's"
    assert all(len(w) % parts == 0 for w, parts in hidden_matrices(model).items())


def test_momentum_decays_by_the_factor_that_is_set():
    model = LanguageModel(9, width=8, layers=1)
    config = Config().updated({"optim.name": "muon", "optim.momentum": 0.75})
    muon, _ = make_optimizers(model, config)
    weight = muon.param_groups[0]["params"][0]
    for gradient in (1.0, 0.0):
        weight.grad = torch.full_like(weight, gradient)
        muon.step()
    expected = torch.full_like(weight, 0.25 * 0.75)
    torch.testing.assert_close(muon.state[weight]["momentum"], expected)


def test_the_second_moment_forgets_by_symbols_whatever_the_batch():
    model = LanguageModel(9, width=8, layers=1)
    for batch in (1, 4):
        config = Config().updated(
            {"train.batch": batch, "train.length": 32, "optim.half_life": 256}
        )
        (adamw,) = make_optimizers(model, config)
        assert adamw.defaults["betas"][1] ** (8 / batch) == pytest.approx(0.5)


def test_processes_share_the_matrices_and_take_the_same_step(monkeypatch):
    """Each of two processes computes half of the changes; their sum is that of one process."""
    torch.manual_seed(0)
    directions = list(torch.randn(3, 5, 4))
    muon = Muon({nn.Parameter(torch.zeros(5, 4)): 1}, 0.1, 0.0)
    whole = muon._change(directions)
    monkeypatch.setattr(optimizer.parallel, "world", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append(muon._change(directions))
    assert all((share == 0).flatten(1).all(1).sum() in (1, 2) for share in shares)
    torch.testing.assert_close(sum(shares), whole)
