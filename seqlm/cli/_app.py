"""What the commands share: the flags that mean the same in all of them, and how errors end."""

import inspect
import os
import signal
import stat
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, get_type_hints

import typer

from seqlm import __version__
from seqlm.cells import names as cell_names
from seqlm.cli import _complete
from seqlm.config import presets
from seqlm.errors import InputError, SeqlmError
from seqlm.text.sources import standard_input
from seqlm.ui import Screen

AT_THE_LATEST = 5  # seconds

app = typer.Typer(
    name="seqlm",
    help="Train, compare and use character-level language models with modern recurrent networks.",
    epilog="Start with: seqlm train, then seqlm eval and seqlm generate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # --time_limit is --time-limit; a single dash and a bare value are left alone
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"seqlm {__version__}")
        raise typer.Exit()


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    pass


Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="A corpus: a path, or a name in data/.",
        autocompletion=_complete.corpora,
    ),
]
RunName = Annotated[
    str | None,
    typer.Option(
        "--run",
        metavar="DIR",
        help="A run: a path, or a name in checkpoints/.",
        autocompletion=_complete.runs,
    ),
]
Step = Annotated[
    str, typer.Option("--step", metavar="best|last|N", help="Which saved step to read.")
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="auto|cuda|mps|cpu",
        help="Where to compute.",
        autocompletion=_complete.one_of("auto", "cuda", "mps", "cpu"),
    ),
]
Threads = Annotated[int | None, typer.Option(metavar="N", help="CPU threads; 0 takes all cores.")]
OwnCell = Annotated[
    str | None,
    typer.Option(
        "--cell",
        metavar="FILE.py",
        help="The cell file of a run trained with one.",
        autocompletion=_complete.files,
    ),
]
CELLS = ", ".join(cell_names())
PRESETS = ", ".join(presets())

_COMMON = {
    "json": Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Only the key value.")],
    "verbose": Annotated[bool, typer.Option("--verbose", "-v", help="More on stderr.")],
    "no_color": Annotated[bool, typer.Option("--no-color", help="No colours (also NO_COLOR).")],
    "debug": Annotated[bool, typer.Option("--debug", help="A traceback for errors.")],
}


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `function(screen, ...)` as a command that also has the common flags."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function).parameters.values())[1:]
        common = [
            inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hint)
            for flag, hint in _COMMON.items()
        ]

        @wraps(function)
        def run(**values) -> None:
            flags = {flag: values.pop(flag) for flag in _COMMON}
            screen = Screen(flags["json"], flags["quiet"], flags["verbose"], not flags["no_color"])
            try:
                with warnings.catch_warnings():
                    if not flags["debug"]:
                        warnings.showwarning = lambda message, *_: screen.warn(str(message))
                    function(screen, **values)
            except SeqlmError as error:
                if flags["debug"]:
                    raise
                screen.error(error)
                raise typer.Exit(error.exit_code) from None

        hints = get_type_hints(function, include_extras=True)
        run.__signature__ = inspect.Signature([*own, *common])
        run.__annotations__ = {**{p.name: hints[p.name] for p in own}, **_COMMON}
        return app.command(name)(run)

    return register


def read_source(option: str, source: str) -> bytes:
    """The bytes of a plain file, or of standard input for '-'; InputError names the option."""
    try:
        if source == "-":
            return standard_input().read()
        if not stat.S_ISREG(os.stat(source).st_mode):  # a device may never end
            raise InputError(
                f"{option} {source}: this is not a plain file. Give a plain file, or - and pipe "
                "the text into the command."
            )
        return Path(source).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{option} {source}: {reason}. Check the path.") from error


def main() -> None:
    """The console script: errors of the commands end in their exit code, Ctrl-C in 130.

    SIGTERM ends a command as an exception does, so that it leaves nothing half-written; at the
    latest after some seconds, since Python drops exceptions at a few places.
    """
    signal.signal(signal.SIGTERM, _end)
    app(prog_name="seqlm")


def _end(number: int, frame: object) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
    signal.alarm(AT_THE_LATEST)
    sys.exit(128 + number)
