"""The package as it is installed from a wheel: a file that it lacks would show only at a user's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import sentences

ROOT = Path(__file__).parents[1]


def test_a_wheel_has_all_that_the_commands_need(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copytree(ROOT / "seqlm", source / "seqlm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        "dist",
        "./source",
    ]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    install = ["install", "--no-deps", "--no-index", "--target", "site", str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True)

    def seqlm(*arguments: str) -> str:
        own = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "seqlm", *arguments]
        return subprocess.run(command, env=own, check=True, capture_output=True, text=True).stdout

    shipped = {p.relative_to(tmp_path / "site") for p in (tmp_path / "site/seqlm").rglob("*")}
    owned = {p.relative_to(source) for p in (source / "seqlm").rglob("*") if p.is_file()}
    assert owned <= shipped
    assert "prepare" in seqlm("--help")
    (tmp_path / "story.txt").write_text(sentences(4000))
    seqlm("prepare", "story.txt")
    small = ["--preset", "tiny", "--width", "8", "--layers", "1", "--steps", "2"]
    seqlm("train", "--batch", "2", "--length", "8", *small, "--run", "one")
    assert len(seqlm("generate", "the", "--chars", "20", "--run", "one")) >= 20
