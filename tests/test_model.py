"""The laws for the whole model, and what a model of characters must be able to do."""

# B batch, T time, V vocabulary

import math

import pytest
import torch
import torch.nn.functional as F

from seqlm import cells
from seqlm.errors import UsageError
from seqlm.model import CausalConv, LanguageModel, parameter_count

V = 11
SHAPES = [
    {},
    {"conv": 4, "activation": "swiglu"},
    {"tie": True, "mlp": 0.0},
]
STACKS = [*cells.names(), "mingru,mingru,lem"]


def make(cell, shape, **more):
    return LanguageModel(V, width=12, layers=3, cell=cell, **shape, **more).double().eval()


def close(x, y):
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)  # float64: the order of sums


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", STACKS)
def test_the_sequence_equals_its_steps_and_may_be_split_anywhere(cell, shape):
    model, tokens = make(cell, shape), torch.randint(V + 1, (2, 20))
    whole, end = model(tokens)
    left, middle = model(tokens[:, :7])
    right, end2 = model(tokens[:, 7:], middle)
    close(torch.cat([left, right], 1), whole)
    state, stepped = model.initial_state(2), []
    for token in tokens.unbind(1):
        logits, state = model.step(token, state)
        stepped.append(logits)
    close(torch.stack(stepped, 1), whole)
    for s, s2, s3 in zip(end, end2, state, strict=True):
        close(s2, s)
        close(s3, s)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", STACKS)
def test_the_future_changes_nothing_before_it(cell, shape):
    model, tokens = make(cell, shape).float(), torch.randint(V, (2, 20))
    other = tokens.clone()
    other[:, 9] = (other[:, 9] + 1) % V
    before, after = model(tokens)[0], model(other)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9], after[:, 9])


@pytest.mark.parametrize("T", [1, 2, 3, 50])
def test_the_convolutions_window_is_its_last_inputs_and_owns_its_memory(T):
    conv, x = CausalConv(3, kernel=4), torch.randn(2, T, 3)
    _, (window,) = conv(x)
    assert torch.equal(window, torch.cat([torch.zeros(2, 3, 3), x], 1)[:, -3:])
    assert window.untyped_storage().nbytes() == window.numel() * 4


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("cell", STACKS)
def test_the_first_loss_is_about_ln_v(cell, tie):
    """0.25 nats: what random logits of the initial scale cost."""
    model = LanguageModel(65, width=64, layers=4, cell=cell, tie=tie)
    tokens = torch.randint(65, (8, 65))
    loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - math.log(65)) < 0.25


# none has no memory, so it cannot tell equal symbols apart
@pytest.mark.parametrize("cell", [stack for stack in STACKS if stack != "none"])
def test_one_batch_can_be_learned_by_heart(cell):
    model = LanguageModel(V, width=32, layers=len(cell.split(",")), cell=cell)
    tokens = torch.randint(V, (2, 17))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(120):
        loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.1:
            return
    pytest.fail(f"after 120 steps the loss is {loss.item():.2f}")


def test_a_stack_cycles_over_the_layers():
    model = LanguageModel(V, width=8, layers=5, cell="mingru,mingru,lem")
    kinds = [type(block.cell).__name__ for block in model.blocks]
    assert kinds == ["MinGRU", "MinGRU", "LEM", "MinGRU", "MinGRU"]


def test_more_cells_than_layers_are_refused():
    said = "--cell names 3 cells, mingru,lem,cfc, and the model has 2 layers. Give more --layers"
    with pytest.raises(UsageError, match=said):
        LanguageModel(V, width=8, layers=2, cell="mingru,lem,cfc")


def test_the_beginning_of_text_is_an_input_only():
    model = LanguageModel(V, width=8, layers=1)
    assert model.embedding.num_embeddings == V + 1 and model.beginning == V
    assert model(torch.tensor([[model.beginning]]))[0].shape == (1, 1, V)


def test_tied_weights_are_one_tensor():
    model = LanguageModel(V, width=8, layers=1, tie=True)
    untied = LanguageModel(V, width=8, layers=1)
    assert parameter_count(untied) - parameter_count(model) == V * 8 + V


def test_both_activations_cost_about_the_same():
    gelu = LanguageModel(V, width=96, layers=2)
    swiglu = LanguageModel(V, width=96, layers=2, activation="swiglu")
    assert abs(parameter_count(swiglu) / parameter_count(gelu) - 1) < 0.01


def test_dropout_acts_in_training_only():
    model = LanguageModel(V, width=16, layers=2, dropout=0.5)
    tokens = torch.randint(V, (2, 9))
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_an_activation_without_an_mlp_is_refused():
    with pytest.raises(UsageError, match="model.activation is swiglu, but model.mlp is 0"):
        LanguageModel(V, width=8, layers=1, mlp=0, activation="swiglu")


def test_a_kernel_of_one_is_refused():
    with pytest.raises(UsageError, match="model.conv is 1; it must be 0"):
        LanguageModel(V, conv=1)
