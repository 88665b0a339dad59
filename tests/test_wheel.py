"""The package as it is installed from a wheel: a file that it lacks would show only at a user's."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import sentences

ROOT = Path(__file__).parents[1]
SMALL = "--preset tiny --cell mingru,indrnn --width 8 --layers 2 --steps 2 --batch 2 --length 8"
COMMANDS = ["--help", "prepare story.txt", f"train {SMALL} --run one"]
COMMANDS += ["generate the --chars 20 --run one"]
RUN = """
import json, sys
from contextlib import suppress
from seqlm.__main__ import main

for line in json.loads(sys.argv[1]):
    sys.argv = ["seqlm", *line.split()]
    with suppress(SystemExit):
        main()
    print("\\n=====")
print(*sys.modules)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[str]:
    """What the commands wrote that ran from a wheel, and the modules that they loaded."""
    folder = tmp_path_factory.mktemp("wheel")
    source, site = folder / "source", folder / "site"
    source.mkdir()
    shutil.copytree(ROOT / "seqlm", source / "seqlm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    run([sys.executable, "-c", build], source)
    (wheel,) = source.glob("dist/*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    shipped = {p.relative_to(site) for p in (site / "seqlm").rglob("*")}
    owned = {p.relative_to(source) for p in (source / "seqlm").rglob("*") if p.is_file()}
    assert owned <= shipped
    for kept in (ROOT / "seqlm/ops/cpu/__pycache__").glob("seqlm-*"):  # not compiled once more
        shutil.copytree(kept, site / kept.relative_to(ROOT))
    (folder / "story.txt").write_text(sentences(4000))
    ran = [sys.executable, "-c", RUN, json.dumps(COMMANDS)]
    return run(ran, folder, PYTHONPATH=str(site), OMP_NUM_THREADS="1").split("\n=====\n")


def run(command: list[str], folder: Path, **environment: str) -> str:
    own = dict(env=os.environ | environment, cwd=folder, check=True)
    return subprocess.run(command, **own, capture_output=True, text=True).stdout


def test_a_wheel_has_all_that_the_commands_need(said):
    assert "prepare" in said[0]
    assert "train\t3600" in said[1]
    assert "val bits per char" in said[2]
    assert len(said[3]) >= 20


def test_training_and_generation_do_not_load_torchs_compiler(said):
    """It takes longer than torch itself, also for a cell whose slopes are taken, as indrnn."""
    assert {"torch", "seqlm.training.trainer", "seqlm.generation.generate"} <= {*said[-1].split()}
    assert "torch._dynamo" not in said[-1].split()
