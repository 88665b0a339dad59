"""A page that generates text in a browser: one file with the step, the weights and the scripts.

The step is the list of operators of trace.py; web/step.js computes them.  Nothing is fetched, so
the page also runs when it is opened as a file.
"""

import base64
import os
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from seqlm import __version__
from seqlm.errors import UsageError
from seqlm.lab import tint
from seqlm.lab.page import page, value
from seqlm.lab.trace import Graph, trace
from seqlm.model import parameter_count
from seqlm.run import Run
from seqlm.temporary import bring_back, new_folder

WEB, FILE = Path(__file__).parent / "web", "index.html"
MARK, HEAD = b"<!-- Written by seqlm export -->", 1 << 14  # the mark is in so many first bytes
SYMBOLS = {"char": "characters", "byte": "bytes", "sentencepiece": "pieces of words"}


def write_page(run: Run, folder: Path, weights: str, force: bool) -> int:
    """Write the page into the folder; returns its size in bytes.

    weights: the numbers in matrices, float32, float16 or int8; all others stay in float32.
    force: replace a page that exists.
    Raises UsageError where something else exists, SeqlmError for a cell that cannot be exported.
    """
    refuse_to_overwrite(folder, force)
    text = _page(run, weights).encode("utf-8", "replace")  # a run's name may be no UTF-8
    with new_folder(folder, lambda: refuse_to_overwrite(folder, force)) as new:
        (new / FILE).write_bytes(text)
    return len(text)


def refuse_to_overwrite(folder: Path, force: bool) -> None:
    """Raises UsageError if a page may not be written there."""
    bring_back(folder)
    if not os.path.lexists(folder):
        return
    if folder.resolve() == Path.cwd():  # the shell would stay in the old folder
        raise UsageError(f"{folder} is the current folder. Choose another place with --web DIR.")
    names = os.listdir(folder) if folder.is_dir() else None
    if names == []:
        return
    if names != [FILE] or not _is_ours(folder / FILE):
        raise UsageError(
            f"{folder} exists and is not a page of seqlm export, or holds other files, too. Choose "
            "another place with --web DIR."
        )
    if not force:
        raise UsageError(
            f"{folder} exists. Replace it with --force, or choose another place with --web DIR."
        )


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return MARK in file.read(HEAD)


def _page(run: Run, weights: str) -> str:
    graph = trace(run)
    title = f"Text from {run.path.name}"
    about = (
        f"A model of {SYMBOLS[run.tokenizer.unit]} with the cell {graph.cell} and "
        f"{parameter_count(run.model):,} parameters, trained with seqlm. It computes on this page; "
        "nothing is sent."
    )
    body = _part("body.html").replace("{{step.js}}", _part("step.js"))
    body = body.replace("{{about}}", escape(about)).replace("{{title}}", escape(title))
    script = _model(run, graph, weights) + _part("page.js")
    return page(title, body, _part("page.css"), script, allowed="worker-src blob:")


def _part(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def _model(run: Run, graph: Graph, weights: str) -> str:
    """The script of a model, with its numbers in base64."""
    tokenizer = run.tokenizer
    matrices = graph.matrices()
    constants: dict[str, dict[str, Any]] = {}
    numbers = b""
    for name, constant in graph.constants.items():
        kind = weights if name in matrices else "float32"
        constants[name] = {"shape": [*constant.shape], "type": kind, "start": len(numbers)}
        numbers += encoded(constant, kind)
        numbers += bytes(-len(numbers) % 4)  # float32 begins at a multiple of 4
    model = {
        "seqlm": __version__,
        "step": run.step,
        "unit": tokenizer.unit,
        "prompts": tokenizer.unit != "sentencepiece",
        "texts": [text.hex() for text in tokenizer.texts],
        "beginning": run.model.beginning,
        "end": tokenizer.end,
        "levels": [
            {"from": limit, "text": text, "color": tint.color(number)}
            for limit, (number, text) in zip(tint.SURPRISE, tint.legend([""])[1:], strict=True)
        ],
        "nodes": graph.nodes,
        "constants": constants,
        "states": [
            {"name": name, "shape": [*state.shape], "initial": state.flatten().tolist()}
            for name, state in zip(graph.state_names, graph.initial, strict=True)
        ],
        "outputs": graph.outputs,
    }
    data = base64.b64encode(numbers).decode("ascii")
    return f'const MODEL = {value(model)};\nconst WEIGHTS = "{data}";\n'


def encoded(numbers: Tensor, kind: str) -> bytes:
    """The numbers in little-endian order; int8: first a scale in float32 for each row."""
    array = numbers.numpy()
    if kind != "int8":
        return array.astype("<f4" if kind == "float32" else "<f2").tobytes()
    scales = np.abs(array).max(axis=1, keepdims=True) / 127
    scales = np.where(scales == 0, 1, scales).astype("<f4")
    return scales.tobytes() + np.round(array / scales).astype(np.int8).tobytes()
