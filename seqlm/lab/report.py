"""A report on a run: one HTML page with its curves, samples, data, figures and settings."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from shlex import quote
from typing import Any

from seqlm import draw
from seqlm.config import FLAGS, Config, as_typed, cell_files, changes, presets
from seqlm.errors import InputError
from seqlm.lab.check import FAIL, HEADINGS, PASS, Check
from seqlm.lab.page import page
from seqlm.run import Run
from seqlm.store import book, history, runs
from seqlm.store.checkpoint import Saved
from seqlm.text.corpora import KNOWN, by_name
from seqlm.text.corpus import Corpus
from seqlm.training import launch
from seqlm.ui import duration, readable, visible

MOST_SAMPLES = 8
WIDE = 4.2  # inches of a picture: two stand side by side, and one fits a telephone
# what of the environment is a setting; the rest cannot be chosen on a command line
CHOSEN = ("device", "dtype", "backend", "threads")
SHOWN = (
    *("step", "corpus", "split", "protocol", "bits_per_char", "bits_per_byte", "nats_per_char"),
    *("perplexity", "accuracy", "chars", "characters", "bytes", "tokens", "documents"),
    *("split_sha256", "device", "dtype", "backend"),
)
Rows = Iterable[Sequence[Any]]


def report(
    run: Run,
    corpus: Corpus | None,
    figures: Mapping[str, Any] | None,
    checks: Sequence[Check] | None,
) -> str:
    """The page on a run.  Raises SeqlmError if matplotlib is not installed.

    corpus: the run's own; None if it is missing.  figures: as `Run.evaluate` returns them.
    checks: None if the run was not checked.
    """
    saved, _ = runs.load(run.path, str(run.step))
    title = f"Run {run.path.resolve().name}"
    body = f"<h1>{text(title)}</h1>\n{_summary(run)}"
    body += section("Curves", _curves(run))
    body += section("Samples over the training", _samples(run))
    body += section("Data", _data(corpus, figures))
    body += section("Evaluation", _evaluation(figures))
    body += section("Checks", _checks(checks))
    body += section("Environment", table(saved.environment.items()))
    body += section("Configuration", code(run.config.toml()))
    body += section("To repeat it", _repeat(run, saved, corpus))
    return page(title, body, STYLE)


# HTML


def text(value: Any) -> str:
    """A value as people read it, escaped."""
    return escape(visible(readable(value)))


def section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}</section>\n"


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>\n"


def code(words: str) -> str:
    return f"<pre>\n{escape(visible(words))}</pre>\n"


def table(rows: Rows, headings: Sequence[str] = ()) -> str:
    """A table.  A row begins with its name; without headings, the rows are names and values."""
    rows = list(rows)
    numeric = [
        all(isinstance(x, int | float | None) for x in column) for column in zip(*rows, strict=True)
    ]
    classes = [' class="number"' if headings and one else "" for one in numeric]
    head = [f"<th scope=col{c}>{text(h)}</th>" for c, h in zip(classes, headings, strict=False)]
    lines = [f"<thead><tr>{''.join(head)}</tr></thead>\n"] if head else []
    for name, *cells in rows:
        values = [f"<td{c}>{text(x)}</td>" for c, x in zip(classes[1:], cells, strict=True)]
        label = str(name) if headings else str(name).replace("_", " ")
        lines.append(f"<tr><th scope=row>{text(label)}</th>{''.join(values)}</tr>\n")
    kind = "grid" if headings else "facts"
    return f'<div class="wide"><table class="{kind}">\n{"".join(lines)}</table></div>\n'


STYLE = """th { font-weight: normal; color: var(--soft) }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
.wide { margin: .5rem 0 }
.side svg { width: 100% }
.facts td { overflow-wrap: anywhere }
.grid, td.number { white-space: nowrap }
@media print { .grid { white-space: normal; font-size: .85rem } }
pre { background: var(--panel); padding: .6rem .8rem; margin: .3rem 0 1rem;
  font-size: .85rem; line-height: 1.45 }
