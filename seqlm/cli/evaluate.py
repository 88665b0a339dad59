"""seqlm eval: a run -> bits per character."""

from dataclasses import replace
from typing import Annotated, Any

from seqlm.cli._app import command, read_source, refuse_other_encoding
from seqlm.cli._complete import one_of
from seqlm.cli._flags import (
    Data,
    Dynamic,
    DynamicLr,
    Rounding,
    argument,
    flag,
    learning_rate,
    named_run,
    switch,
)
from seqlm.cli._texts import novelty_of, novelty_rows
from seqlm.errors import InputError, UsageError, unknown
from seqlm.ui import Screen, pairs

EVALUATION = "Evaluation"  # a panel of --help
METRICS = ("bits-per-char", "bits-per-byte", "nats-per-char", "perplexity", "accuracy")
FIELDS = tuple(metric.replace("-", "_") for metric in METRICS)  # of --json
SHOWN = (
    *(
        "run",
        "others",
        "step",
        "cell",
        "params",
        "corpus",
        "split",
        "split_sha256",
        "protocol",
        "context",
    ),
    *FIELDS,
    *("chars", "a_character_is", "bytes", "tokens", "documents", "unknown", "chars_per_second"),
    *("device", "backend"),
)
DYNAMIC = ("protocol", *FIELDS, "lr", "gradients")
MIXED = ("protocol", *FIELDS[:-1], "start", "weight", "alone_bits_per_char", "alone_bits_per_byte")
ALIASES = {"bpc": "bits-per-char", "bpb": "bits-per-byte", "ppl": "perplexity"}


@command(
    "eval",
    "seqlm eval",
    "seqlm eval bits-per-char --split test",
    "seqlm eval --run poems-lem --text letter.txt",
    "seqlm eval --dynamic",
    "seqlm eval --mix ppm:5",
    "seqlm eval --run poems-lem --with poems-mingru",
)
def evaluate(
    screen: Screen,
    reading: Rounding,
    metric: Annotated[
        str | None,
        argument(f"Metric to print: {', '.join(METRICS)}.", "METRIC", one_of(*METRICS, *ALIASES)),
    ] = None,
    data: Data = None,
    split: Annotated[
        str | None, flag("Split to evaluate. Default: val.", EVALUATION, "train|val|test")
    ] = None,
    text: Annotated[
        str | None,
        flag("UTF-8 text to evaluate, not a corpus; -: standard input.", EVALUATION, "FILE|-"),
    ] = None,
    protocol: Annotated[
        str,
        flag(
            "Read the split as one stream, or in windows that start from a fresh state.",
            EVALUATION,
            "stream|window",
        ),
    ] = "stream",
    context: Annotated[
        int | None, flag("Length of a window, in symbols. Default: 256.", EVALUATION, "N")
    ] = None,
    on_unknown: Annotated[
        str, flag("Stop at an unknown character, or skip and count it.", EVALUATION, "error|skip")
    ] = "error",
    novelty: Annotated[
        bool,
        switch(
            "Also show how much of --text, or else of a generated text, stands in the training "
            "text.",
            EVALUATION,
            "--novelty",
        ),
    ] = False,
    temperature: Annotated[
        float,
        flag("Divide the logits by T; above 1: flatter probabilities.", EVALUATION, "T"),
    ] = 1.0,
    dynamic: Dynamic = False,
    dynamic_lr: DynamicLr = None,
    mixed: Annotated[
        list[str] | None,
        flag(
            "Also read this run, and take the mean of the probabilities. Repeat it for more runs.",
            EVALUATION,
            "RUN",
            "--with",
        ),
    ] = None,
    mix: Annotated[
        str | None,
        flag(
            "Also mix with a context model that counts the training text, and each symbol after "
            "it was scored. N: its longest context, such as 5.",
            EVALUATION,
            "ppm:N",
        ),
    ] = None,
) -> None:
    """Evaluate a run: bits per character over a whole split."""
    reading, metric = _run_or_metric(reading, metric)
    _refuse_without_effect(text, data, split, protocol, context)
    rate = learning_rate(dynamic, dynamic_lr)
    more = {"--dynamic": rate is not None, "--mix": mix is not None, "--novelty": novelty}
    _refuse_more_figures(screen, metric, more)
    for name in (name for name in ("--dynamic", "--mix") if more[name] and protocol != "stream"):
        raise UsageError(f"{name} reads the text as one stream. Remove --protocol {protocol}.")

    loaded, *others = reading.load_all(screen, mixed or (), "--with")
    loaded = loaded.mixed_with(*others) if others else loaded
    loaded = loaded if temperature == 1 else loaded.tempered(temperature)
    screen.detail(f"{loaded.runtime}; evaluation computes in float32")
    options: dict[str, Any] = dict(data=data, split=split or "val", protocol=protocol)
    options |= {} if context is None else {"context": context}
    raw = None if text is None else _read_text(text)
    if raw is not None and text is not None:
        refuse_other_encoding(text, raw, loaded.tokenizer)
    options |= dict(on_unknown=on_unknown, text=raw)
    options |= dict(dynamic_lr=rate, mix=mix)
    with screen.progress("evaluating") as bar:
        figures = loaded.evaluate(tick=bar.update, **options)
    if novelty:
        texts = None if raw is None else [raw.decode("utf-8", "replace")]
        figures["novelty"] = novelty_of(screen, loaded, texts)

    _warn(screen, figures)
    own = METRICS[1] if figures["bits_per_char"] is None else METRICS[0]
    key = (metric or own).replace("-", "_")
    if screen.json or (metric is None and not screen.quiet):
        screen.product(figures, key, [*_rows(figures), *_adapted_rows(figures)])
        if novelty and not screen.json:
            screen.table(novelty_rows(figures["novelty"]))
        screen.hint(f"seqlm generate {named_run(loaded.path, loaded.config.cell.name)}")
        return
    if figures[key] is None:
        raise InputError(
            f"The split's bytes are not text, so it has no {metric}. Use bits-per-byte."
        )
    screen.write(f"{figures[key]:.6f}\n")


