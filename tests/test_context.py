"""generate --save-state and --load-state: a text goes on as if it had never been interrupted."""

import json

import numpy as np
import pytest
import torch
from conftest import KINDS
from safetensors.torch import load_file, save_file

import seqlm
from seqlm.generation import context
from seqlm.generation.generate import Sampling, generate
from seqlm.model import LanguageModel
from seqlm.text.tokenizer import CharTokenizer

ALPHABET = CharTokenizer("abcdefg")


@pytest.mark.parametrize("cell", KINDS)
def test_a_saved_state_continues_byte_for_byte(cell, tmp_path):
    """The likeliest text of 60 characters, and the same with a file after 25."""
    model = LanguageModel(7, width=12, layers=2, cell=cell, conv=3).eval()
    greedy = dict(sampling=Sampling(temperature=0))
    whole = "".join(generate(model, ALPHABET, "abc", chars=60, **greedy))
    kept = []
    begun = "".join(generate(model, ALPHABET, "abc", chars=25, keep=kept.append, **greedy))
    context.save(tmp_path / "state", kept[0], "a model")
    loaded = context.load(tmp_path / "state", model, "a model")
    assert all(torch.equal(x, y) for x, y in zip(kept[0].state, loaded.state, strict=True))
    rest = "".join(generate(model, ALPHABET, after=loaded, chars=35, **greedy))
    assert begun + rest == whole


def test_a_seed_after_a_state_is_that_seed_after_the_whole_context(seqlm_command, run):
    read = ["generate", "the old king sees a dog.\n" * 200, "--chars"]
    assert seqlm_command(*read, 0, "--save-state", "king", "-q").code == 0
    rest = ["--chars", 40, "--seed", 7, "-q"]
    whole = seqlm_command(*read, *rest[1:]).out
    assert whole.endswith(seqlm_command("generate", "--load-state", "king", *rest).out)
    more = seqlm_command("generate", "a dog", "--load-state", "king", *rest).out
    assert more.startswith("a dog") and len(more) == 45
    assert (run.path.parents[1] / "king").stat().st_size < 10_000


@pytest.mark.parametrize("stop", ["a", "th", "zz"])
def test_a_state_has_read_the_stop_string(run, stop):
    """The next text follows the stop string, as if it stood in the prompt."""
    text = run.generate("the ", 50, 1, stop=stop, save_state="state")
    read = "the " + text + (stop if len(text) < 50 else "")
    known, whole = run.load_context("state"), context.read(run.model, run.tokenizer, read)
    torch.testing.assert_close(known.logits, whole.logits, rtol=1e-4, atol=1e-5)


def test_a_state_after_a_piece_that_was_cut_has_read_what_was_written(
    seqlm_command, text_file, monkeypatch
):
    seqlm_command("prepare", "story.txt", "--unit", "sentencepiece", "--vocab-size", 300)
    run = seqlm.train(preset="tiny", width=8, layers=1, batch=4, length=16, steps=2)
    longest = max(range(run.tokenizer.text_symbols), key=lambda n: len(run.tokenizer.texts[n]))
    monkeypatch.setattr(Sampling, "draw", lambda *_: longest)
    text = run.generate("the ", 2, save_state="state")
    assert len(text) == 2 < len(run.tokenizer.texts[longest])
    parts = [run.tokenizer.encode(part) for part in ("the ", text)]
    expected = context.prefill(run.model, np.concatenate(parts))
    known = run.load_context("state")
    torch.testing.assert_close(known.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_a_state_after_a_document_is_a_beginning(seqlm_command, tmp_path):
    (tmp_path / "words.txt").write_text("\n".join(f"abc{n}" for n in range(200)))
    seqlm_command("prepare", "words.txt", "--documents", "lines")
    run = seqlm.train(preset="tiny", width=8, layers=1, batch=4, length=16, steps=2)
    assert run.generate("ab", 500, 1, regex="c", save_state="state") == "c\n"
    options = dict(chars=5, seed=3)
    assert run.generate(load_state="state", **options) == run.generate(**options)
    assert run.generate("abc0\nab", load_state="state", **options) == run.generate("ab", **options)


def spoiled(path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[-9:]
    elif how == "flipped":
        data[-5] ^= 1
    elif how == "text":
        data = bytearray(b"no state")
    elif how == "large":
        data += bytes(2 << 20)
    path.write_bytes(data)
    tensors, header = load_file(path) if how in ("foreign", "newer") else {}, {}
    if how == "newer":
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        header["format"] = "seqlm-state-9"
    if tensors:
        save_file(tensors, path, header)


@pytest.mark.parametrize(
    "how, said",
    [
        ("cut", "state is damaged, or is no file of seqlm generate --save-state."),
        ("flipped", "state is damaged"),
        ("text", "state is damaged"),
        ("foreign", "state is damaged, or is no file"),
        ("newer", "state has format seqlm-state-9, but this version of seqlm reads"),
        ("large", "state is damaged: it is larger than"),
    ],
)
def test_a_file_that_is_no_state_is_an_error(seqlm_command, run, how, said):
    run.generate("the ", 3, save_state="state")
    spoiled(run.path.parents[1] / "state", how)
    result = seqlm_command("generate", "--load-state", "state")
    assert result.code == 3 and said in result.err and result.out == ""


@pytest.mark.parametrize(
    "given, code, said",
    [
        (["--load-state", "none"], 3, "Cannot read none: No such file or directory."),
        (["--save-state", "no/where"], 1, "Cannot write no/where: the folder no does not exist."),
        (["--save-state", "s", "--samples", "2"], 2, "--save-state keeps the state of one text"),
        (["--save-state", "s", "--unique"], 2, "--save-state has no effect with --unique"),
        (["--load-state", "s", "--new"], 2, "--load-state has no effect with --unique, --new"),
        (["--chars", "0"], 2, "--chars 0: it must be at least 1, or 0 with --save-state."),
        (["--temperature", "0.3,x"], 2, "--temperature 0.3,x: it must be a number from 0"),
    ],
)
def test_options_that_do_not_fit_are_errors(seqlm_command, run, given, code, said):
    result = seqlm_command("generate", *given)
    assert result.code == code and said in result.err and result.out == ""


def test_a_state_of_another_model_is_an_error(seqlm_command, run):
    run.generate("the ", 3, save_state="state")
    other = seqlm.train(
        "data/story",
        run="other",
        **{**dict(preset="tiny", width=16), "layers": 1},
        batch=4,
        length=16,
        steps=5,
    )
    assert other.fingerprint() != run.fingerprint()
    result = seqlm_command("generate", "--load-state", "state", "--run", "other")
    assert result.code == 3 and "state was saved with another model or" in result.err


def test_a_state_of_another_dtype_names_the_option(seqlm_command, run):
    rounded = ("--dtype", "bfloat16")
    seqlm_command("generate", "the ", "--chars", 0, "--save-state", "state", *rounded)
    assert seqlm_command("generate", "--load-state", "state", *rounded).code == 0
    result = seqlm_command("generate", "--load-state", "state")
    assert result.code == 3
    assert "state was saved with another model or another --dtype. Choose the same" in result.err
