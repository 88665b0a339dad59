"""Writes what is generated in docs/: run it by `make reference`; tests hold the pages to it.

docs/reference/*.md and docs/schemas/*.json come from the package and from outputs.toml, and tables
of measurements in README.md and docs/*.md from docs/figures/*.json.  The table of `seqlm results`
comes from seqlm/lab/results.toml.
"""

import inspect
import json
import re
import signal
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import typer.main

from seqlm import api, cells, config, errors, model
from seqlm.cells import _contract
from seqlm.cli._app import _COMMON, app
from seqlm.evaluation import score
from seqlm.generation import predict
from seqlm.lab import results
from seqlm.lab.cells import facts, in_groups
from seqlm.text.corpora import KNOWN
from seqlm.text.synthetic import DIAGNOSTICS

DOCS = Path(__file__).parent
NOTE = "\n\n<!-- Written by `make reference`. Change the code it describes, not this page. -->\n\n"
FIGURE = re.compile(r"(<!-- figure: (\S+) -->\n).*?(<!-- end of figure -->)", re.S)
RESULTS = re.compile(r"(<!-- results -->\n).*?(<!-- end of results -->)", re.S)
JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def generated() -> dict[Path, str]:
    """{path: text} of every file that is generated, and of every page with a table in it."""
    schemas = {name: schema(name, table) for name, table in outputs().items()}
    schemas["config"] = config_schema()
    pages = {
        "cli": cli(),
        "config": configuration(),
        "cells": cell_pages(),
        "corpora": corpora(),
        "exit-codes": exit_codes(),
        "json": json_page(schemas),
        "library": library(),
    }
    files = {
        # behind the heading, which mkdocs takes for the title only where it comes first
        DOCS / "reference" / f"{name}.md": text.replace("\n\n", NOTE, 1)
        for name, text in pages.items()
    }
    for name, value in schemas.items():
        text = json.dumps(value, indent=1, ensure_ascii=False)
        files[DOCS / "schemas" / f"{name}.json"] = text + "\n"
    for page in [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        if FIGURE.search(text):
            files[page] = FIGURE.sub(lambda m: m[1] + figure(m[2]) + m[3], text)
    page = DOCS / "results.md"
    files[page] = RESULTS.sub(lambda m: m[1] + results_table() + m[2], files[page])
    return files


def listed(items: Mapping[str, str]) -> str:
    return "".join(f"- {name}: {text}\n" for name, text in items.items())


def block(text: str) -> str:
    lines = text.strip("\n").rstrip()
    return f"```text\n{lines}\n```\n\n"


def prose(docstring: str) -> str:
    """A docstring as Markdown: what is indented stays as it is, and what has a name begins a
    paragraph."""
    text = ""
    for paragraph in re.split(r"\n\n+", docstring.strip("\n")):
        if all(line.startswith("    ") for line in paragraph.split("\n")):
            text += block(textwrap.dedent(paragraph))
            continue
        for line in paragraph.split("\n"):
            if text and (named := re.match(r"([a-z_]+(?:, [a-z_]+)*): ", line)):
                names = ", ".join(f"`{name}`" for name in named[1].split(", "))
                line = f"\n\n{names}: {line[named.end() :]}"
            elif re.match(r"(Raises|Returns|Yields|Source:|On a) ?", line):
                line = f"\n\n{line}"
            text += f"{line}\n"
        text += "\n"
    return re.sub(r"\n{3,}", "\n\n", text)


def value(x: object) -> str:
    """A value as it is written in TOML."""
    return f'`"{x}"`' if isinstance(x, str) else f"`{str(x).lower() if x in (True, False) else x}`"


# Pages


def cli() -> str:
    group = typer.main.get_command(app)
    text = "# Command line\n\nEvery command also has these options:\n\n"
    context = type(group).context_class(group, info_name="seqlm")
    some = group.get_command(context, "env")
    text += listed({o: h for name, o, h in options(some) if name in (*_COMMON, "help")})
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        own = command.context_class(command, info_name=f"seqlm {name}")
        text += f"\n## seqlm {name}\n\n{inspect.cleandoc(command.help)}\n\n"
        text += block(command.get_usage(own).removeprefix("Usage: "))
        panels: dict[str, dict[str, str]] = {}
        for param in command.get_params(own):
            if param.name not in (*_COMMON, "help"):
                shown, meaning = option(param)
                panels.setdefault(param.rich_help_panel or "Arguments", {})[shown] = meaning
        for panel, items in sorted(panels.items(), key=lambda pair: pair[0] != "Arguments"):
            text += f"**{panel}**\n\n{listed(items)}\n"
        _, *examples = command.epilog.split("\n\n")
        text += f"**Examples**\n\n{block(chr(10).join(examples))}".removesuffix("\n")
    return text.rstrip() + "\n"


def options(command: Any) -> list[tuple[str, str, str]]:
    """(name, as it is typed, its help) of a command's parameters."""
    context = command.context_class(command, info_name="")
    return [(param.name, *option(param)) for param in command.get_params(context)]


def option(param: Any) -> tuple[str, str]:
    """How a parameter is typed, and its help with its default."""
    if type(param).__name__ == "TyperArgument":
        return f"`{param.metavar}`", param.help
    shown = ", ".join(f"`{name}`" for name in param.opts)
    if param.name == "help":
        shown = "`--help`, `-h`"
    if param.metavar:
        shown = f"`{param.opts[0]} {param.metavar}`"
    told = param.default in (None, False, 0) or "default" in param.help
    return shown, param.help + ("" if told else f" Default: {param.default}.")


def configuration() -> str:
    text = "# Configuration\n\n"
    text += (
        "These are all settings of a training. `--set KEY=VALUE` gives one on the command line, "
        "a TOML file gives several (`--config FILE`), and `--print-config` shows the result. A "
        "preset is overruled by a file, and both by `--set` and by flags.\n"
    )
    flags = {key: f"--{name.replace('_', '-')}" for name, key in config.FLAGS.items()}
    for section in fields(config.Config()):
        text += f"\n## {section.name}\n\n"
        if section.name == "cell":
            text += (
                "- `cell.name` (flag `--cell`): a cell, or several separated by commas, which "
                f"take turns over the layers. Default: {value(config.CellConfig().name)}.\n"
                "- `cell.OPTION`: an [option](cells.md) of every cell of the stack.\n"
                "- `cell.NAME.OPTION`: an option of one of them.\n"
            )
            continue
        for rule in fields(getattr(config.Config(), section.name)):
            key = f"{section.name}.{rule.name}"
            flag = f", flag `{flags[key]}`" if key in flags else ""
            text += f"- `{key}` ({JSON_TYPES[rule.type]}{flag}): {rule.metadata['doc']}"
            text += f"{limits(rule.metadata)} Default: {value(rule.default)}.\n"
    text += "\n## Presets\n\n`--preset NAME` starts from one of these; `small` is the default.\n"
    for name in config.presets():
        content = (config.PRESETS / f"{name}.toml").read_text(encoding="utf-8")
        text += f"\n### {name}\n\n```toml\n{content.strip()}\n```\n"
    return text


def limits(rule: Mapping[str, Any]) -> str:
    """The legal values of a setting, in words."""
    if rule["choices"]:
        return f" One of {', '.join(f'`{name}`' for name in rule['choices'])}."
    parts = [f"above {rule['above']}"] if rule["above"] is not None else []
    parts += [f"at least {rule['low']}"] if rule["low"] is not None else []
    parts += [f"at most {rule['high']}"] if rule["high"] is not None else []
    return f" {', '.join(parts).capitalize()}." if parts else ""


def cell_pages() -> str:
    text = "# Cells\n\n`--cell NAME` chooses a cell, and `--set cell.OPTION=VALUE` an option of it."
    text += (
        " [Which cell to take](../cells.md) says when. Sizes are those of the cell alone, in the "
    )
    text += "preset `small`, without convolution and MLP of the block.\n"
    for cell in in_groups([*map(facts, cells.names())]):
        text += f"\n## {cell.cell}\n\n{cell.title}: {cell.about}\n\n"
        text += f"{prose(cell.text)}Source: {cell.source}\n\n"
        given = "".join(f", `cell.{key}={n}`" for key, n in cell.preset_options.items())
        text += f"- group: {cell.heading}\n- training: {cell.training}\n"
        text += f"- at width {cell.width}{given}: {cell.state:,} numbers in the state, "
        text += f"{cell.parameters:,} parameters, {cell.multiplications:,} multiplications per "
        text += "character\n"
        for name, rule in cell.options.items():
            text += f"- `cell.{name}` ({rule.values}): {rule.meaning} Default: "
            text += f"{value(rule.default)}.\n"
    return text


def corpora() -> str:
    text = "# Known corpora\n\nThese have a fixed text and fixed splits. "
    text += "`seqlm prepare NAME` downloads one, and `--from FILE` takes a file that you have.\n\n"
    for known in KNOWN.values():
        place = f", from <{known.address}>" if known.address else ", nothing to download"
        text += f"- `{known.name}` (unit {known.unit}): {known.about}{place}.\n"
    text += "\n## Made to measure\n\nThese are lines of a question, `=` and an answer. They are "
    text += "written on the spot, and options follow the name: `NAME:OPTION=N,OPTION=N`.\n\n"
    for made in DIAGNOSTICS.values():
        given = ", ".join(f"`{key}={n}`" for key, n in made.defaults.items())
        text += f"- `{made.name}`: {made.about}. Options with their defaults: {given}.\n"
    return text


def exit_codes() -> str:
    meanings = dict(re.findall(r"(\w+) +\d  (.+)", errors.__doc__ or ""))
    codes: dict[int, list[str]] = {}
    for kind in (errors.SeqlmError, *errors.SeqlmError.__subclasses__()):
        if kind.__name__ in meanings:
            meaning = meanings[kind.__name__].removesuffix(" below")
            codes.setdefault(kind.exit_code, []).append(f"{meaning} (`{kind.__name__}`)")
    rows = {0: ["success"], **codes}
    rows[128 + signal.SIGINT] = [
        "interrupted; a training that has begun saves its step first, also on SIGTERM and SIGHUP"
    ]
    rows[128 + signal.SIGTERM] = ["ended by SIGTERM outside training"]
    rows[128 + signal.SIGHUP] = ["ended by a closed terminal (SIGHUP) outside training"]
    text = "# Exit codes\n\nAn error is one or two sentences on standard error. `--debug` adds the "
    text += "traceback. The names are the classes in `seqlm.errors`, which the library raises.\n\n"
    text += "| code | meaning |\n|---|---|\n"
    return text + "".join(f"| {n} | {'; '.join(rows[n])} |\n" for n in sorted(rows))


def library() -> str:
    text = "# Library\n\n`import seqlm` gives `load`, `train` and `Run`, and imports PyTorch on "
    text += "first use. All else that is for use from outside:\n\n"
    text += listed(
        {
            "`seqlm.model.LanguageModel`": "the model alone",
            "`seqlm.cells.Recurrence`, `seqlm.cells.Cell`": "the base classes of a cell",
            "`seqlm.generation.predict.Predictor`": "what `Run.predictor` returns",
            "`seqlm.evaluation.score.Scores`": "what `Run.score` returns",
            "`seqlm.errors`": "the [errors](exit-codes.md) that everything raises",
        }
    )
    text += described("seqlm.load", api.load) + described("seqlm.train", api.train)
    for name, kind in {
        "seqlm.Run": api.Run,
        "seqlm.generation.predict.Predictor": predict.Predictor,
        "seqlm.evaluation.score.Scores": score.Scores,
        "seqlm.model.LanguageModel": model.LanguageModel,
        "seqlm.cells.Cell": _contract.Cell,
        "seqlm.cells.Recurrence": _contract.Recurrence,
    }.items():
        text += described(name, kind)
        for member, thing in vars(kind).items():
            shown = inspect.isfunction(thing) or isinstance(thing, property)
            if shown and not member.startswith("_") and thing.__doc__:
                text += described(f"{name.split('.')[-1]}.{member}", thing, "###")
    return text


def described(name: str, thing: Any, heading: str = "##") -> str:
    """A heading, and the signature over the docstring."""
    if is_dataclass(thing):  # which is made by other functions only
        parts = (f"{f.name}: {inspect.formatannotation(f.type)}" for f in fields(thing))
        signature = "\n    " + "\n    ".join(parts)
    elif isinstance(thing, property):
        signature = str(inspect.signature(thing.fget)).partition("-> ")[2]
        name += ": "
    else:
        signature = str(inspect.signature(thing)).removesuffix(" -> None")
    signature = re.sub(r"(: |-> )'([^']+)'", r"\1\2", signature)
    signature = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Za-z])", "", signature)
    signature = re.sub(r"<function (\w+) at \w+>", r"\1", signature)
    signature = re.sub(r"\(self(, )?", "(", signature)
    if len(name + signature) > 88 and signature[0] == "(":
        inside, _, end = signature[1:].rpartition(")")
        signature = "(\n    " + ",\n    ".join(re.split(r", (?![^\[]*\])", inside)) + f",\n){end}"
    text = f"\n{heading} {name.removesuffix(': ')}\n\n"
    return (text + block(name + signature) + prose(inspect.getdoc(thing) or "")).rstrip() + "\n"