.side { display: grid; gap: 1rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
figure { margin: 0; break-inside: avoid; min-width: 0 }
figcaption { color: var(--soft) }
.bar { display: block; height: .8rem; margin-top: .35rem; background: #3b82c4;
  print-color-adjust: exact }
td.room { width: 40% }
"""


# The sections


def _summary(run: Run) -> str:
    entry, _ = book.entry(run.path)
    per_byte = entry["val_bits_per_char"] is None
    unit, best = ("byte", "val_bits_per_byte") if per_byte else ("character", "val_bits_per_char")
    figure = "none yet"
    if entry[best] is not None:
        figure = f"{entry[best]:.4f} bits per {unit} ({entry['protocol']})"
        figure += f", at step {entry['best_step']:,}"
    rows = {
        "cell": entry["cell"],
        "parameters": readable(entry["params"]),
        "corpus": entry["corpus"],
        "steps": readable(entry["steps"]),
        "time of training": duration(entry["seconds"]),
        "best validation": figure,
        "last save": entry["saved_at"].replace("T", " "),
        "note": entry["note"] or None,
    }
    return table(rows.items())


def _curves(run: Run) -> str:
    pictures, missing, read = [], [], cache(history.read)
    for y in draw.Y:
        try:
            svg = draw.curves_svg(draw.named([run.path]), ys=[y], wide=WIDE, read=read)
            pictures.append(f"<figure>{svg}</figure>\n")
        except InputError:  # the run has no such figures yet
            missing.append(y)
    found = f'<div class="side">\n{"".join(pictures)}</div>\n'
    return found + (paragraph(f"Not measured yet: {', '.join(missing)}.") if missing else "")


def _samples(run: Run) -> str:
    rows = history.samples(run.path)
    if not rows:
        return paragraph("This training kept no samples.")
    bits = {row["step"]: row for row in history.read(run.path) if "val_bits_per_byte" in row}
    last = len(rows) - 1
    places = {round(i * last / (MOST_SAMPLES - 1)) for i in range(MOST_SAMPLES)}
    figures = []
    for row in (rows[place] for place in sorted(places)):
        caption = f"step {row['step']:,}"
        if at := bits.get(row["step"]):
            unit = "char" if "val_bits_per_char" in at else "byte"
            caption += f", {at[f'val_bits_per_{unit}']:.4f} bits per {unit}"
        figures.append(
            f"<figure><figcaption>{text(caption)}</figcaption>\n{code(row['text'])}</figure>\n"
        )
    how = (
        f"The model wrote these texts at {len(places)} of its {len(rows):,} validations, at the "
        f"temperature {rows[-1]['temperature']:g}, from an empty prompt."
    )
    return f'{paragraph(how)}<div class="side">\n{"".join(figures)}</div>\n'


def _data(corpus: Corpus | None, figures: Mapping[str, Any] | None) -> str:
    if corpus is None:
        return paragraph("The corpus of the run was not found, or has changed.")
    manifest, card = corpus.manifest, corpus.manifest["card"]
    per = "byte" if card["chars"] is None else "character"
    names = ("chars", "bytes", "tokens", "documents")
    splits = [[name, *(of[key] for key in names)] for name, of in manifest["splits"].items()]
    facts = {
        "name": manifest["label"],
        "unit": manifest["unit"],
        "documents": manifest["documents"],
        "symbols in the vocabulary": manifest["vocab_size"],
        f"different {per}s": card["alphabet"],
        "rarest (count)": ", ".join(f"{symbol!r} {n:,}" for symbol, n in card["rarest"]),
        "repeated lines": f"{card['duplicate_share']:.1%} of the bytes",
        "suspected wrong encoding": f"{card['suspected_mojibake']:,} places",
    }
    baselines = {
        f"frequencies of {per}s alone": card["unigram_bits_per_char"],
        "xz -9, on the corpus": card["xz_bits_per_char"],
    }
    if figures is not None:
        bits = figures[f"bits_per_{'byte' if figures['bits_per_char'] is None else 'char'}"]
        baselines["this model, on the val split"] = bits
    head = f"<h3>Bits per {per}: the text compressed, and the model</h3>\n"
    splits_table = table(splits, ["split", "characters", "bytes", "symbols", "documents"])
    return table(facts.items()) + splits_table + head + _bars(baselines)


def _bars(values: Mapping[str, float]) -> str:
    """A table of values with a bar for each."""
    most = max(values.values())
    rows = "".join(
        f'<tr><th scope=row>{text(name)}</th><td class="number">{value:.4f}</td>'
        f'<td class="room"><span class="bar" style="width:{100 * value / most:.1f}%"></span></td>'
        "</tr>\n"
        for name, value in values.items()
    )
    return f"<table>\n{rows}</table>\n"


def _evaluation(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return paragraph("Not evaluated, because the corpus was not found, or has changed.")
    documents = figures["documents"] is not None
    how = {
        "answers": "Only the answers were predicted; the questions were read.",
        "stream": "The split was read as one stream, and every character of it was predicted.",
    }["answers" if figures["protocol"] == "answers" else "stream"]
    if documents and figures["protocol"] == "stream":
        how = "Each document was read from a fresh state, and its end was predicted, too."
    return paragraph(how) + table((name, figures[name]) for name in SHOWN)


def _checks(checks: Sequence[Check] | None) -> str:
    if checks is None:
        return paragraph("Not checked. This makes a report with the checks: seqlm report --check")
    signs = {PASS: "\N{CHECK MARK} ", FAIL: "\N{BALLOT X} "}
    rows = [
        [name, signs.get(one.status, "") + one.status, *rest]
        for one in checks
        for name, _, *rest in [one.row()]
    ]
    return table(rows, HEADINGS)


def _repeat(run: Run, saved: Saved, corpus: Corpus | None) -> str:
    lines, notes = command(saved), []
    if corpus is not None:
        lines = preparation(corpus) + lines
        if digest := corpus.manifest["text_sha256"]:
            notes.append(f"TEXT has the SHA-256 {digest}.")
    if run.config.train.time_limit:
        notes.append(
            "This training ended by its time. A repetition does as many steps as the machine is "
            "fast, so its figures differ."
        )
    else:
        notes.append(
            "In the environment above, this gives the same weights, bit for bit, if the training "
            "was never resumed with other settings."
        )
    return code(lines) + "".join(map(paragraph, notes))


def preparation(corpus: Corpus) -> str:
    """The command line that prepares a corpus; TEXT stands for a text of the user's own."""
    manifest, source = corpus.manifest, "TEXT"
    if manifest["text_sha256"] is None:  # a known corpus, whose label may have a version
        label = manifest["label"]
        versions = (name for name in KNOWN if label.startswith(f"{name}-"))
        source = label if by_name(label) else next(versions, label)
    options = [word for pair in manifest["options"].items() for word in pair]
    words = ["seqlm", "prepare", source, *options, "--out", str(corpus.path)]
    return " ".join(map(quote, words)) + "\n"


def command(saved: Saved) -> str:
    """The command line that trains a run with the configuration of a saved step."""
    config, environment = saved.config, saved.environment
    chosen = {f"runtime.{key}": environment[key] for key in CHOSEN if key in environment}
    config = config.updated(chosen)
    preset, settings = min(
        ((name, _beyond(name, config)) for name in sorted(presets(), key=lambda p: p != "small")),
        key=lambda pair: len(pair[1]),
    )
    words = ["seqlm", "train", "--data", config.data.path, "--run", saved.folder.parent.name]
    words += [] if preset == "small" else ["--preset", preset]
    flags = {key: f"--{flag.replace('_', '-')}" for flag, key in FLAGS.items()}
    for key, value in settings.items():
        typed = as_typed(value)
        words += [flags[key], typed] if key in flags else ["--set", f"{key}={typed}"]
    line = " ".join(map(quote, words))
    processes = environment.get("processes", 1)
    if processes != 1:
        line = f"torchrun --nproc-per-node {processes} -m -- {line}"
    return line + "\n"


def _beyond(preset: str, config: Config) -> dict[str, Any]:
    """{key: value} of the settings that a preset does not give to the cell of a configuration."""
    name = config.cell.name
    start = launch.configuration(preset, None, {"cell.name": name})[0]
    named = start.cell.name != launch.configuration(preset, None, {})[0].cell.name
    found = {"cell.name": name} if named or cell_files(name) else {}
    found |= {key: new for key, (_, new) in changes(start, config).items() if new is not None}
    # one of the two ends a training, and giving it removes the other
    found.pop("train.steps" if config.train.time_limit else "train.time_limit", None)
    return {key: value for key, value in found.items() if not key.startswith("data.")}
