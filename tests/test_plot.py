"""Curves of runs: the figures they show, and the files and texts that show them."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from seqlm import draw
from seqlm.errors import InputError, SeqlmError, UsageError
from seqlm.store import history

SVG = "{http://www.w3.org/2000/svg}"


def made_run(name, steps=40, every=10, start=4.0):
    """A run's folder with metrics of a training that learns; no model."""
    folder = Path("checkpoints", name)
    (folder / "step-00000000").mkdir(parents=True)
    metrics, timing = [], []
    for step in range(1, steps + 1):
        loss = 1 + start / step
        row = dict(step=step, chars=100 * step, loss=loss, lr=step / 1000, grad_norm=2 * loss)
        if step % every == 0:
            row |= dict(val_bits_per_char=loss + 1, val_bits_per_byte=loss, val_accuracy=0.5)
        metrics.append(json.dumps(row) + "\n")
        timing.append(json.dumps(dict(step=step, chars=100 * step, seconds=step / 2)) + "\n")
    (folder / "metrics.jsonl").write_text("".join(metrics))
    (folder / "timing.jsonl").write_text("".join(timing))
    return folder


@pytest.fixture
def two():
    return {name: [made_run(name, start=start)] for name, start in (("$one", 4.0), ("_two", 3.0))}


def test_the_history_of_a_run_is_its_metrics_with_seconds(run):
    rows = history.read(run.path)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    seconds = [json.loads(line) for line in (run.path / "timing.jsonl").read_text().splitlines()]
    known = [{k: v for k, v in line.items() if v is not None} for line in lines]
    assert rows == [
        line | {"seconds": s["seconds"]} for line, s in zip(known, seconds, strict=True)
    ]


def test_a_history_ends_before_a_line_that_a_kill_cut_short_and_refuses_other_damage(two):
    (folder,) = two["$one"]
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 41, "los')
    assert len(history.read(folder)) == 40
    for damage in ('{"step": "x"}\n', "[1]\n", "1\n", "}\n", '{"step": 1' + "0" * 400 + "}\n"):
        metrics.write_text(whole + damage)
        with pytest.raises(InputError, match="line 41: not an object of numbers"):
            history.read(folder)
    metrics.unlink()
    with pytest.raises(InputError, match="is missing, so the run has no curves"):
        history.read(folder)


@pytest.mark.parametrize(
    "x, y, last",
    [
        ("steps", "bits", (40, 2.1)),
        ("chars", "loss", (4000, 1.1)),
        ("seconds", "grad-norm", (20, 2.2)),
        ("steps", "lr", (40, 0.04)),
        ("steps", "speed", (40, 200)),
    ],
)
def test_a_panel_has_the_figure_that_is_asked_for(two, x, y, last):
    curve = draw.panel(two, x, y).curves[0]
    assert curve.points[-1] == pytest.approx(last)
    assert len(curve.points) == (4 if y == "bits" else 40)


def test_a_long_curve_has_means_of_several_steps():
    folder = made_run("long", steps=1000)
    points = draw.panel({"long": [folder]}, "steps", "lr").curves[0].points
    assert len(points) == draw.POINTS
    assert points[0] == pytest.approx((5, 0.003))


def test_runs_are_compared_by_bits_per_byte_where_one_has_no_characters(two):
    (folder,) = two["$one"]
    metrics = folder / "metrics.jsonl"
    metrics.write_text(
        metrics.read_text().replace('bits_per_char": ', 'bits_per_char": null, "x": ')
    )
    panel = draw.panel(two)
    assert panel.y_label == "val bits per byte"
    assert [curve.points[-1][1] for curve in panel.curves] == pytest.approx([1.1, 1.075])


def test_the_first_large_values_do_not_make_the_rest_flat(two):
    panel = draw.panel(two, y="loss")
    largest = max(y for curve in panel.curves for _, y in curve.points)
    assert largest == 5.0 and panel.limits()[0] > 1 and panel.limits()[1] < 2.5


def test_a_curve_far_above_the_others_is_drawn_to_its_end(two):
    """One validation of a run at 8 bits, beside two curves that end near 2."""
    high = made_run("high", steps=10, start=60.0)
    panel = draw.panel({**two, "high": [high]})
    assert panel.limits()[0] < 2.075 and panel.limits()[1] > 8
    text = "".join(part for part, _ in draw.characters(panel, 60))
    assert "x high 8" in text and text.count("x") > 1