# JSON


def outputs() -> dict[str, dict[str, str]]:
    tables: dict[str, dict[str, str]] = tomllib.loads((DOCS / "outputs.toml").read_text("utf-8"))
    return tables


def schema(name: str, table: Mapping[str, str]) -> dict[str, Any]:
    """The JSON Schema of an output, from its table in outputs.toml."""
    root: dict[str, Any] = {"type": "object"}
    for path, text in table.items():
        if path == "about":
            continue
        kind, _, meaning = text.partition(": ")
        node, optional = root, path.endswith("?")
        for part in re.findall(r"[^.\[\]?]+|\[\]", path):
            node = inside(node, part, optional)
        kinds = kind.split("|")
        node |= {"type": kinds if len(kinds) > 1 else kinds[0], "description": meaning}
    return {**header(name, table["about"]), **root}


def inside(node: dict[str, Any], part: str, optional: bool) -> dict[str, Any]:
    """The schema of a part of what `node` describes: [] of a list, * or a name of an object."""
    if part == "[]":
        node["type"] = "array"
        return node.setdefault("items", {})
    node["type"] = "object"
    if part == "*":
        return node.setdefault("additionalProperties", {})
    node["additionalProperties"] = False
    known = node.setdefault("properties", {})
    if part not in known and not optional:
        node.setdefault("required", []).append(part)
    return known.setdefault(part, {})


