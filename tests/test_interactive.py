"""generate --interactive: lines by a pipe, continuations out, commands, errors on the way."""

import signal

import pytest
import torch

from seqlm.generation import context
from seqlm.generation.generate import Sampling


@pytest.fixture
def session(seqlm_command, run, monkeypatch, tmp_path):
    """A session of these lines, with options: its result."""

    def talk(*lines: bytes, options=()):
        (tmp_path / "lines").write_bytes(b"\n".join(lines))
        with open(tmp_path / "lines") as file:
            monkeypatch.setattr("sys.stdin", file)
            return seqlm_command("generate", "-i", "-q", "--chars", 20, "--seed", 1, *options)

    return talk


def test_each_line_goes_on_from_the_text_so_far(session, run):
    result = session(b"the ", b"", b"a dog", options=["--temperature", 0])
    parts, text = [], ""
    for line in ("the ", "", "a dog"):
        parts.append(run.generate(text + line, 20, temperature=0))
        text += line + parts[-1]
    assert result.code == 0 and result.err == ""
    assert result.out == "".join(part if part.endswith("\n") else f"{part}\n" for part in parts)


def test_a_session_repeats_with_its_seed_and_its_texts_differ(session):
    first, second = (
        session(b"/reset", b"the ", b"/reset", b"the "),
        session(b"the ", b"/reset", b"the "),
    )
    assert first.out == second.out
    assert first.out[:20] != first.out[21:41]


def test_commands(session, run):
    lines = [b"the ", b"/save king.state", b"/temperature 0", b"/reset", b"//help", b"/quit", b"a"]
    result = session(*lines[:4], b"the ", b"/help", *lines[5:])
    greedy = run.generate("the ", 20, temperature=0)
    assert result.code == 0 and result.out[21:] == greedy + "\n" * (greedy[-1] != "\n")
    known = run.load_context("king.state")
    read = context.read(run.model, run.tokenizer, "the " + result.out[:20])
    torch.testing.assert_close(known.logits, read.logits, rtol=1e-4, atol=1e-5)


def test_help_lists_the_commands(seqlm_command, run, monkeypatch, tmp_path):
    (tmp_path / "lines").write_text("/help")
    with open(tmp_path / "lines") as file:
        monkeypatch.setattr("sys.stdin", file)
        result = seqlm_command("generate", "-i")
    for command in ("/reset ", "/save FILE", "/temperature T", "/help ", "/quit "):
        assert command in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    "line, said",
    [
        (b"/sav", "Unknown command '/sav'. Did you mean '/save'? Known: /reset, /save"),
        (b"/save", "/save needs a value: /save FILE"),
        (b"/save no/where", "Cannot write no/where: the folder no does not exist. Create it"),
        (b"/temperature hot", "error: /temperature hot: it must be a number from 0"),
        (b"/temperature 101", "error: /temperature 101.0: it must be from 0 (greedy) to 100."),
        (b"//", "Character '/' (U+002F) at position 0 is not in the vocabulary"),
        (b"the \xff", "The text is not UTF-8: byte 0xff at offset 4."),
    ],
)
def test_a_wrong_line_is_an_error_and_the_session_goes_on(session, line, said):
    result = session(b"the ", line, b"a")
    right = session(b"the ", b"a")
    assert result.code == 0 and said in result.err and result.err.count("error:") == 1
    assert result.out == right.out


def test_the_prompt_begins_and_the_state_is_loaded_and_saved(session, run):
    run.generate("a dog ", 0, save_state="dog")
    options = ["--prompt", "sees ", "--load-state", "dog", "--save-state", "end"]
    result = session(options=[*options, "--temperature", 0])
    greedy = run.generate("a dog sees ", 20, temperature=0)
    assert result.out.rstrip("\n") == "sees " + greedy.rstrip("\n")
    known = run.load_context("end")
    read = context.read(run.model, run.tokenizer, "a dog sees " + greedy)
    torch.testing.assert_close(known.logits, read.logits, rtol=1e-4, atol=1e-5)


def test_ctrl_c_ends_the_continuation_and_not_the_session(session, monkeypatch):
    real, drawn = Sampling.draw, []

    def draw(*given):
        drawn.append(1)
        if len(drawn) == 5:
            signal.raise_signal(signal.SIGINT)
        return real(*given)

    whole = session(b"the ", b"a").out
    monkeypatch.setattr(Sampling, "draw", draw)
    before = signal.getsignal(signal.SIGINT)
    result = session(b"the ", b"a")
    assert result.code == 0 and result.out[:5] == whole[:5] and result.out[5] == "\n"
    assert len(drawn) == 25 and signal.getsignal(signal.SIGINT) is before


def test_options_that_contradict_a_session_are_errors(seqlm_command, run):
    for given, name in [
        (["--json"], "--json"),
        (["--unique"], "--unique, --new or --jsonl"),
        (["--samples", "2"], "--samples"),
        (["--novelty", "--json"], "--json"),
        (["--novelty"], "--novelty"),
        (["-"], "a prompt from standard input"),
    ]:
        result = seqlm_command("generate", "-i", *given)
        assert result.code == 2 and f"--interactive and {name} do not go together" in result.err
    assert seqlm_command("generate", "-i", "--save-state", "no/where").code == 1
    assert seqlm_command("generate", "-i", "--regex", "(a").code == 2
