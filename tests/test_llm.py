"""The plugin of the command llm: runs are its models, and say what seqlm says."""

import tomllib
from pathlib import Path
from pkgutil import resolve_name

import llm
import pytest
from click.testing import CliRunner
from llm import plugins
from llm.cli import cli

import seqlm

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))


@pytest.fixture
def plugin(monkeypatch, tmp_path):
    """The plugin that pyproject.toml names; logs go to a folder of the test."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "user"))
    (entry,) = PROJECT["project"]["entry-points"]["llm"].values()
    module = resolve_name(entry)
    # where seqlm is installed, importing llm.cli has registered the plugin by its entry point
    installed = plugins.pm.is_registered(module)
    if not installed:
        plugins.pm.register(module)
    yield module
    if not installed:
        plugins.pm.unregister(module)


@pytest.fixture
def llm_command(plugin):
    return lambda *arguments: CliRunner().invoke(cli, arguments)


def test_the_command_continues_a_prompt_as_generate_does(llm_command, run):
    options = dict(chars=30, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, seed=3)
    given = [word for name, value in options.items() for word in ("-o", name, str(value))]
    result = llm_command("-m", "seqlm/story-mingru", "the ", *given)
    assert result.exit_code == 0, result.output
    assert result.output == run.generate("the ", **options) + "\n"


def test_the_runs_are_listed_with_their_options(llm_command, run):
    listed = llm_command("models", "--options", "-q", "seqlm").output
    assert listed.startswith("seqlm: seqlm/story-mingru\n")
    assert "temperature: float" in listed and "streaming" in listed


def test_a_text_comes_in_pieces_and_its_seed_repeats_it(plugin, run):
    response = llm.get_model("seqlm/story-mingru").prompt("the ", chars=20)
    pieces = [*response]
    assert len(pieces) == 20
    assert response.response_json["step"] == run.step
    seed = response.response_json["seed"]
    assert run.generate("the ", chars=20, seed=seed) == "".join(pieces)


def test_without_chars_a_text_has_500(plugin, run):
    assert len(llm.get_model("seqlm/story-mingru").prompt("the ").text()) == 500


def test_a_model_of_documents_ends_with_the_document(plugin, seqlm_command, text_file):
    seqlm_command("prepare", text_file, "--documents", "lines")
    seqlm.train(preset="tiny", width=8, layers=1, batch=4, length=16, steps=2, run="lines")
    text = llm.get_model("seqlm/lines").prompt("the ", seed=1, temperature=2).text()
    assert text.count("\n") == 1 and text.endswith("\n")


@pytest.mark.parametrize(
    "given, said",
    [
        (["a€"], "Character '€' (U+20AC) at position 1 is not in the vocabulary"),
        (["a", "-o", "temperature", "200"], "--temperature 200.0: it must be from 0"),
        (["a", "-s", "be brief"], "A run reads no system prompt."),
    ],
)
def test_an_error_of_seqlm_is_shown_in_its_words(llm_command, run, given, said):
    result = llm_command("-m", "seqlm/story-mingru", *given)
    assert result.exit_code == 1 and f"Error: {said}" in result.output
