"""The command line: one short file a command.  Importing it imports no torch."""

from seqlm.cli import prepare, train, evaluate, generate, check, compare, bench, cells, runs, env  # isort: skip  # --help's order
from seqlm.cli._app import main

__all__ = [
    "bench",
    "cells",
    "check",
    "compare",
    "env",
    "evaluate",
    "generate",
    "main",
    "prepare",
    "runs",
    "train",
]
