"""seqlm export --web: the page computes what the model computes, in Chromium where there is one."""

import base64
import re
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser, address, browser
from conftest import sentences
from test_export import CASES, with_cell

import seqlm
from seqlm.lab.web_page import encoded, write_page
from seqlm.text.prepare import prepare
from seqlm.text.tokenizer import CharTokenizer

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
STATUS = "document.getElementById('status').textContent"
PIECES = "[...document.querySelectorAll('#text span')]"
TEXT = f"{PIECES}.map(span => span.textContent).join('')"


@pytest.fixture(scope="module")
def chromium():
    """One browser for all tests; no page may write to the console."""
    with browser() as shown:
        yield shown
        assert shown.errors == []


def ready(page: Browser, session: str, status: str) -> None:
    page.wait(session, f"document.readyState === 'complete' && {STATUS}.startsWith('{status}')")


def written(page: Browser, folder: Path, settings: str) -> tuple[str, list[float]]:
    """The text that a page generates, and the surprise of each piece."""
    session = page.open(address(folder, f"{settings}&start"))
    ready(page, session, "Done")
    bits = page.evaluate(session, f"{PIECES}.map(span => Number(span.dataset.bits))")
    return page.evaluate(session, TEXT), bits


@needs_chromium
def test_a_page_knows_the_surprise_of_its_text_for_every_cell(run, chromium):
    """Also for a cell of one's own, with operators that no cell of seqlm uses."""
    for name, case in {**CASES, "own": ("indrnn", {}, {})}.items():
        own = with_cell(run, *case)
        if name == "own":
            own.model.blocks[0].cell.readout = with_many_operators
        write_page(own, Path(name), "float32", force=False)
        text, bits = written(chromium, Path(name), "temperature=1.5&length=60")
        assert len(text) == 60
        assert np.allclose(bits, own.score(text).surprisal_bits, atol=1e-3), name


def with_many_operators(h):
    """h: (..., 8) -> (..., 8)"""
    two = torch.stack([h, h.clamp(-0.5, 0.5)], dim=-1).transpose(-1, -2)[..., -7:]
    h = torch.add(two.sum(-2), two.mean(-2), alpha=2) / (two.abs().sum(-2) + 1).rsqrt()
    h = torch.where(h > 0.2, h.cos(), torch.erf(h).exp().minimum(h.sin()))
    h = torch.where(h <= 0, h, torch.log(h.maximum(h * 0 + 0.1)).mul(h < 1))
    return torch.cat([h, h[..., :1]], dim=-1)


@needs_chromium
@pytest.mark.parametrize("unit", ["char", "byte"])
def test_a_page_writes_the_greedy_text_of_the_command_line(unit, chromium, seqlm_command):
    """500 characters after a prompt."""
    Path("story.txt").write_text(sentences(4000), encoding="utf-8")
    corpus = prepare(["story.txt"], unit=unit)[0]
    small = dict(width=24, layers=2, batch=16, length=32, steps=40, lr=2e-2)
    seqlm.train(corpus, preset="tiny", run="story", **small)
    result = seqlm_command("export", "--web", "page", "--weights", "float32", "--json")
    assert result.code == 0 and result.json["web"] == "page"
    prompt = ["a dog likes ", "--temperature", 0, "--chars", 500]
    printed = seqlm_command("generate", *prompt).out.removeprefix("a dog likes ")
    text, _ = written(chromium, Path("page"), "prompt=a%20dog%20likes%20&temperature=0&length=500")
    assert text == printed and len(text) == 500


@needs_chromium
def test_a_page_ends_a_text_where_a_document_ends(run, chromium):
    """A prompt of several documents counts from the last one on."""
    run = with_cell(run, "mingru", {}, {})
    run = replace(run, tokenizer=CharTokenizer(run.tokenizer.symbols, "lines"))
    write_page(run, Path("page"), "float32", force=False)
    text, bits = written(chromium, Path("page"), "prompt=a%20dog%0A&length=500")
    assert text.index("\n") == len(text) - 1
    assert np.allclose(bits, run.score(text).surprisal_bits, atol=1e-3)


@needs_chromium
@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_smaller_numbers_are_those_of_the_rounded_matrices(kind, run, chromium):
    run = with_cell(run, "mingru", {}, {})
    write_page(run, Path("page"), kind, force=False)
    text, bits = written(chromium, Path("page"), "temperature=1&length=40&seed=4294967295")
    before = run.score(text).surprisal_bits
    for weight in run.model.parameters():
        if weight.ndim == 2:
            scale = weight.data.abs().amax(1, keepdim=True) / 127
            exact = (weight.data / scale).round() * scale
            weight.data = exact if kind == "int8" else weight.data.half().float()
    after = run.score(text).surprisal_bits
    assert np.allclose(bits, after, atol=1e-5) and not np.allclose(bits, before, atol=1e-5)


