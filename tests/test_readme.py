"""What the README shows, runs: its commands, its own cell and its Python, on smaller models."""

import re
import shlex
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SMALLER = ["--preset", "tiny", "--width", "8", "--layers", "1", "--steps", "2", "--threads", "1"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("seqlm ")]


def own_cell(folder: Path) -> None:
    (block,) = [block for block in blocks("python") if "class " in block]
    (folder / "ema.py").write_text(block)


def test_the_readmes_commands_run_in_order_as_shown(seqlm_command, tmp_path):
    """Later flags win, so training is given a smaller model, or fewer steps where it goes on,
    behind the README's own flags."""
    own_cell(tmp_path)
    (tmp_path / "poems.txt").write_text("Roses are red, violets are blue.\n" * 40)
    (tmp_path / "functions.txt").write_text("\n".join(f"get_{i}_of" for i in range(500)))
    sums = (f"{i}+{j}={i + j}\n" for i in range(30) for j in range(30))
    (tmp_path / "sums.txt").write_text("".join(sums))
    shown = commands()
    assert {command[1] for command in shown} >= {
        *("prepare", "train", "eval", "generate", "cells", "runs", "env")
    }
    for command in shown:
        training = command[1] == "train" and "--print-config" not in command
        if training and "--resume" in command:
            command += ["--steps", "4"]
        elif training:
            command = [word for word in command if word not in ("--time-limit", "5m")] + SMALLER
        result = seqlm_command(*command[1:])
        assert result.code == 0, f"{shlex.join(command)}\n{result.err}"


def test_the_readmes_python_runs(seqlm_command, tmp_path, small_library):
    assert seqlm_command("prepare", "stdlib").code == 0
    (block,) = [block for block in blocks("python") if "seqlm.train" in block]
    assert "steps=500" in block
    exec(block.replace("steps=500", "steps=2, preset='tiny', width=8, layers=1"), {})


def test_every_command_of_the_readme_has_its_help(seqlm_command):
    for name in {command[1] for command in commands()}:
        assert seqlm_command(name, "--help").code == 0


@pytest.mark.parametrize("name", ["LICENSE", "CHANGELOG.md", "constraints.txt", "Makefile"])
def test_the_files_the_readme_speaks_of_exist(name):
    assert (Path(__file__).parents[1] / name).is_file()
