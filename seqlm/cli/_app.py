"""What makes a function a command: its options, the flags that all commands have, its end."""

import inspect
import os
import re
import signal
import stat
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from seqlm import __version__
from seqlm.cli import _streams
from seqlm.cli._flags import OUTPUT, switch
from seqlm.cli._parser import Command, Group
from seqlm.errors import InputError, SeqlmError, UsageError
from seqlm.text.sources import standard_input
from seqlm.ui import Screen

AT_THE_LATEST = 5  # seconds

app = typer.Typer(
    name="seqlm",
    cls=Group,
    help="Train, compare and use character-level language models with modern recurrent networks.",
    epilog="Start with: seqlm train, then seqlm eval and seqlm generate. Help for a command: "
    "seqlm COMMAND --help",
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
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


_COMMON = {
    "json": Annotated[bool, switch("Print the result as one JSON object.", OUTPUT, "--json")],
    "quiet": Annotated[bool, switch("Print only the main result.", OUTPUT, "--quiet", "-q")],
    "verbose": Annotated[bool, switch("Print more on standard error.", OUTPUT, "--verbose", "-v")],
    "no_color": Annotated[
        bool, switch("Print without colours, as with NO_COLOR set.", OUTPUT, "--no-color")
    ],
    "debug": Annotated[bool, switch("Print a traceback with an error.", OUTPUT, "--debug")],
}


def command(name: str, *examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `function(screen, ...)` as a command that also has the common flags.

    A parameter whose type is a dataclass is a group of flags: its fields become options, and the
    function gets the dataclass.
    examples: command lines to show at the end of --help.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = list(inspect.signature(function).parameters.values())[1:]
        groups = {p.name: hints[p.name] for p in own if is_dataclass(hints[p.name])}
        options: list[inspect.Parameter] = []
        for parameter in own:
            group = groups.get(parameter.name)
            single = _option(parameter.name, hints[parameter.name], parameter.default)
            options += _options_of(group) if group else [single]
        options += [_option(flag, hint, False) for flag, hint in _COMMON.items()]
        places = _places(options)

        @wraps(function)
        def run(**values: Any) -> None:
            flags = {flag: values.pop(flag) for flag in _COMMON}
            empty = [shown for name, shown in places.items() if values[name] == ""]
            for name, group in groups.items():
                values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
            _run(function, values, empty, **flags)

        # typer reads it; mypy knows no such attribute of a function, so it is not simply assigned
        setattr(run, "__signature__", inspect.Signature(options))  # noqa: B010
        run.__annotations__ = {option.name: option.annotation for option in options}
        return app.command(name, cls=Command, epilog="\n\n".join(["Examples:", *examples]))(run)

    return register


def _options_of(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [_option(field.name, hints[field.name], field.default) for field in fields(group)]


def _option(name: str, hint: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=hint)


def _places(options: Sequence[inspect.Parameter]) -> dict[str, str]:
    """The options that name files, folders or runs, and each as it is typed."""
    found = {}
    for option in options:
        for info in get_args(option.annotation)[1:]:
            kinds = set(re.split(r"[^A-Z]+", info.metavar or ""))
            if kinds & {"DIR", "FILE", "RUN"}:
                found[option.name] = f"--{option.name.replace('_', '-')}"
    return found


def _run(
    function: Callable[..., None],
    values: dict[str, Any],
    empty: Sequence[str],
    json: bool,
    quiet: bool,
    verbose: bool,
    no_color: bool,
    debug: bool,
) -> None:
    """Run a command: its warnings go to the screen, and its errors end it with their exit code."""
    screen = Screen(json, quiet, verbose, not no_color)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = lambda message, *_: screen.warn(str(message))
            if empty:  # as of a shell's variable that is not set
                raise UsageError(f"{empty[0]} is an empty name. Give a name, or leave it out.")
            function(screen, **values)
    except SeqlmError as error:
        if debug:
            traceback.print_exc()
        screen.error(error)
        raise typer.Exit(error.exit_code) from None


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

    SIGTERM, and SIGHUP of a terminal that is closed, end a command as an exception does, so that it
    leaves nothing half-written; at the latest after some seconds, since Python drops exceptions at
    a few places.
    """
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
        signal.signal(signal.SIGHUP, _end)
    if "--no-color" in sys.argv:
        os.environ["NO_COLOR"] = "1"  # for errors before a command has its flags
    share_cores()
    _streams.guard()
    try:
        try:
            app(prog_name="seqlm")
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except (OSError, MemoryError) as error:
        if "--debug" in sys.argv:
            raise
        sys.stdout = None  # what it still holds cannot be written at the end, either
        if not isinstance(error, BrokenPipeError):  # as when `head` has read enough
            print(f"error: {_reason(error)}", file=sys.stderr)
        sys.exit(1)


def _reason(error: OSError | MemoryError) -> str:
    """What the system refused, and what to do."""
    if isinstance(error, MemoryError):
        return "The memory is full. Use a shorter text, a smaller model or a smaller batch."
    reason = error.strerror or str(error)
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{where}{reason}. Check the place, its rights and the free space."


def share_cores() -> None:
    """Let torch's idle threads sleep soon, as the compiled loops have threads of their own.

    By default libgomp's threads wait for their next work by turning, for milliseconds, on the cores
    that the loops' threads need.  It reads the variable once, when torch is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _end(number: int, frame: object) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
    signal.alarm(AT_THE_LATEST)
    sys.exit(128 + number)
