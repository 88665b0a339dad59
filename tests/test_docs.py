"""README and docs: what they show runs, what they link to exists, and no page is stale."""

import base64
import hashlib
import json
import pkgutil
import re
import shlex
import subprocess
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import reference
import typer.main
from conftest import sentences, valid
from safetensors.numpy import load_file
from sentencepiece import SentencePieceProcessor

from seqlm import cells
from seqlm.cli._app import app
from seqlm.config import Config, resolve
from seqlm.text.corpora import KNOWN

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
LINKING = [*PAGES, *sorted(DOCS.glob("reference/*.md")), *sorted(ROOT.glob("[A-Z]*.md"))]
SMALLER = ["--preset", "tiny", "--width", "8", "--layers", "1", "--steps", "2", "--threads", "1"]
BENCH = "--width 8 --layers 1 --batch 2 --length 16".split()
WITH_A_VALUE = {"--time-limit", "--match", "--preset", "--seeds"}  # what SMALLER replaces
# they install something, need the network, start several processes or ask for a GPU; what torchrun
# and llm do is tested in test_parallel.py and test_llm.py
NOT_RUN = (
    "python3 -m venv",
    ".venv/",
    ". .venv",
    "pip ",
    "git ",
    "make",
    "torchrun",
    "cd ",
    "llm ",
)
# options that are of the program or of other programs
OTHERS = {"--help", "--version", "--install-completion", "--nproc-per-node", "--strict"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def test_generated_pages_and_tables_are_those_of_the_code_and_of_the_measurements():
    stale = [
        str(path.relative_to(ROOT))
        for path, text in reference.generated().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    assert not stale, f"{', '.join(stale)}: run `make reference`, and commit what it writes"


def test_every_measurement_says_how_it_was_made_and_is_shown_on_a_page():
    shown = {name for path in PAGES for name in reference.FIGURE.findall(path.read_text("utf-8"))}
    names = {path.stem for path in DOCS.glob("figures/*.json")}
    assert names and names == {name for _, name, _ in shown}


def test_every_generated_file_is_known_to_the_generator():
    """A file of a page or a schema that was given up does not stay behind."""
    files = {*DOCS.glob("reference/*"), *DOCS.glob("schemas/*")}
    assert files == {path for path in reference.generated() if path.parent not in (DOCS, ROOT)}


def test_the_site_has_every_page():
    """mkdocs.yml lists them in their order; `make docs` fails where a page is missing there."""
    listed = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)
    pages = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted(pages)


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 125


def test_no_page_has_a_place_that_is_still_to_be_filled():
    for path in LINKING:
        assert not re.search("@@|TODO|TBD", path.read_text(encoding="utf-8")), path.name


# Links


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as forges and mkdocs make them."""
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", LINKING, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(path):
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
        assert DOCS not in path.parents or DOCS in target.resolve().parents, f"{link} is no page"
    assert not broken


# Blocks


def blocks(path: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the blocks of a page."""
    found = BLOCK.findall(path.read_text(encoding="utf-8"))
    return [(language, text) for language, text in found if language in languages]


def commands(text: str) -> list[str]:
    """The command lines of a block; a quotation or a backslash joins several lines."""
    lines: list[str] = []
    held = ""
    for line in text.splitlines():
        held += line
        try:
            shlex.split(held, comments=True)
        except ValueError:
            held += "\n"
            continue
        if not held.endswith("\\"):
            lines.append(held)
            held = ""
    assert not held, held
    return [line for line in lines if line.strip() and not line.startswith("#")]


def smaller(words: list[str]) -> list[str]:
    """A command that takes time, with options that make it short: later flags win."""
    name = words[0]
    if name == "bench":
        short = ["--time-limit", "0.01"] if "learning" in words else ["--lengths", "16"]
        return [*words, *BENCH, *short]
    if name not in ("train", "compare") or "--print-config" in words:
        return words
    kept: list[str] = []
    for word in words:
        if not (kept and kept[-1] in WITH_A_VALUE):
            kept.append(word)
        else:
            kept.pop()
    if "--resume" in words:
        return [*kept, "--steps", "4"]
    if name == "compare":
        return [*kept, *SMALLER]
    layers = max(word.count(",") + 1 for word in words)  # of --cell
    # the preset tiny has another cell than the default preset, after which a run is named
    cell = [] if {"--cell", "--init-from"} & {*words} else ["--cell", resolve().cell.name]
    return [*kept, *SMALLER, *cell, "--layers", str(layers)]


@pytest.fixture
def little(monkeypatch, tmp_path, small_library, at_once, in_threads):
    """A folder with the texts that the pages name, and known corpora that are small."""
    monkeypatch.setattr("seqlm.text.card.XZ_BYTES", 100_000)
    monkeypatch.setattr("seqlm.run.SAMPLE", 300)
    monkeypatch.setattr("seqlm.evaluation.inspect.STEPS", 100)
    (tmp_path / "poems.txt").write_text("Roses are red, violets are blue.\n" * 40)
    (tmp_path / "functions.txt").write_text("\n".join(f"get_{i}_of" for i in range(500)))
    sums = (f"{i}+{j}={i + j}\n" for i in range(30) for j in range(30))
    (tmp_path / "sums.txt").write_text("".join(sums))

    def fill(draft, path):
        for split in ("train", "val", "test"):
            draft.append(sentences(2000).encode())
            draft.end_split(split)

    for name, known in KNOWN.items():
        if known.address:
            monkeypatch.setitem(KNOWN, name, replace(known, fill=fill, address=""))


def first_command(path: Path) -> str:
    """The first subcommand of seqlm on a page."""
    found = [line for _, text in blocks(path, "sh") for line in commands(text)]
    return next((line.split()[1] for line in found if line.startswith("seqlm ")), "")


@page
def test_the_shell_blocks_of_a_page_run_in_their_order(page, little, seqlm_command, tmp_path):
    """A page that begins with a trained model finds one; files that it shows are there."""
    for language, text in blocks(page, "python", "toml"):
        if named := re.match(r'"""(\w+): |# (\w+\.\w+)\n', text):
            name = named[2] or f"{named[1]}.{'py' if language == 'python' else language}"
            (tmp_path / name).write_text(text)
    if first_command(page) not in ("", "prepare", "train", "cells", "env"):
        assert seqlm_command("train", "poems.txt", *SMALLER).code == 0
    for line in [line for _, text in blocks(page, "sh") for line in commands(text)]:
        if line.startswith("seqlm ") and not re.search(r"[|<]", line):
            shown, _, _ = line.partition(" > ")  # to standard output instead
            words = smaller(shlex.split(shown, comments=True)[1:])
            result = seqlm_command(*words)
            assert result.code == 0, f"{line}\nrun as {shlex.join(words)}\n{result.err}"
        elif not line.startswith(NOT_RUN):
            subprocess.run(["bash", "-ec", line], check=True, timeout=60)


@page
def test_the_python_blocks_of_a_page_run(page, little, seqlm_command, monkeypatch):
    import seqlm

    own = seqlm.train
    small = dict(preset="tiny", width=8, layers=1, steps=2, batch=4, length=16, threads=1)

    def train(data=None, **options):
        options.pop("time_limit", None)
        return own(data, **{**options, **small})

    monkeypatch.setattr("seqlm.api.train", train)
    found = [text for _, text in blocks(page, "python") if not text.startswith('"""')]
    if any("stdlib" in text for text in found):
        assert seqlm_command("prepare", "stdlib").code == 0
    if any("poems" in text for text in found):
        assert seqlm_command("train", "poems.txt", *SMALLER).code == 0
    for text in found:
        exec(compile(text, page.name, "exec"), {"__name__": "__main__"})


def test_every_block_of_docs_has_a_language():
    """Blocks of sh, python and toml are run; text is output; json is an excerpt of a file."""
    for path in PAGES[1:]:
        languages = {language for language, _ in BLOCK.findall(path.read_text(encoding="utf-8"))}
        assert languages <= {"sh", "python", "toml", "text", "json"}, path.name


def test_readme_and_docs_show_every_command_and_each_has_its_help(seqlm_command):
    lines = [line for path in PAGES for _, text in blocks(path, "sh") for line in commands(text)]
    names = {line.split()[1] for line in lines if line.startswith("seqlm ")}
    assert names == {command.name for command in app.registered_commands}
    for name in names:
        assert seqlm_command(name, "--help").code == 0


@pytest.mark.parametrize("name", ["LICENSE", "CHANGELOG.md", "constraints.txt", "Makefile"])
def test_the_files_the_readme_speaks_of_exist(name):
    assert (ROOT / name).is_file()


def test_the_version_to_cite_is_that_of_the_package():
    import seqlm

    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {seqlm.__version__}\n" in cited


# JSON


@pytest.mark.parametrize(
    "command, schema",
    [
        ("prepare story.txt --force", "prepare"),
        ("prepare story.txt --documents lines --out data/lines", "prepare"),
        ("prepare --list", "prepare-list"),
        ("train --data story --preset tiny --width 8 --layers 1 --steps 2 --run new", "train"),
        ("train --resume --run story-mingru", "train"),
        ("train --print-config", "config"),
        ("eval", "eval"),
        ("eval --protocol window --context 16", "eval"),
        ("eval --text story.txt", "eval"),
        ("eval --dynamic --novelty --mix ppm:2", "eval"),
        ("score story.txt", "score"),
        ("predict the", "predict"),
        ("compress story.txt --out a.packed", "compress"),
        ("export --onnx model.onnx --web page", "export"),
        ("generate --chars 5 --samples 2 --novelty", "generate"),
        ("plot --y lr,speed", "plot"),
        ("check", "check"),
        ("cells", "cells"),
        ("results mingru-5m", "results"),
        ("report", "report"),
        ("inspect story.txt", "inspect"),
        ("runs", "runs"),
        ("runs diff story-mingru story-mingru", "runs-diff"),
        ("runs note story-mingru good", "runs-note"),
        ("runs remove story-mingru --yes", "runs-remove"),
        ("env", "env"),
    ],
)
def test_json_is_as_its_schema_says(command, schema, run, seqlm_command, monkeypatch):
    """test_compare.py and test_bench.py say so of their commands."""
    monkeypatch.setattr("seqlm.run.SAMPLE", 300)
    monkeypatch.setattr("seqlm.evaluation.inspect.STEPS", 100)
    result = seqlm_command(*command.split(), "--json")
    assert result.code == 0, result.err
    valid(schema, result.json)


def test_the_schemas_notice_a_field_that_is_missing_or_new_or_of_another_type(run, seqlm_command):
    figures = seqlm_command("eval", "--json").json
    valid("eval", figures)
    wrong = [
        {name: value for name, value in figures.items() if name != "tokens"},
        {**figures, "token": 1},
        {**figures, "tokens": "1"},
        {**figures, "tokens": True},
        {**figures, "tokens": None},
    ]
    for value in wrong:
        with pytest.raises(AssertionError):
            valid("eval", value)


# What the pages claim


def test_the_errors_of_the_faq_are_errors_of_seqlm():
    """A heading with quotation marks cites an error, in words that stand in the code."""
    code = ""
    for path in (ROOT / "seqlm").rglob("*.py"):
        code += re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
    headings = re.findall(r'^### (".*")$', (DOCS / "faq.md").read_text(encoding="utf-8"), re.M)
    cited = [words for heading in headings for words in re.findall(r'"(.*?)"', heading)]
    assert cited
    assert [words for words in cited if words not in code] == []


def test_the_reader_of_the_file_formats_gets_the_figure_of_eval(little, seqlm_command):
    """By the documented rules, without seqlm; also where the blocks have a convolution."""
    import seqlm

    ((_, reader),) = blocks(DOCS / "file-formats.md", "python")
    assert "seqlm" not in re.findall(r"^(?:import|from) (\w+)", reader, re.M)
    for conv in (0, 3):
        given = [*SMALLER, "--set", f"model.conv={conv}", "--force"]
        assert seqlm_command("train", "poems.txt", *given).code == 0
        names: dict = {}
        exec(compile(reader, "file-formats.md", "exec"), names)
        figure = seqlm.load("checkpoints/poems-mingru").evaluate()["bits_per_char"]
        assert names["bits_per_char"] == pytest.approx(figure, rel=1e-5)


@pytest.mark.parametrize("documents", ["lines", "files"])
@pytest.mark.parametrize("unit", ["char", "byte", "sentencepiece"])
def test_a_corpus_can_be_read_by_its_documented_format(unit, documents, seqlm_command, tmp_path):
    """With json, numpy and sentencepiece alone."""
    texts = [sentences(400, seed=i) for i in range(60)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    size = ["--vocab-size", 300] if unit == "sentencepiece" else []
    files = sorted(tmp_path.glob("*.txt"))
    given = ["prepare", *files, "--unit", unit, *size, "--documents", documents]
    assert seqlm_command(*given, "--out", "data/own").code == 0
    corpus = Path("data/own")
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((corpus / "tokenizer.json").read_text(encoding="utf-8"))
    valid("corpus-manifest", manifest)
    valid("tokenizer", tokenizer)
    table = symbol_texts(tokenizer)
    assert manifest["vocab_size"] == len(table) + (documents == "files")
    for split, counts in manifest["splits"].items():
        symbols = np.fromfile(corpus / f"{split}.bin", manifest["dtype"])
        ends = np.fromfile(corpus / f"{split}.ends", "<i8")
        assert (len(symbols), len(ends)) == (counts["tokens"], counts["documents"])
        assert ends[-1] == len(symbols) and (np.diff(ends, prepend=0) > 0).all()
        last = len(table) if documents == "files" else table.index(b"\n")
        assert set(symbols[ends - 1]) == {last}
        text = b"".join(table[symbol] for symbol in symbols if symbol < len(table))
        assert hashlib.sha256(text).hexdigest() == counts["sha256"]


def symbol_texts(tokenizer: dict) -> list[bytes]:
    """The text of each symbol, as docs/file-formats.md says it."""
    if tokenizer["unit"] == "char":
        return [character.encode() for character in tokenizer["symbols"]]
    one_byte = [bytes([i]) for i in range(256)]
    if tokenizer["unit"] == "byte":
        return one_byte
    model = SentencePieceProcessor(model_proto=base64.b64decode(tokenizer["model"]))
    pieces = [model.id_to_piece(i + 1) for i in range(256, model.get_piece_size() - 1)]
    return one_byte + [piece.replace("\u2581", " ").encode() for piece in pieces]


def test_manifests_and_steps_are_as_documented(run):
    """Fingerprints and hashes by the documented rules, and the fields of every JSON file."""
    step = run.path / (run.path / "best").read_text().strip()
    for path in (Path("data/story/manifest.json"), step / "MANIFEST.json"):
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        rest = re.sub(r',\n "fingerprint": "\w+"', "", text)
        assert hashlib.sha256(rest.encode()).hexdigest() == manifest["fingerprint"]
        assert manifest["schema"] == 2
        for name, listed in manifest["files"].items():
            data = (path.parent / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == listed["sha256"]
            assert len(data) == listed["bytes"]
            if "spot_sha256" in listed:
                starts = (max(0, len(data) - 65536) * i // 63 for i in range(64))
                spots = b"".join(data[start : start + 65536] for start in starts)
                digest = hashlib.sha256(str(len(data)).encode() + spots).hexdigest()
                assert digest == listed["spot_sha256"]
    corpus = json.loads(Path("data/story/manifest.json").read_text(encoding="utf-8"))
    content = {key: corpus[key] for key in ("characters", "files")}
    written = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    assert hashlib.sha256(written.encode()).hexdigest() == run.config.data.fingerprint
    valid("step-manifest", manifest)
    valid("train-state", json.loads((step / "train_state.json").read_text(encoding="utf-8")))
    for name, steps in {"metrics": [1, 2, 3, 4], "timing": [1, 2, 3, 4], "samples": [4]}.items():
        lines = (run.path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in lines] == steps
        for line in lines:
            valid(name, json.loads(line))
    tables = tomllib.loads((step / "config.toml").read_text(encoding="utf-8"))
    valid("config", tables)
    batch = tables["train"]["batch"]
    weights, moments = (load_file(step / f"{kind}.safetensors") for kind in ("model", "optimizer"))
    state = load_file(step / "state.safetensors")
    muon = {n for n, weight in weights.items() if n.startswith("blocks") and weight.ndim == 2}
    adamw = {f"{n}.{k}" for n in weights.keys() - muon for k in ("exp_avg", "exp_avg_sq", "step")}
    assert {*moments} == adamw | {f"{name}.momentum" for name in muon}
    assert sorted(state) == [f"{i:06d}" for i in range(len(state))]
    assert all(len(tensor) == batch for tensor in state.values())


def quoted(path: Path, pattern: str) -> set[str]:
    """What the pattern finds in the code within the sentences of a page."""
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    return {word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(pattern, code)}


@page
def test_the_files_names_options_and_settings_that_a_page_quotes_exist(page):
    files = quoted(page, r"^((?:seqlm|tests|docs)/[\w/.-]+)$")
    missing = {name for name in files if not (ROOT / name).exists()}
    assert {name for name in missing if not re.search("NAME|BACKEND", name)} == set()
    for dotted in quoted(page, r"^(seqlm(?:\.\w+)+)"):
        assert pkgutil.resolve_name(dotted) is not None
    commands = typer.main.get_command(app).commands.values()
    options = {name for command in commands for param in command.params for name in param.opts}
    assert quoted(page, r"(?:^|[ \[])(--[a-z][a-z-]+)") - options - OTHERS == set()
    keys = {*Config().flat(), "cell.OPTION", "cell.rate"}  # the latter is of own-cell.md
    for cell in cells.names():
        keys |= {f"cell.{option}" for option in cells.options(cells.find(cell))}
    sections = "|".join(section.name for section in fields(Config))
    assert quoted(page, rf"(?:^|[ ])((?:{sections})\.\w+)=") - keys == set()
