"""How a command line is read, and what is said where a command or an option does not exist."""

from typing import Any

from typer.core import TyperCommand, TyperGroup

from seqlm.cli._flags import OUTPUT

Context = Any  # Click's; Typer has a copy of Click inside, which is not for import

GENERATE = "To produce text: seqlm generate"
COMMANDS = {  # what people type, and the nearest thing that there is
    "sample": GENERATE,
    "write": GENERATE,
    "complete": GENERATE,
    "chat": "To continue a text: seqlm generate PROMPT",
    "score": "For the bits per character of a text: seqlm eval --text FILE",
    "plot": "To compare cells, with a picture: seqlm compare",
    "export": "A run is a folder of safetensors, JSON and TOML files. List yours: seqlm runs",
    "list": "To list runs: seqlm runs. To list known corpora: seqlm prepare --list",
    "resume": "To continue a run: seqlm train --resume",
    "download": "To download a known corpus: seqlm prepare NAME",
}
OPTIONS = {
    "generate": {
        **dict.fromkeys(("--length", "--max-length", "--max-tokens", "--num-chars"), "--chars"),
        **dict.fromkeys(("--num-samples", "--count"), "--samples"),
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


class Command(TyperCommand):
    """A command whose errors name the option to use instead of one that is often tried."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        instead = OPTIONS.get(self.name or "", {})
        for word in args[: args.index("--")] if "--" in args else args:
            option = word.partition("=")[0].replace("_", "-")
            if option in instead:
                ctx.fail(f"No such option: {option}. Use {instead[option]}.")
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Context) -> list[Any]:
        return _plain(super().get_params(ctx))


class Group(TyperGroup):
    """The program: `seqlm help COMMAND` is `seqlm COMMAND --help`."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] == ["help"] else args)

    def resolve_command(self, ctx: Context, args: list[str]) -> Any:
        if args[0] in COMMANDS and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"There is no command '{args[0]}'. {COMMANDS[args[0]]}")
        return super().resolve_command(ctx, args)

    def get_params(self, ctx: Context) -> list[Any]:
        return _plain(super().get_params(ctx))


def _plain(params: list[Any]) -> list[Any]:
    """The parameters; --help shows no type for an option without a value, and itself among what
    is printed."""
    for param in params:
        if param.name == "help":
            param.rich_help_panel = OUTPUT
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params
