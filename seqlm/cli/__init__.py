"""The command line: one short file a command.  Importing it imports no torch."""

# importing a module registers its command, in the order of --help; the names are not used (F401)
from seqlm.cli import prepare, train, evaluate, generate, score, predict  # isort: skip  # noqa: F401
from seqlm.cli import inspect, compress, export, check, compare, plot, report  # isort: skip  # noqa: F401
from seqlm.cli import bench, results, cells, runs, env  # isort: skip  # noqa: F401
from seqlm.cli._app import main

__all__ = ["main"]
