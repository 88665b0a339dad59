"""Makes commands of functions: their options, the common options, errors and exit codes."""

import inspect
import os
import signal
import stat
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from seqlm import __version__
from seqlm.cli import _streams
from seqlm.cli._flags import OUTPUT, switch
from seqlm.cli._parser import Command, Group
from seqlm.errors import InputError, SeqlmError, UsageError, not_utf8
from seqlm.files import require_place
from seqlm.text.sources import standard_input
from seqlm.ui import Screen

if TYPE_CHECKING:
    from seqlm.text.tokenizer import Tokenizer

GRACE_SECONDS = 5  # from a signal to the end of the process
LARGEST_TEXT = 1 << 28  # bytes that a command reads into memory

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
        # --time_limit is read as --time-limit; values are not changed
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
    "verbose": Annotated[bool, switch("Print more details.", OUTPUT, "--verbose", "-v")],
    "no_color": Annotated[
        bool, switch("Print without colours. NO_COLOR=1 does the same.", OUTPUT, "--no-color")
    ],
    "debug": Annotated[bool, switch("Print a traceback with each error.", OUTPUT, "--debug")],
}


def command(name: str, *examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `function(screen, ...)` as a command that also has the common options.

    A parameter whose type is a dataclass is a group of options: each field becomes an option, and
    the function gets the dataclass.
    examples: command lines that --help shows at its end.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, type] = {}
        options: list[inspect.Parameter] = []
        for parameter in list(inspect.signature(function).parameters.values())[1:]:
            kind = hints[parameter.name]
            if isinstance(kind, type) and is_dataclass(kind):
                groups[parameter.name] = kind
                types = get_type_hints(kind, include_extras=True)
                options += [_option(f.name, types[f.name], f.default) for f in fields(kind)]
            else:
                options.append(_option(parameter.name, kind, parameter.default))
        options += [_option(flag, kind, False) for flag, kind in _COMMON.items()]

        @wraps(function)
        def run(**values: Any) -> None:
            common = {flag: values.pop(flag) for flag in _COMMON}
            for name, group in groups.items():
                values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
            _run(function, values, **common)

        # typer reads it; by setattr (B010), because mypy knows no such attribute of a function
        setattr(run, "__signature__", inspect.Signature(options))  # noqa: B010
        run.__annotations__ = {option.name: option.annotation for option in options}
        return app.command(name, cls=Command, epilog="\n\n".join(["Examples:", *examples]))(run)

    return register


def _option(name: str, hint: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=hint)


def _run(
    function: Callable[..., None],
    values: dict[str, Any],
    json: bool,
    quiet: bool,
    verbose: bool,
    no_color: bool,
    debug: bool,
) -> None:
    """Run a command.  Warnings go to the screen; an error ends it with the error's exit code."""
    screen = Screen(json, quiet, verbose, not no_color)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = lambda message, *_: screen.warn(str(message))
            function(screen, **values)
    except SeqlmError as error:
        if debug:
            traceback.print_exc()
        screen.error(error)
        raise typer.Exit(error.exit_code) from None


def refuse_input(option: str, out: Path | None, source: str) -> None:
    """Raises UsageError where the file to write is the one that is read.

    Raises SeqlmError for a place where no file can be written.
    """
    if out is None:
        return
    require_place(out)
    if source == "-" or not (out.exists() and Path(source).exists()):
        return
    if out.samefile(source):
        raise UsageError(f"{option} {out} is the file that is read. Choose another name.")


def read_source(
    option: str, source: str, remedy: str = "Give a shorter one.", head: int | None = None
) -> bytes:
    """The bytes of a regular file, or of standard input for '-'; InputError names the option.

    A text above LARGEST_TEXT is refused with the remedy: it would fill the memory, and a pipe may
    never end.  head: read only so many bytes of the text.
    """
    most = LARGEST_TEXT + 1 if head is None else head
    try:
        if source == "-":
            text = standard_input().read(most)
        elif not stat.S_ISREG(os.stat(source).st_mode):  # reading a device may never end
            raise InputError(
                f"{option} {source} is not a regular file. Give a regular file, or give - and pipe "
                "the text into the command."
            )
        else:
            with open(source, "rb") as file:
                text = file.read(most)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{option} {source}: {reason}. Check the path.") from error
    if len(text) > LARGEST_TEXT:
        raise InputError(
            f"{option} {source}: the text has more than {LARGEST_TEXT / 1e6:,.0f} MB. {remedy}"
        )
    return text


def refuse_other_encoding(source: str, text: bytes, tokenizer: "Tokenizer") -> None:
    """Raises InputError, naming the file, for bytes that are no UTF-8 where the run needs it."""
    if tokenizer.unit == "byte" or source == "-":
        return
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        convert = f"iconv -f CP1252 -t UTF-8 {quote(source)} > NEW_FILE"
        raise not_utf8(source, error, f"If it is CP1252, convert it: {convert}") from None


def main() -> None:
    """The console script.  A command's error ends it with its exit code, Ctrl-C with 130.

    SIGTERM and SIGHUP (a closed terminal) end a command as an exception does, so that nothing is
    left half-written.  Python drops exceptions at a few places, in a destructor for example, so
    the process ends after a few seconds in any case.
    """
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
        signal.signal(signal.SIGHUP, _end)
    if "--no-color" in sys.argv:
        os.environ["NO_COLOR"] = "1"  # for errors in the command line itself
    share_cores()
    _streams.guard()
    try:
        try:
            app(prog_name="seqlm")
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:  # typer catches it only once it has built the commands
        sys.exit(130)
    except (OSError, MemoryError) as error:
        if "--debug" in sys.argv:
            raise
        sys.stdout = None  # Python would flush it at exit, and fail again
        if not isinstance(error, BrokenPipeError):  # the reader, such as head, has read enough
            print(f"error: {_reason(error)}", file=sys.stderr)
        sys.exit(1)


def _reason(error: OSError | MemoryError) -> str:
    """What the system refused, and what to do."""
    if isinstance(error, MemoryError):
        return "The memory is full. Use a shorter text, a smaller model or a smaller batch."
    reason = error.strerror or str(error)
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{where}{reason}. Check the path, its permissions and the free disk space."


def share_cores() -> None:
    """Let idle threads of torch sleep soon, because the compiled loops have threads of their own.

    By default libgomp's threads wait for work in a busy loop of some milliseconds, and occupy the
    cores that the other threads need.  libgomp reads the variable once, when torch is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _end(number: int, frame: object) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
    signal.alarm(GRACE_SECONDS)
    sys.exit(128 + number)
