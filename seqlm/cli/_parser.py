"""Parses the command line, and says what to use in place of an unknown command or option."""

from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from seqlm.cli._flags import OUTPUT

Context = Any  # of Click, of which Typer has a private copy
CLICK_ERROR: Any = typer.BadParameter.__base__  # for all faults of the command line

GENERATE = "To produce text: seqlm generate"
COMMANDS = {  # names of commands in other tools, and what to use here
    "sample": GENERATE,
    "write": GENERATE,
    "complete": GENERATE,
    "chat": "To continue a text: seqlm generate PROMPT",
    "surprisal": "How surprising a text is: seqlm score FILE",
    "list": "To list runs: seqlm runs. To list known corpora: seqlm prepare --list",
    "resume": "To continue a run: seqlm train --resume",
    "download": "To download a known corpus: seqlm prepare NAME",
}
OPTIONS = {  # {command: {option of another tool: what to use here}}
    "generate": {
        **dict.fromkeys(("--length", "--max-length", "--max-tokens", "--num-chars"), "--chars"),
        **dict.fromkeys(("--count", "--num-samples"), "--samples"),
    },
    "train": {
        "--epochs": "--steps or --time-limit",
        "--learning-rate": "--lr",
        "--hidden-size": "--width",
        "--model": "--cell",
        "--name": "--run",
    },
    "eval": {"--metric": "the name of a metric alone, such as seqlm eval bits-per-char"},
}

NUMBERS = {  # what typer calls a type, and what to write
    "integer": "Give a whole number, such as 500.",
    "number": "Give a number, such as 0.5.",
}


class Command(TyperCommand):
    """A command that knows the options of other tools, and refuses options with an empty value."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        instead = OPTIONS.get(self.name or "", {})
        for word in args[: args.index("--")] if "--" in args else args:
            option = word.partition("=")[0].replace("_", "-")
            if option in instead:
                ctx.fail(f"No such option: {option}. Use {instead[option]}.")
        try:
            typed, *_ = self.make_parser(ctx).parse_args(args=[*args])
        except CLICK_ERROR as error:
            _keep_near(error)
            raise
        for param in self.params:
            option = param.opts[0]
            # an empty value often comes from an unset shell variable; only a prompt may be empty
            if typed.get(param.name) == "" and option[:2] == "--" and option != "--prompt":
                ctx.fail(f"{option} is empty. Give a value, or remove the option.")
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            value = typed.get(error.param.name) if error.param else None
            for kind, remedy in NUMBERS.items():
                if f"valid {kind}" in error.message:
                    error.message = remedy
            if value is not None and repr(value) not in error.message:
                error.message = f"{value!r}. {error.message}"
            raise

    def get_params(self, ctx: Context) -> list[Any]:
        return _plain(super().get_params(ctx))


class Group(TyperGroup):
    """The program.  `seqlm help COMMAND` does the same as `seqlm COMMAND --help`."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] == ["help"] else args)

    def resolve_command(self, ctx: Context, args: list[str]) -> Any:
        if args[0] in COMMANDS and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"There is no command '{args[0]}'. {COMMANDS[args[0]]}")
        return super().resolve_command(ctx, args)

    def get_params(self, ctx: Context) -> list[Any]:
        return _plain(super().get_params(ctx))


def _keep_near(error: Any) -> None:
    """Of the options that Click suggests for an unknown one, keep those with a similar name.

    Click compares the dashes, too, and so suggests --set for --csv.
    """
    if suggested := getattr(error, "possibilities", None):
        name = error.option_name.lstrip("-")
        error.possibilities = [o for o in suggested if get_close_matches(name, [o.lstrip("-")])]


def _plain(params: list[Any]) -> list[Any]:
    """The parameters for --help: switches show no type, and --help stands with the output."""
    for param in params:
        if param.name == "help":
            param.rich_help_panel = OUTPUT
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params