def test_both_formats_are_valid_and_name_every_run(two):
    axes = dict(xs=("steps", "seconds"), ys=("bits", "loss"), title="A < B")
    figure = draw.figure(two, **axes)
    svg = draw.saved(figure, "svg")
    texts = [node.text for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert {"A < B", "$one 2.1", "_two 2.075", "steps", "seconds of training"} <= {*texts}
    assert figure._repr_svg_().startswith("<?xml")
    assert draw.saved(figure, "png").startswith(b"\x89PNG\r\n\x1a\n")
    assert svg == draw.saved(draw.figure(two, **axes), "svg"), "the same curves, the same file"


def test_an_svg_inside_a_page_is_one_element_in_the_colour_of_the_page(two):
    svg = draw.curves_svg(two, title='"A" & B')
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg" and root.get("aria-label") == '"A" & B'
    assert draw.GREY not in svg and "currentColor" in svg


def test_what_cannot_be_drawn_is_refused(two, monkeypatch):
    with pytest.raises(UsageError, match="Unknown x axis 'step'. Did you mean 'steps'"):
        draw.panel(two, "step")
    with pytest.raises(UsageError, match="Unknown y axis 'losses'. Did you mean 'loss'"):
        draw.panel(two, y="losses")
    early = made_run("early", steps=5)
    with pytest.raises(InputError, match="early has no bits over steps yet. Choose another"):
        draw.panel({"early": [early]})
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(SeqlmError, match=r"matplotlib is not installed. Run .*\.\[plot\]"):
        draw.figure(two)


# The command


def test_without_out_the_curves_are_drawn_as_text_without_escapes(two, seqlm_command):
    result = seqlm_command("plot", "$one", "checkpoints/_two", "--y", "bits,lr")
    assert result.code == 0, result.err
    assert not re.search(r"[^ -~\n│┤└─]", result.out)
    lines = result.out.splitlines()
    assert lines[0] == "val bits per character" and max(map(len, lines)) == 100
    assert lines[-2:] == ["o $one 0.04", "+ _two 0.04"]
    drawn = [line.partition("┤")[2] or line.partition("│")[2] for line in lines[1:17]]
    last_column = [line[-1] for line in drawn if len(line) == 93]
    assert last_column == ["o", "+"], "4 falls to 2.1 and 3 to 2.075: both end at the right edge"


@pytest.mark.parametrize("kind", ["svg", "PNG"])
def test_with_out_the_picture_is_written_and_the_last_values_are_shown(two, seqlm_command, kind):
    result = seqlm_command("plot", "$one", "_two", "--x", "chars", "--out", f"a.{kind}")
    assert result.out.splitlines() == [
        "run\tfigure\tlast\tlowest",
        "$one\tval bits per character\t2.1000\t2.1000",
        "_two\tval bits per character\t2.0750\t2.0750",
    ]
    assert Path(f"a.{kind}").read_bytes()[:5] == (b"<?xml" if kind == "svg" else b"\x89PNG\r")


def test_a_name_that_two_runs_share_is_shown_with_its_folder(two, seqlm_command):
    shutil.copytree("checkpoints/$one", "other/$one")
    result = seqlm_command("plot", "$one", "other/$one", "--json").json
    assert [curve["run"] for curve in result["curves"]] == ["checkpoints/$one", "other/$one"]
    assert result["curves"][0]["points"] == result["curves"][1]["points"]
    assert result["curves"][0]["points"][-1] == [40, pytest.approx(2.1)]


@pytest.mark.parametrize(
    "given, code, message",
    [
        (["nothing"], 3, "RUN nothing: neither nothing nor checkpoints/nothing is a run."),
        (["--x", "step"], 2, "Unknown x axis 'step'. Did you mean 'steps'?"),
        (["--y", "bits,losses"], 2, "Unknown y axis 'losses'. Did you mean 'loss'?"),
        (["--out", "a.pdf"], 2, "--out a.pdf: the name must end in .svg or .png."),
        (["--out", "nothing/a.svg"], 1, "Cannot write nothing/a.svg"),
    ],
)
def test_errors_of_the_command(two, seqlm_command, given, code, message):
    result = seqlm_command("plot", *given)
    assert result.code == code and message in result.err
    assert not result.out and not list(Path().glob("a.*"))


def test_a_run_plots_itself_and_others(run):
    figure = run.plot(run, x="chars", y="loss")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "characters read" and len(axes.lines) == 1
    assert axes.lines[0].get_ydata()[-1] == history.read(run.path)[-1]["loss"]
