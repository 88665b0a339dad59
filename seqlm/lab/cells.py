"""What a cell is: its text, its options, and its size in the preset small, read from its class."""

import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from seqlm.cells import Cell, Option, find, options, resolved_options
from seqlm.config import cell_key, resolve
from seqlm.errors import UsageError
from seqlm.model import parameter_count
from seqlm.ops.observer import Observer
from seqlm.runtime import using_backend

GROUPS = {  # {group of a cell: its heading}, in the order of `seqlm cells`
    "four": "the four",
    "linear": "linear (parallel scan)",
    "gated": "gated (step by step)",
    "attention": "attention-like",
    "windows": "windows",
}
KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class OptionFacts:
    """An option: its meaning, its legal values in words, and its default; None: it has none."""

    meaning: str
    values: str
    default: Any


@dataclass(frozen=True)
class CellFacts:
    """A cell.  Its sizes are None if an option has no default."""

    cell: str
    group: str
    title: str  # its full name
    about: str
    equations: str
    source: str
    text: str  # all text but the source and the options, with the equations in it
    training: str
    options: Mapping[str, OptionFacts]
    width: int  # of the preset small
    preset_options: Mapping[str, Any]  # that the preset small sets
    state_widths: float | None  # size of the state, in multiples of the width
    state: int | None  # numbers
    parameters: int | None
    multiplications: int | None  # in the matrix products and convolutions of one step

    @property
    def heading(self) -> str:
        return GROUPS.get(self.group, self.group)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def in_groups(cells: list[CellFacts]) -> list[CellFacts]:
    """The cells in the order of their groups; groups of other names come last."""
    order = [*GROUPS]
    return sorted(cells, key=lambda c: order.index(c.group) if c.group in order else len(order))


def facts(name: str) -> CellFacts:
    """Raises UsageError for an unknown name, and InputError for a file that is not a cell."""
    kind = find(name)
    first, _, text = (sys.modules[kind.__module__].__doc__ or "").partition("\n")
    title, _, about = first.partition(": ")
    about_cell, equations, source = parts(inspect.cleandoc(text))
    known = options(kind)
    meanings, about_class = option_meanings(inspect.getdoc(kind) or "", [*known])
    config = resolve(settings={"cell.name": name})
    given = config.cell.options.get(cell_key(name), {})
    width = config.model.width
    state = parameters = multiplications = None
    if all(rule.default is not inspect.Parameter.empty for rule in known.values()):
        cell = kind(width, **resolved_options(name, config.cell.options)[cell_key(name)])
        state = sum(tensor.numel() for tensor in cell.initial_state(1))
        parameters, multiplications = parameter_count(cell), multiplications_of_a_step(cell, width)
    return CellFacts(
        cell=name,
        group=kind.group,
        title=title,
        about=about,
        equations=equations,
        source=source,
        text=f"{about_cell}\n\n{about_class}".strip("\n"),
        training=kind.over_time,
        options={
            option: OptionFacts(
                meanings.get(option, ""),
                values(kind, width, option, rule),
                None if rule.default is inspect.Parameter.empty else rule.default,
            )
            for option, rule in known.items()
        },
        width=width,
        preset_options=given,
        state_widths=None if state is None else state / width,
        state=state,
        parameters=parameters,
        multiplications=multiplications,
    )


def parts(text: str) -> tuple[str, str, str]:
    """A docstring without its source; its equations, the indented paragraphs; its source."""
    rest, equations, sources = [], [], []
    for paragraph in re.split(r"\n\n+", text.strip("\n")):
        if all(line.startswith("    ") for line in paragraph.split("\n")):
            equations.append(textwrap.dedent(paragraph))
        before, found, source = paragraph.partition("Source: ")
        sources += [source] if found else []
        rest += [before.rstrip()] if before.strip() else []
    return "\n\n".join(rest), "\n\n".join(equations), " ".join("\n".join(sources).split())


def option_meanings(text: str, names: list[str]) -> tuple[dict[str, str], str]:
    """{option: its meaning} from the docstring of a class, and the rest of the docstring.

    A meaning stands after `option: ` or `option, option: `, at the beginning of a line or after two
    spaces, up to the next option or the end of the paragraph.
    """
    if not names:
        return {}, text
    name = "|".join(names)
    start = re.compile(rf"(?:^|(?<=  ))((?:{name})(?:, (?:{name}))*): ", re.M)
    meanings: dict[str, str] = {}
    rest = []
    for paragraph in re.split(r"\n\n+", text):
        before, *found = start.split(paragraph)
        rest += [before.strip("\n")] if before.strip() else []
        for owners, meaning in zip(found[::2], found[1::2], strict=True):
            meanings |= {owner: " ".join(meaning.split()) for owner in owners.split(", ")}
    return meanings, "\n\n".join(rest)


def values(kind: type[Cell], width: int, option: str, rule: Option) -> str:
    """The legal values of an option, in words; the limits are those that the cell's error says."""
    if choices := get_args(rule.kind):
        return f"one of {', '.join(map(str, choices))}"
    if rule.kind in (bool, str):
        return KINDS[rule.kind]
    try:
        kind(width, **{option: float("nan")})  # it is within no limits
    except UsageError as error:
        _, _, limits = str(error).partition(f"cell.{option} is nan; it must be ")
        limits = re.split(r"\.(?: |$)", limits)[0]
    except Exception:  # a cell without a check fails anywhere, as its author's code does
        limits = ""
    else:
        limits = ""
    return f"{KINDS[rule.kind]} {limits}".strip()


def multiplications_of_a_step(cell: Cell, width: int) -> int:
    """Multiplications in the matrix products and convolutions of one step of one sequence."""
    with _Products() as products, using_backend("reference"), torch.no_grad():
        cell.step(torch.zeros(1, width), cell.initial_state(1))
    return products.total


class _Products(Observer):
    """Counts multiplications; FlopCounterMode would load torch's compiler, which takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        y = function(*arguments, **(options or {}))
        match function.overloadpacket.__name__:
            case "mm" | "bmm" | "mv":
                self.total += _of_matrices(*arguments[:2])
            case "addmm" | "baddbmm" | "addmv":
                self.total += _of_matrices(*arguments[1:3])
            case "convolution":
                self.total += y.numel() * arguments[1][0].numel()
            case "_scaled_dot_product_flash_attention_for_cpu":
                self.total += 2 * arguments[0].numel() * arguments[1].shape[-2]
        return y


def _of_matrices(a: Tensor, b: Tensor) -> int:
    return a.numel() * (b.shape[-1] if b.dim() > 1 else 1)
