"""Curves of runs: the figures they show, and the files and texts that show them."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from seqlm import draw
from seqlm.errors import InputError, SeqlmError, UsageError
from seqlm.store.runs import history

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
    rows = history(run.path)
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
    assert len(history(folder)) == 40
    for damage in ('{"step": "x"}\n', "[1]\n", "1\n", "}\n", '{"step": 1' + "0" * 400 + "}\n"):
        metrics.write_text(whole + damage)
        with pytest.raises(InputError, match="line 41: not an object of numbers"):
            history(folder)
    metrics.unlink()
    with pytest.raises(InputError, match="is missing, so the run has no curves"):
        history(folder)


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
    with pytest.raises(UsageError, match="Unknown value of x 'step'. Did you mean 'steps'"):
        draw.panel(two, "step")
    with pytest.raises(UsageError, match="Unknown value of y 'losses'. Did you mean 'loss'"):
        draw.panel(two, y="losses")
    early = made_run("early", steps=5)
    with pytest.raises(InputError, match="early has no bits over steps yet. Choose another"):
        draw.panel({"early": [early]})
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(SeqlmError, match=r"matplotlib is not installed. Run .*\.\[plot\]"):
        draw.figure(two)
