"""The walls: imports point one way, and the command line answers without torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import seqlm

PACKAGE = Path(seqlm.__file__).parent
ORDER = (
    "errors extras files temporary manifest config seeds progress runtime graphs ops cells model "
    "text store draw evaluation generation run training api ui lab cli __main__"
).split()
WINGS = {
    "text": "sources download staging splits synthetic tokenizer corpus corpora card prepare ready",
    "store": "checkpoint history runs book",
    "evaluation": "ensemble passage evaluate dynamic ppm mix score inspect novelty",
    "generation": "automaton pattern context generate predict items",
    "training": "parallel batches optimizer trainer snapshot loop launch",
}


def place(name: str) -> tuple[int, int]:
    """The place of a module of seqlm, by its dotted name: in ORDER, and then in its wing's."""
    first, _, rest = name.partition(".")
    files = WINGS.get(first, "").split()
    inner = rest.partition(".")[0]
    return ORDER.index(first), files.index(inner) if files and inner else -1


def imported(path: Path) -> set[str]:
    """The modules of seqlm that a file imports, anywhere in it, by their dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in (
            "seqlm",
            *(f"seqlm.{w}" for w in WINGS),
        ):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seqlm."):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("seqlm.")}
    return {name.removeprefix("seqlm.") for name in found} - {"__version__"}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    here = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    above = {name for name in imported(path) if name != here and place(name) > place(here)}
    assert not above, f"{here} imports {above}, which stand above it"


def test_no_function_is_longer_than_a_page():
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.body[0].lineno
                if lines > 60:
                    long.append(f"{path.name}:{node.name} {lines}")
    assert not long


def test_what_cells_share_uses_no_cell():
    """So the file of any cell can be removed."""
    shared = [*(PACKAGE / "cells").glob("_[a-z]*.py")]
    assert shared and not [
        (path.name, name)
        for path in shared
        for name in imported(path)
        if re.match(r"cells\.[a-z]", name)
    ]


@pytest.mark.parametrize("name", ["seqlm", "seqlm.cli", "seqlm.cells", "seqlm.lab.llm"])
def test_importing_without_a_model_imports_no_torch(name):
    code = f"import {name}\nimport sys\nprint('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_the_public_names_are_these():
    assert seqlm.__all__ == ["Run", "__version__", "load", "train"]
    for name in seqlm.__all__:
        assert getattr(seqlm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = seqlm.nothing


def test_nothing_reads_or_writes_a_pickle():
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"import pickle|torch\.(load|save)\(|allow_pickle=True", source), path


def test_no_cell_and_no_op_names_a_backend():
    """seqlm/ops/dispatch.py alone chooses; what an op is does not depend on what computes it."""
    backends = {"reference", "torch", "cpu", "triton"}
    files = [*(PACKAGE / "cells").glob("*.py"), *(PACKAGE / "ops").glob("*.py")]
    files = {path.stem: path for path in files} | {"model": PACKAGE / "model.py"}
    for chooser in ("dispatch", "trial"):
        del files[chooser]
    for path in files.values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            # "cpu" is a device's name, too
            named = {node.value} - {"cpu"} if isinstance(node, ast.Constant) else set()
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seqlm.ops."):
                named = {node.module.split(".")[2]}
            assert not (named & backends), f"{path.name} names {named & backends}"
