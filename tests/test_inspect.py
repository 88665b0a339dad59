"""What the state remembers: how far back, for how long, and which units follow what."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from browser import CHROMIUM, browser
from conftest import sentences, valid

from seqlm import cells
from seqlm.errors import InputError, SeqlmError, UsageError
from seqlm.evaluation import evaluate, inspect
from seqlm.evaluation.inspect import Walk
from seqlm.lab import inspect_page, tint
from seqlm.model import LanguageModel
from seqlm.text.tokenizer import CharTokenizer
from seqlm.ui import Screen

TEXT = sentences(700)
GATED = [
    ("mingru", {}, "h"),
    ("minlstm", {}, "h"),
    ("minlstm", {"normalize": False}, "h"),
    ("lem", {"dt": 0.5}, "yz"),
    ("lem", {"recurrence": "diagonal"}, "yz"),
    ("gru", {}, "h"),
    ("lstm", {}, "c"),
    ("mogrifier", {}, "c"),
    ("cfc", {"recurrence": "leaky"}, "h"),
    ("cfc", {"mixed_memory": True}, "c"),
    ("gla", {}, "S"),
    ("gla", {"decay": "scalar", "heads": 2}, "S"),
    ("rglru", {}, "h"),
    ("aaren", {"heads": 2}, "h"),
]


def made(cell: str = "mingru", documents: str = "none", **options) -> tuple:
    """An untrained model with large weights, its tokenizer and the passage of TEXT."""
    tokenizer = CharTokenizer("".join(sorted({*TEXT})), documents)
    model = LanguageModel(tokenizer.vocab_size, 8, 2, cell, options).eval()
    torch.nn.init.normal_(model.head.weight)
    return model, tokenizer, inspect.passage_to_inspect(TEXT.encode(), tokenizer)


def bits(nats: float, passage) -> float:
    return nats / np.log(2) / passage.chars


def nats_of_pieces(model, symbols, k: int) -> float:
    """Of all symbols of a text in pieces of k, each from a fresh state after the symbol before."""
    begun = torch.from_numpy(np.append(model.beginning, symbols).astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(symbols), k):
            piece = begun[start : start + k + 1]
            logits, _ = model(piece[None, :-1])
            total += F.cross_entropy(logits[0].double(), piece[1:], reduction="sum").item()
    return total


def test_a_model_that_is_not_finite_is_not_inspected():
    model, _, passage = made("lem")
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(SeqlmError, match="score is not a finite number"):
        inspect.bits_by_reach(model, passage)


def test_bits_by_reach_are_those_of_pieces_and_at_last_of_the_stream():
    model, _, passage = made("lem")
    found = dict(inspect.bits_by_reach(model, passage))
    assert [*found] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 700]
    for k in (1, 16, 512):
        nats = nats_of_pieces(model, passage.symbols, k)
        assert found[k] == pytest.approx(bits(nats, passage), rel=1e-6)
    nats = evaluate.stream(model, passage.symbols).nats
    assert found[700] == pytest.approx(bits(nats, passage), rel=1e-6)


def test_a_document_is_never_read_with_the_one_before_it():
    model, tokenizer, passage = made(documents="lines")
    found = dict(inspect.bits_by_reach(model, passage))
    longest = max(map(len, TEXT.splitlines())) + 1
    assert [*found][-1] == longest
    score = evaluate.score(model, tokenizer, passage)
    assert found[longest] == pytest.approx(score.bits_per_char, rel=1e-6)
    parts = np.split(passage.symbols, passage.ends[:-1])
    nats = sum(nats_of_pieces(model, part, 8) for part in parts)
    assert found[8] == pytest.approx(bits(nats, passage), rel=1e-6)


@pytest.mark.parametrize("name, options, parts", GATED)
def test_a_unit_keeps_the_share_that_its_cell_states(name, options, parts):
    """Without recurrent weights, a change of the state is scaled by this share and no more."""
    cell = cells.find(name)(4, **options).double()
    with torch.no_grad():
        for weight, value in cell.named_parameters():
            if re.match("from_[hyz]|lstm_h", weight):
                value.zero_()
    x = torch.randn(3, 4, dtype=torch.float64)
    state = tuple(torch.rand_like(s) for s in cell.initial_state(3))
    kept = cell.kept(x, state)
    assert "".join(kept) == parts
    place = {"h": 0, "y": 0, "S": 0, "z": 1, "c": 1}
    for part, share in kept.items():
        moved = [s.clone() for s in state]
        moved[place[part]] += 0.5
        after = [cell.step(x, s)[1][place[part]] for s in (tuple(moved), state)]
        changed = (after[0] - after[1]).view(*share.shape, -1)  # rows of a matrix share one share
        expected = 0.5 * share.unsqueeze(-1).expand_as(changed)
        torch.testing.assert_close(changed, expected, rtol=1e-9, atol=1e-12)
        assert ((share > 0) & (share < 1)).all()


@pytest.mark.parametrize("name", ["indrnn", "cornn", "cfc", "attention"])
def test_a_cell_without_gates_has_no_time_constants(name):
    read = inspect.walk(*made(name))
    assert read.times == [] and len(read.text) == 700


def test_the_time_constant_of_a_constant_gate_is_known():
    """minGRU with a gate that depends on its bias only keeps the share a: -1 / ln a characters."""
    model, tokenizer, passage = made()
    kept = torch.tensor([0.1, 0.5, 0.9, 0.95])
    with torch.no_grad():
        inputs = model.blocks[1].cell.inputs
        inputs.weight[:8] = 0
        inputs.bias[:4] = torch.log((1 - kept) / kept)
    first, second = inspect.walk(model, tokenizer, passage).times
    assert (first.layer, second.layer, second.part) == (1, 2, "h")
    # 700 characters of a text that begins with an empty memory
    assert np.allclose(second.symbols[:4], -1 / np.log(kept.numpy()), rtol=0.04)


def test_a_unit_that_never_forgets_remembers_no_earlier_document():
    model, tokenizer, passage = made(documents="lines")
    with torch.no_grad():
        model.blocks[0].cell.inputs.bias[:8] = -100  # z = 0 in every step
    longest = max(map(len, TEXT.splitlines())) + 1
    first, _ = inspect.walk(model, tokenizer, passage).times
    assert 0.3 * longest < first.symbols.min() and first.symbols.max() < longest


def test_states_are_those_of_the_model_and_the_model_is_left_as_it_was():
    model, tokenizer, passage = made("lem", documents="lines")
    before = [type(block.cell).__name__ for block in model.blocks]
    read = inspect.walk(model, tokenizer, passage)
    assert [type(block.cell).__name__ for block in model.blocks] == before == ["LEM", "LEM"]
    assert "".join(read.text) == TEXT if TEXT.endswith("\n") else TEXT + "\n"
    begin, end = passage.ends[3:5]
    symbols = torch.tensor([[model.beginning, *passage.symbols[begin:end].tolist()]])
    _, state = model(symbols)
    for layer in (0, 1):
        whole = torch.cat(state[2 * layer : 2 * layer + 2], dim=1)[0].detach()
        assert np.allclose(read.states[layer][end - 1], whole, atol=1e-5)


QUOTED = 'he said "yes, (or [no]) 12 times" and Left.\nA much longer line followed, "or so".\n' * 20


def read_of(text: str, *units) -> Walk:
    """A Walk with one layer whose units have given values."""
    return Walk([*text], [np.stack(units, axis=1).astype(np.float32)], [])


def test_a_unit_that_follows_quotations_exactly_has_an_auc_of_1():
    quoted = inspect.features_of([*QUOTED])["inside quotation marks"]
    noise = np.random.default_rng(0).normal(size=len(QUOTED))
    best = {f.name: f for f in inspect.followed(read_of(QUOTED, noise, -3.0 * quoted, noise))}
    feature = best["inside quotation marks"]
    follower = feature.units[0]
    assert follower[:3] == (1, 2, False) and follower.auc == follower.chosen_auc == 1
    assert feature.share == pytest.approx(quoted.mean())
    assert best["at a digit"].units and not inspect.followed(read_of(TEXT, noise[:700]))[-1].units


def test_the_auc_that_counts_is_that_of_the_half_where_nothing_was_chosen():
    quoted = inspect.features_of([*QUOTED])["inside quotation marks"]
    half = len(QUOTED) // 2
    turned = np.where(np.arange(len(QUOTED)) < half, quoted, ~quoted)
    found = {f.name: f.units[0] for f in inspect.followed(read_of(QUOTED, turned)) if f.units}
    follower = found["inside quotation marks"]
    assert follower.high and follower.chosen_auc == 1 and follower.auc == 0


def test_features_of_a_text_end_at_a_blank_line():
    text = 'a "b" “c” (d[1]) "E(\n\nf\n'
    found = inspect.features_of([*text])
    marked = {name: "".join("x" if on else "." for on in row) for name, row in found.items()}
    assert marked["inside quotation marks"] == "..xx..xx.........xxxx...."[: len(text)]
    assert marked["inside brackets"] == "..........xxxxx....xx...."[: len(text)]
    assert marked["inside brackets in brackets"].count("x") == 2
    assert [text[i] for i in np.flatnonzero(found["at a capital letter"])] == ["E"]
    assert [text[i] for i in np.flatnonzero(found["at a digit"])] == ["1"]


def test_the_auc_counts_pairs_and_ties_as_one_half():
    values = np.array([[0.0], [1.0], [1.0], [2.0], [2.0]])
    present = np.array([[False, False, True, False, True], [False] * 5])
    found = inspect.auc(values, present)
    assert found[0, 0] == (1 + 0.5 + 0 + 1 + 1 + 0.5) / 6 and np.isnan(found[1, 0])


def test_half_of_a_text_has_no_colour_and_the_rest_is_coloured_by_its_side():
    values = np.arange(-50.0, 51.0)
    found, limits = inspect.levels(values)
    assert found[[0, 50, 100]].tolist() == [-3, 0, 3]
    assert (found == 0).mean() == pytest.approx(0.5, abs=0.02)
    assert [n for n, _ in inspect_page.legend(values)] == [-3, -2, -1, 0, 1, 2, 3]
    assert limits == sorted(limits)


def test_the_command_and_the_library_say_the_same(run, seqlm_command):
    Path("part.txt").write_text(sentences(1000))
    command = partial(seqlm_command, "inspect", "part.txt")
    found = command("--json").json
    valid("inspect", found)
    of_library = run.inspect(sentences(1000))
    assert found["bits_per_char"] == pytest.approx(of_library.bits_per_char)
    assert found["bits_per_char"] == pytest.approx(run.bits_per_char(sentences(1000)))
    assert found["times"][0]["symbols"] == pytest.approx(of_library.walk.times[0].symbols)
    lines = command().out.splitlines()
    assert lines[0] == "state reset every\tbits per character\tmore than never"
    assert "layer\tpart\tunits\tshortest\tmedian\t9 of 10\tlongest" in lines
    assert float(command("-q").out) == pytest.approx(found["bits_per_char"], abs=1e-4)


def test_a_unit_is_shown_with_numbers_where_there_are_no_colours(run, seqlm_command, monkeypatch):
    monkeypatch.setattr(inspect, "READ", 100)
    result = seqlm_command("inspect", "story.txt", "--unit", "1:3")
    value = run.inspect(sentences(100)).walk.unit("1:3")[sentences(100).index(" ") - 1]
    assert result.out.startswith(f"{sentences(100).split()[0]}[{value:+.2f}]")
    assert "Only the first 100 characters of the text are read." in result.err
    assert re.sub(r"\[[+-][\d.]+\]", "", result.out) == sentences(100) + "\n"


def test_a_terminal_shows_a_text_in_the_colours_of_a_unit(run, seqlm_command, monkeypatch):
    shown = []
    monkeypatch.setattr(inspect, "READ", 100)
    monkeypatch.setattr(Screen, "colored", lambda screen: True)
    monkeypatch.setattr(Screen, "colors", lambda screen, parts: shown.extend(parts))
    assert seqlm_command("inspect", "story.txt", "--unit", "1:3").code == 0
    found, _ = inspect.levels(run.inspect(sentences(100)).walk.unit("1:3"))
    legend, text = shown[:7], shown[8:-1]
    assert [color for _, color in legend] == [tint.color(n) for n in range(-3, 4)]
    assert text == [(c, tint.color(n)) for c, n in zip(sentences(100), found, strict=True)]


def test_a_page_escapes_the_text_and_the_name_of_the_run():
    read = read_of("</pre><script>" * 20, np.arange(280.0))
    found = inspect.Inspection(280, [inspect.Reach(1, 2.0)], read, inspect.followed(read))
    written = inspect_page.page("<b>", found, "1:1")
    assert "&lt;b&gt;" in written and "<b>" not in written
    assert written.count("<script>") == 1 and written.count("</pre>") == 1
    assert inspect_page.NO_GATES in written


@pytest.mark.parametrize(
    "text, given, code, message",
    [
        (b"", (), 3, "the text is empty"),
        (b"the cat", (), 3, "The text has 7 symbols; at least 64 are needed."),
        (b"the cat \xff" * 20, (), 3, "The text is not UTF-8: byte 0xff at offset 8."),
        (TEXT.encode(), ("--unit", "3:1"), 2, "There is no layer 3. Layers go from 1 to 1."),
        (TEXT.encode(), ("--unit", "1:17"), 2, "is not in the layer, which has 16 units."),
        (TEXT.encode(), ("--unit", "1"), 2, "The unit '1' is not LAYER:INDEX."),
        (TEXT.encode(), ("--unit", "1:2", "--json"), 2, "--unit has no effect with --json."),
        (TEXT.encode() + "€".encode(), (), 3, "is not in the vocabulary"),
    ],
)
def test_what_cannot_be_inspected_is_refused(run, seqlm_command, text, given, code, message):
    Path("a.txt").write_bytes(text)
    result = seqlm_command("inspect", "a.txt", *given)
    assert result.code == code and message in result.err and result.out == ""


@pytest.mark.parametrize("html", [(), ("--html", "a.html")])
def test_an_unknown_unit_is_refused_before_the_model_reads_the_text(
    run, seqlm_command, monkeypatch, html
):
    monkeypatch.delattr(inspect, "walk")
    monkeypatch.delattr(inspect, "inspect")
    Path("a.txt").write_text(TEXT)
    result = seqlm_command("inspect", "a.txt", "--unit", "1:17", *html)
    assert result.code == 2 and "The unit 1:17 is not in the layer" in result.err


def test_a_page_needs_matplotlib(run, monkeypatch):
    found = run.inspect(TEXT)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(SeqlmError, match=r"matplotlib is not installed. Run .*\.\[plot\]"):
        inspect_page.page("a", found)
    with pytest.raises(UsageError, match="There is no layer"):
        found.walk.unit("2:1")
    with pytest.raises(InputError, match="at least 64"):
        run.inspect("the cat")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_runs_in_a_browser_without_an_error(run, seqlm_command):
    Path("story.txt").write_text(TEXT)
    assert seqlm_command("inspect", "story.txt", "--html", "a.html", "--unit", "1:2").code == 0
    value = run.inspect(TEXT).walk.unit("1:2")[1]
    with browser() as shown:
        page = shown.open(Path("a.html").resolve().as_uri(), width=390, dark=True)
        shown.wait(page, "document.querySelectorAll('svg').length === 2")
        shown.evaluate(page, PRESS + PRESS)
        assert f"unit 1:2: {value:.3f}" in shown.evaluate(page, "about.textContent")
        width = shown.evaluate(page, "document.documentElement.scrollWidth")
        assert width <= 390 and shown.errors == []


PRESS = "text.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));"