def _read_text(source: str) -> bytes:
    remedy = "Prepare it, which has no limit, then evaluate on the corpus: seqlm eval --data NAME"
    return read_source("--text", source, remedy)


def _run_or_metric(reading: Rounding, word: str | None) -> tuple[Rounding, str | None]:
    """The meaning of the argument: a metric, or a run if --run is not given."""
    if word is None or word in METRICS:
        return reading, word
    if word in ALIASES:
        return reading, ALIASES[word]

    from seqlm.store import runs

    if word and reading.run is None and runs.named(word):
        return replace(reading, run=word), None
    raise unknown("metric", word, METRICS)


def _refuse_without_effect(
    text: str | None, data: str | None, split: str | None, protocol: str, context: int | None
) -> None:
    """Raises UsageError for an option that has no effect together with the others."""
    if text is not None and data is not None:
        raise UsageError("Both --text and --data are given. Keep one of them.")
    if text is not None and split is not None:
        raise UsageError(
            f"--split {split} is a split of a corpus, but --text is given. Keep one of them."
        )
    if context is not None and protocol == "stream":
        raise UsageError(
            f"--context {context} has an effect only with --protocol window. Add --protocol "
            "window, or remove --context."
        )


def _refuse_more_figures(screen: Screen, metric: str | None, more: dict[str, bool]) -> None:
    """Raises UsageError where one number is asked for, and an option gives more."""
    asked = metric or ("--quiet" if screen.quiet else None)
    for name in (name for name, given in more.items() if given and asked):
        raise UsageError(
            f"{name} gives more figures, and {asked} prints one number. Remove {asked}, or add "
            "--json."
        )


def _rows(figures: dict[str, Any]) -> list[list[Any]]:
    """The table for people: without what is not there or as usual."""
    unit = f"a {figures['characters'].removesuffix('s')}"
    shown = {**figures, "a_character_is": unit, "unknown": figures["unknown"] or None}
    return pairs(shown, [name for name in SHOWN if shown[name] not in (None, [])])


def _adapted_rows(figures: dict[str, Any]) -> list[list[Any]]:
    """The figures by other protocols, each with the name that --json has for them."""
    rows = []
    for protocol, names in {"dynamic": DYNAMIC, "mixed": MIXED}.items():
        found = figures.get(protocol, {})
        for name in names if found else ():
            value = f"{found[name]:g}" if name == "lr" else found[name]  # 4 decimals may be 0.0000
            rows.append([f"{protocol}: {name.replace('_', ' ')}", value])
    return rows


def _warn(screen: Screen, figures: dict[str, Any]) -> None:
    if figures["unknown"]:
        screen.warn(
            f"Characters that are not in the vocabulary and were skipped: {figures['unknown']:,}. "
            "So the figures are not comparable with others."
        )
    if figures["data"] and not figures["own_corpus"]:
        screen.warn(f"The run was evaluated on {figures['corpus']}, but trained on another corpus.")