def test_a_row_of_zeros_has_int8_numbers_too():
    numbers = encoded(torch.tensor([[0.0, 0.0], [1.0, -2.0]]), "int8")
    assert np.frombuffer(numbers[8:], np.int8).tolist() == [0, 0, 64, -127]


@needs_chromium
def test_a_text_can_be_stopped_and_an_unknown_character_is_named(run, chromium):
    write_page(run, Path("page"), "float16", force=False)
    session = chromium.open(address(Path("page"), "length=20000&start"))
    chromium.wait(session, f"{PIECES}.length > 100")
    escape = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))"
    chromium.evaluate(session, escape)
    count = chromium.evaluate(session, f"{PIECES}.length")
    assert chromium.evaluate(session, STATUS) == "Stopped" and count < 20000
    chromium.evaluate(session, "location.hash = 'prompt=' + encodeURIComponent('the \\u2603')")
    chromium.wait(session, "document.getElementById('prompt').value === 'the \\u2603'")
    chromium.evaluate(session, "document.getElementById('start').click()")
    ready(chromium, session, "The model does not know the character")
    assert "\u2603" in chromium.evaluate(session, STATUS)
    assert chromium.evaluate(session, TEXT) == ""  # and nothing more of the text that was stopped
    assert chromium.evaluate(session, "document.getElementById('stop').disabled")


@needs_chromium
def test_names_and_texts_are_shown_and_not_executed(run, chromium):
    evil = "<img src=x onerror=document.title='run'>"
    symbols = "".join(sorted(set(evil + "</script>\u2028")))
    model = with_cell(run, "mingru", {}, {}).model
    tokenizer = CharTokenizer(symbols)
    model = type(model)(len(symbols), 8, 1, "mingru")
    run = replace(run, path=Path(evil), tokenizer=tokenizer, model=model.eval())
    write_page(run, Path("page"), "float16", force=False)
    session = chromium.open(address(Path("page"), "prompt=%3Cimg%20src%3Dx%3E&length=300&start"))
    ready(chromium, session, "Done")
    assert chromium.evaluate(session, "document.images.length") == 0
    assert chromium.evaluate(session, "document.title") == f"Text from {evil}"


@needs_chromium
def test_a_page_of_pieces_writes_text_and_takes_no_prompt(chromium, seqlm_command):
    Path("story.txt").write_text(sentences(4000), encoding="utf-8")
    corpus = prepare(["story.txt"], unit="sentencepiece", vocab_size=300)[0]
    run = seqlm.train(corpus, preset="tiny", width=16, layers=1, batch=4, length=16, steps=4)
    write_page(run, Path("page"), "float32", force=False)
    text, _ = written(chromium, Path("page"), "temperature=0&length=50")
    assert text == run.generate("", 50, temperature=0)
    assert chromium.evaluate(chromium.session, "document.getElementById('prompt').disabled")


def test_a_page_takes_little_beside_the_weights(run):
    size = write_page(run, Path("page"), "float16", force=False)
    text = (Path("page") / "index.html").read_text()
    weights = base64.b64decode(re.search('WEIGHTS = "(.*)"', text)[1])
    counted = sum(weight.numel() for weight in run.model.parameters())
    assert size == len(text.encode()) and f"and {counted:,} parameters" in text
    assert size - len(weights) * 4 / 3 < 50_000
    assert 2 * counted < len(weights) < 2 * counted + 4000


def test_a_page_replaces_only_a_page_and_only_with_force(run, seqlm_command):
    Path("page").mkdir()
    assert seqlm_command("export", "--web", "page", "-q").out == "page\n"
    again = seqlm_command("export", "--web", "page")
    assert again.code == 2 and "page exists. Replace it with --force" in again.err
    assert seqlm_command("export", "--web", "page", "--force").code == 0
    (Path("page") / "mine.txt").write_text("mine")
    for folder in ("page", "data"):
        refused = seqlm_command("export", "--web", folder, "--force", "--onnx", "a.onnx")
        assert refused.code == 2 and "or holds other files" in refused.err
    assert not Path("a.onnx").exists() and (Path("page") / "mine.txt").exists()
    with chdir("data"):
        refused = seqlm_command("export", "--run", Path("../") / run.path, "--web", ".")
        assert refused.code == 2 and "current folder" in refused.err
    for options in ([], ["--onnx", "a", "--force"], ["--web", "b", "--weights", "float8"]):
        assert seqlm_command("export", *options).code == 2


def test_an_error_leaves_no_part_of_a_page(run, seqlm_command):
    with pytest.raises(seqlm.errors.SeqlmError, match="attention computes bitwise_and"):
        write_page(with_cell(run, "attention", {}, {}), Path("pages/one"), "int8", force=False)
    assert not Path("pages").exists()
