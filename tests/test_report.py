"""seqlm report: a page with everything on a run, which loads nothing and repeats the run."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import CHROMIUM, browser
from conftest import SMALL, start

import seqlm
from seqlm import draw
from seqlm.errors import InputError, SeqlmError
from seqlm.lab import check, report
from seqlm.store import history, runs
from seqlm.training import launch


@pytest.fixture
def drawn():
    """For tests of the pictures; the others look at the words alone, as pictures take a second."""


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(report.draw, "curves_svg", no_picture)


def no_picture(found, ys, wide, read):
    for y in ys:
        draw.panel(found, "steps", y, read)
    return "<svg></svg>"


def written(seqlm_command, *options) -> str:
    result = seqlm_command("report", "--out", "page.html", *options)
    assert result.code == 0, result.err
    return Path("page.html").read_text("utf-8")


def part(page: str, heading: str) -> str:
    """The text of a section."""
    inner = re.search(rf"<h2>{heading}</h2>\n(.*?)</section>", page, re.S)[1]
    return unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<svg.*?</svg>", "<svg>", inner, flags=re.S)))


def test_a_report_has_what_the_other_commands_say_of_the_run(run, seqlm_command):
    seqlm_command("runs", "note", "story-mingru", "a <small> & quick one")
    page = written(seqlm_command)
    assert "a &lt;small&gt; &amp; quick one" in page
    figures = run.evaluate()
    evaluation = part(page, "Evaluation")
    assert f"{figures['bits_per_char']:.4f}" in evaluation and figures["split_sha256"] in evaluation
    assert "protocol stream" in re.sub(r"\s+", " ", evaluation)
    card = json.loads(Path("data/story/manifest.json").read_text())["card"]
    data = part(page, "Data")
    for bits in (card["unigram_bits_per_char"], card["xz_bits_per_char"], figures["bits_per_char"]):
        assert f" {bits:.4f} " in data
    assert part(page, "Configuration").strip() == run.config.toml().strip()
    environment = runs.load(run.path)[0].environment
    assert all(str(value) in part(page, "Environment") for value in environment.values())
    assert "seqlm report --check" in part(page, "Checks")


def test_the_curves_are_drawn_in_the_page(run, seqlm_command, drawn):
    page = written(seqlm_command)
    curves = re.search(r"<h2>Curves</h2>(.*?)</section>", page, re.S)[1]
    assert curves.count("<svg") == 5 and "Not measured yet" not in curves


def test_a_run_before_its_first_validation_has_the_curves_that_there_are(corpus, seqlm_command):
    setup = start(corpus, "young", train__save_every=1)
    reports = setup.reports()
    for _ in range(2):
        next(reports)
    page = written(seqlm_command, "--run", "young", "--step", "last")
    reports.close()
    assert "none yet</td>" in page and "kept no samples" in part(page, "Samples over the training")
    assert "Not measured yet: bits." in part(page, "Curves")


def test_samples_stand_beside_the_validation_of_their_step(corpus, seqlm_command):
    setup = start(corpus, "many", train__eval_every=1, train__sample_chars=20, train__steps=12)
    bits = {r.step: r.val.bits_per_char for r in setup.reports() if r.val}
    shown = part(written(seqlm_command, "--run", "many"), "Samples over the training")
    rows = {row["step"]: row for row in history.samples(setup.run)}
    steps = [int(step) for step in re.findall(r"step (\d+),", shown)]
    assert len(steps) == report.MOST_SAMPLES and (steps[0], steps[-1]) == (1, 12)
    for step in steps:
        assert f"step {step}, {bits[step]:.4f} bits per char" in shown
        assert rows[step]["text"].strip() in shown


def test_nothing_of_a_run_is_taken_for_html(corpus, seqlm_command):
    """Not its name, its note, its samples and the label of its corpus."""
    evil = "<script>alert(1)</script>"
    run = seqlm.train("data/story", run="a<b>&c", **SMALL)
    seqlm_command("runs", "note", "a<b>&c", evil)
    line = {"step": 4, "temperature": 0.8, "seed": 1, "text": f"{evil}\x1b[2J\0"}
    (run.path / history.SAMPLES).write_text(json.dumps(line) + "\n")
    page = written(seqlm_command)
    assert "<script" not in page and "<b>" not in page and "\x1b" not in page and "\0" not in page
    assert page.count("&lt;script&gt;alert(1)") == 2


def test_a_damaged_line_of_samples_is_named(run, seqlm_command):
    (run.path / history.SAMPLES).write_text('{"step": "4"}\n')
    with pytest.raises(InputError, match=r"samples.jsonl, line 1: not a sample. Restore the file"):
        history.samples(run.path)
    (run.path / history.SAMPLES).write_text('{"step": 1, "tem')  # as a kill leaves it
    assert history.samples(run.path) == []


def test_checks_are_shown_if_they_were_asked_for(run, seqlm_command, monkeypatch):
    result = seqlm_command("report", "--check", "--json")
    assert (result.code, result.json["passed"]) == (0, True), result.err
    checks = part(Path("story-mingru.html").read_text("utf-8"), "Checks")
    assert "resume = uninterrupted" in checks and "pass" in checks
    found = [check.Check("one", check.PASS), check.Check("<two>", check.FAIL, detail="why")]
    monkeypatch.setattr(check, "check", lambda *_, **__: found)
    monkeypatch.setattr(check, "IN_ORDER", ("one", "<two>"))
    result = seqlm_command("report", "--check", "--json")
    assert (result.code, result.json["passed"]) == (0, False)
    checks = part(Path("story-mingru.html").read_text("utf-8"), "Checks")
    assert "<two>" in checks and "\N{BALLOT X} fail" in checks and "why" in checks


def test_without_its_corpus_a_report_says_so(run, seqlm_command):
    shutil.rmtree("data")
    result = seqlm_command("report", "--out", "page.html")
    assert result.code == 0 and "data/story" in result.err
    page = Path("page.html").read_text("utf-8")
    assert "was not found" in part(page, "Data") and "Not evaluated" in part(page, "Evaluation")


ERRORS = [
    (["--out", "page.txt"], 2, "--out page.txt: the name must end in .html."),
    (["--run", "nothing"], 3, "--run nothing: neither nothing nor checkpoints/nothing is a run."),
    (["--step", "9"], 3, "has no saved step 9. Saved: 0, 4."),
    (["--out", "no/where/page.html"], 1, "Cannot write no/where/page.html"),
]


@pytest.mark.parametrize("words, code, message", ERRORS, ids=lambda value: str(value)[:30])
def test_what_is_wrong_is_an_error(run, seqlm_command, words, code, message):
    result = seqlm_command("report", *words)
    assert (result.code, result.out) == (code, "") and message in result.err
    assert not list(Path().glob("*.html"))


def test_a_run_that_is_being_trained_is_not_checked(corpus, seqlm_command):
    reports = start(corpus, "busy").reports()
    next(reports)
    result = seqlm_command("report", "--run", "busy", "--step", "last", "--check")
    reports.close()
    assert result.code == 2 and "busy is being trained. Check it after the training" in result.err


def test_without_matplotlib_the_extra_is_named(run, monkeypatch, drawn):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(SeqlmError, match=r"pip install -e '.\[plot\]'"):
        report.report(run, None, None, None)


TRAININGS = [
    dict(cell="lem", preset="tiny", steps=3, width=24, lr=3.1e-4),
    dict(cell="mingru,lem", time_limit="1s", layers=2, width=16, batch=4, length=16),
    dict(preset="base", width=32, layers=1, steps=2, batch=4, length=16, set={"model.tie": True}),
    dict(
        cell="mingru",
        width=16,
        steps=1,
        set={"cell.mingru.expansion": 1.25, "optim.schedule": "constant"},
    ),
]


@pytest.mark.parametrize("given", TRAININGS, ids=lambda given: given.get("preset", "small"))
def test_the_command_gives_the_same_configuration_again(corpus, seqlm_command, given):
    """In the environment of the training, whose runtime the command names."""
    settings = dict(given.get("set", {}))
    flags = {k: v for k, v in given.items() if k not in ("set", "preset")}
    from seqlm.config import merge_settings

    config = launch.configuration(given.get("preset"), None, merge_settings(settings, flags))[0]
    config = config.updated({"data.path": "data/story"})
    environment = {"device": "cpu", "dtype": "float32", "backend": "cpu", "threads": 1}
    saved = replace(saved_of(corpus), config=config, environment=environment)
    line = report.command(saved)
    assert line.startswith("seqlm train --data data/story --run ")
    words = shlex.split(line)[1:]
    result = seqlm_command(*words, "--print-config", "--json")
    assert result.code == 0, result.err
    again = config.updated({f"runtime.{key}": value for key, value in environment.items()})
    assert result.json == {**again.tree(), "data": result.json["data"]}


def saved_of(corpus):
    if not Path("checkpoints/one").exists():
        list(start(corpus, "one", train__steps=1).reports())
    return runs.load(Path("checkpoints/one"))[0]


def test_the_command_repeats_a_run_bit_for_bit(run, seqlm_command):
    lines = re.search(r"<pre>\n(seqlm prepare .*)\n</pre>", written(seqlm_command), re.S)[1]
    before = (run.path / "step-00000004" / "model.safetensors").read_bytes()
    shutil.rmtree("data")
    shutil.rmtree(run.path)
    prepare, train = (shlex.split(line)[1:] for line in unescape(lines).splitlines())
    assert prepare == ["prepare", "TEXT", "--out", "data/story"]
    assert seqlm_command("prepare", "story.txt", *prepare[2:]).code == 0
    assert seqlm_command(*train).code == 0
    assert (run.path / "step-00000004" / "model.safetensors").read_bytes() == before


PREPARED = [  # what the manifest says, what prepares it again
    ("brackets:depth=4", None, {}, "brackets:depth=4"),
    ("stdlib-3.11.0", None, {"--unit": "byte"}, "stdlib --unit byte"),
    ("poems", "12ab", {"--split": "80,20"}, "TEXT --split 80,20"),
]


@pytest.mark.parametrize("label, digest, options, words", PREPARED, ids=lambda x: str(x)[:20])
def test_the_corpus_is_prepared_by_its_own_line(corpus, label, digest, options, words):
    manifest = {"label": label, "text_sha256": digest, "options": options}
    made = SimpleNamespace(manifest=manifest, path=Path("data/it"))
    assert report.preparation(made) == f"seqlm prepare {words} --out data/it\n"


def test_a_training_of_two_processes_is_repeated_with_torchrun(run):
    saved = runs.load(run.path)[0]
    two = replace(saved, environment={**saved.environment, "processes": 2})
    assert report.command(two).startswith("torchrun --nproc-per-node 2 -m -- seqlm train --data")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_the_page_without_a_message_and_without_the_network(
    run, seqlm_command, drawn
):
    """On a telephone in the dark, no part of it is wider than the screen."""
    page = written(seqlm_command, "--check")
    assert not re.search(r"""(?:src|href)=["'](?!data:,|#)|url\((?!#)|@import""", page)
    with browser() as chromium:
        for width, dark, ground in ((1280, False, "255"), (390, True, "22")):
            session = chromium.open(Path("page.html").resolve().as_uri(), width, 844, dark)
            chromium.wait(session, "document.readyState === 'complete'")
            wide = chromium.evaluate(session, "document.documentElement.scrollWidth")
            color = chromium.evaluate(session, "getComputedStyle(document.body).backgroundColor")
            assert wide <= width and color == f"rgb({ground}, {ground}, {ground})"
        assert chromium.errors == []
