"""seqlm export: the written step computes what the model's own step computes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_docs import DOCS, blocks

from seqlm import cells
from seqlm.config import RuntimeConfig
from seqlm.errors import SeqlmError
from seqlm.lab import onnx_file
from seqlm.lab.onnx_file import difference, onnx_model
from seqlm.lab.trace import trace
from seqlm.manifest import sha256
from seqlm.model import LanguageModel
from seqlm.runtime import Runtime

CASES = {name: (name, {}, {}) for name in cells.names() if name != "attention"}
CASES |= {
    "minlstm-sum": ("minlstm", {"normalize": False, "candidate": "linear"}, {"conv": 3}),
    "lem-diagonal": ("lem", {"recurrence": "diagonal"}, {"activation": "swiglu"}),
    "cfc-pure": ("cfc", {"mode": "pure", "backbone_layers": 2}, {"tie": True}),
    "cfc-memory": ("cfc", {"mode": "no_gate", "mixed_memory": True}, {"mlp": 0}),
    "cfc-leaky": ("cfc", {"recurrence": "leaky", "mode": "pure"}, {}),
    "gla-tied": ("gla", {"key": "tied"}, {}),
}


def with_cell(run, cell: str, options: dict, others: dict):
    """The run with an untrained model of another cell, computed by PyTorch."""
    model = LanguageModel(run.tokenizer.vocab_size, 8, 1, cell, options, **others)
    for weight in model.parameters():
        weight.data *= 2  # so that the logits of symbols differ visibly
    for block in model.blocks:
        block.cell.after_step()
    config = run.config.updated({"cell.name": cell})
    runtime = Runtime.pick(RuntimeConfig(backend="torch", threads=1))
    return replace(run, model=model.eval(), config=config, runtime=runtime)


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_computes_the_logits_of_every_cell_over_200_steps(case, run):
    run = with_cell(run, *CASES[case])
    assert difference(onnx_model(run), run, steps=200) < 1e-5


def test_a_wrong_onnx_file_is_not_written(run, seqlm_command, monkeypatch):
    """The command compares the file with the run before it writes it."""
    with pytest.raises(SeqlmError, match="other logits"):
        difference(onnx_model(with_cell(run, "lem", {}, {})), with_cell(run, "lem", {}, {}))
    monkeypatch.setattr(onnx_file, "TOLERANCE", 0)
    result = seqlm_command("export", "--onnx", "model.onnx")
    assert result.code == 1 and "was not written" in result.err
    assert not list(Path().glob("*.onnx"))


def test_an_onnx_file_says_what_its_numbers_mean(run, seqlm_command):
    import onnx

    result = seqlm_command("export", "--onnx", "model.onnx", "--json")
    model = onnx.load("model.onnx")
    facts = {fact.key: fact.value for fact in model.metadata_props}
    step = run.path / f"step-{run.step:08d}"
    assert facts["model_sha256"] == sha256(step / "model.safetensors")
    assert facts["cell"] == "mingru"
    assert json.loads(facts["vocabulary"]) == [*run.tokenizer.symbols]
    assert (facts["run"], facts["step"], facts["unit"]) == ("story-mingru", "4", "char")
    assert json.loads(facts["initial_state"]) == [s.tolist() for s in run.model.initial_state(1)]
    assert result.json["onnx_bytes"] == Path("model.onnx").stat().st_size
    assert 0 <= result.json["largest_difference"] < 1e-4


def test_the_path_of_a_cell_file_stays_private(run):
    run = replace(run, config=run.config.updated({"cell.name": "/home/me/average.py"}))
    graph = trace(run)
    assert graph.cell == "average"
    assert b"/home/me" not in onnx_model(run)


def test_a_step_that_cannot_be_exported_is_an_error_that_names_the_operator(run, monkeypatch):
    with pytest.raises(SeqlmError, match="step of attention computes bitwise_and, which cannot"):
        onnx_model(with_cell(run, "attention", {}, {}))
    run = with_cell(run, "indrnn", {}, {})
    refused = {
        "_local_scalar_dense": lambda x: x * x.sum().item(),  # one number, and not a formula
        "float64": lambda x: x.double().tanh().float(),
        "views": lambda x: x.tanh().view(-1).relu_().view(x.shape),
        "square": lambda x: x**3,
    }
    for words, function in refused.items():
        monkeypatch.setattr(run.model.blocks[0].cell, "readout", function)
        with pytest.raises(SeqlmError, match=words):
            trace(run)


def test_a_cell_with_other_operators_is_exported_from_its_own_code(run, monkeypatch):
    """Operators that no cell of seqlm uses so far; a slice may count from the end."""

    def readout(h):
        h = torch.stack([h, h.clamp(-0.5, 0.5)], dim=1)[:, :, -3:].permute(0, 2, 1)
        h = torch.add(h.sum(2), h.mean(2), alpha=2).exp().rsqrt()
        parts = (
            torch.maximum(h, h.sin()),
            torch.where(h > 1, h, 1 - h),
            h[:, 0].unsqueeze(1),
            h[:, :1],
        )
        return torch.cat(parts, dim=1).add_(1)

    run = with_cell(run, "indrnn", {}, {})
    monkeypatch.setattr(run.model.blocks[0].cell, "u", torch.nn.Parameter(torch.ones(8) / 2))
    monkeypatch.setattr(run.model.blocks[0].cell, "readout", readout)
    assert difference(onnx_model(run), run) < 1e-5


@pytest.mark.parametrize("form", [("--onnx", "model.onnx"), ("--web", "page")])
def test_weights_that_are_not_finite_are_not_exported(run, seqlm_command, monkeypatch, form):
    torch.nn.init.constant_(run.model.head.bias[:1], float("nan"))
    monkeypatch.setattr("seqlm.cli._flags.Reading.load", lambda *_: run)
    result = seqlm_command("export", *form)
    assert result.code == 1
    assert "The model's weights are not finite. Choose another step with --step." in result.err
    assert not Path(form[1]).exists()


def test_the_program_of_the_page_writes_what_generate_writes(run, seqlm_command, capfdbinary):
    """It has no seqlm in it."""
    ((_, program),) = blocks(DOCS / "exporting.md", "python")
    assert "seqlm" not in program
    assert seqlm_command("export", "--onnx", "poems.onnx").code == 0
    exec(compile(program.replace("Roses ", "the "), "exporting.md", "exec"), {})
    written = capfdbinary.readouterr().out.decode()
    assert written == run.generate("the ", 200, temperature=0) + "\n"


@pytest.mark.parametrize("library", ["onnx", "onnxruntime"])
def test_without_a_library_the_error_names_the_extra(library, run, seqlm_command, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    result = seqlm_command("export", "--onnx", "model.onnx")
    assert result.code == 1 and "pip install -e '.[export]'" in result.err
    assert not Path("model.onnx").exists()