def header(name: str, title: str) -> dict[str, Any]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}


def config_schema() -> dict[str, Any]:
    """The JSON Schema of `seqlm train --print-config --json`, from the configuration's fields."""
    root = {"type": "object"}
    for section in fields(config.Config()):
        node = inside(root, section.name, False)
        if section.name == "cell":
            node |= {"type": "object", "description": "name, and the options of each cell"}
            continue
        for rule in fields(getattr(config.Config(), section.name)):
            own = inside(node, rule.name, False)
            own |= {"type": JSON_TYPES[rule.type], "description": rule.metadata["doc"]}
            if rule.metadata["choices"]:
                own["enum"] = list(rule.metadata["choices"])
    return {**header("config", "seqlm train --print-config --json"), **root}


def json_page(schemas: Mapping[str, dict[str, Any]]) -> str:
    text = "# JSON\n\nEvery command prints its result as one JSON object with `--json`. Numbers "
    text += "are finite: there is no NaN and no Infinity. Each title links to its JSON Schema.\n"
    for name, found in schemas.items():
        text += f"\n## {name}\n\n`{found['title']}`: [{name}.json](../schemas/{name}.json)\n\n"
        text += "".join(field_lines(found, ""))
    return text


def field_lines(node: Mapping[str, Any], path: str) -> list[str]:
    """A line for each value in what a schema describes."""
    lines = []
    for name, own in node.get("properties", {}).items():
        lines += field_lines(own, f"{path}.{name}" if path else name)
    if isinstance(node.get("additionalProperties"), dict):
        lines += field_lines(node["additionalProperties"], f"{path}.NAME")
    if node.get("items"):
        lines += field_lines(node["items"], f"{path}[]")
    if "description" in node:
        kinds = node["type"] if isinstance(node["type"], list) else [node["type"]]
        lines.append(f"- `{path}` ({' or '.join(kinds)}): {node['description']}\n")
    return lines


# Figures


def results_table() -> str:
    """The table of `seqlm results`."""
    sides = ["---" if name in ("result", "text", "cell") else "---:" for name in results.HEADINGS]
    lines = [results.HEADINGS, sides, *map(results.row, results.read().values())]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def figure(name: str) -> str:
    """The table of docs/figures/NAME.json, with how and where it was measured."""
    found = json.loads((DOCS / "figures" / f"{name}.json").read_text(encoding="utf-8"))
    columns, rows = found["columns"], found["rows"]
    numbers = [all(re.match(r"[*\d]|-?$", row[i]) for row in rows) for i in range(len(columns))]
    lines = [columns, ["---:" if number else "---" for number in numbers], *rows]
    text = "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    versions = ", ".join(f"{package} {number}" for package, number in found["versions"].items())
    made = f"{found['date']}, {found['machine']}, {versions}. {found['seeds']}. {found['note']}"
    text += textwrap.fill(made, 110, break_on_hyphens=False) + "\n\n"
    return text + (block("\n".join(found["commands"])) if found["commands"] else "")


def write() -> None:
    for path, text in generated().items():
        path.parent.mkdir(exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    write()
