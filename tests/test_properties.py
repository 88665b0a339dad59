"""What must hold for every input: hypothesis searches for one that breaks it."""

# N symbols, B batch, T length

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from conftest import close, sentences
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from seqlm import ops
from seqlm.config import Config, TrainConfig, read_toml
from seqlm.generation.generate import Rules, Text
from seqlm.runtime import using_backend
from seqlm.text.sources import Item
from seqlm.text.splits import divide, shares
from seqlm.text.staging import Draft
from seqlm.text.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    train_sentencepiece,
)
from seqlm.training.batches import IGNORED, Batches, DocumentBatches

# the same examples in every run; fixtures that hypothesis does not reset are only read
settings.register_profile(
    "seqlm",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("seqlm")

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
# few letters, so that lines repeat and stop strings occur
few = st.text("ab é\n🙂", min_size=1, max_size=60)


@cache
def pieces() -> SentencePieceTokenizer:
    text = sentences(20_000)
    alphabet = np.array([ord(c) for c, _ in Counter(text).most_common()])
    return SentencePieceTokenizer(train_sentencepiece([text.encode()], alphabet, 320, "unigram"))


@given(texts)
def test_every_text_comes_back_from_its_symbols(text):
    for tokenizer in (CharTokenizer("".join(sorted(set(text)))), ByteTokenizer(), pieces()):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode("utf-8")


@given(st.binary(max_size=60))
def test_every_sequence_of_bytes_comes_back_from_its_symbols(data):
    assert ByteTokenizer().decode_bytes(ByteTokenizer().encode(data)) == data


@given(texts, st.sampled_from(["char", "byte", "sentencepiece"]))
def test_symbols_given_one_by_one_are_streamed_as_the_same_text(text, unit):
    tokenizer = {
        "char": CharTokenizer("".join(sorted(set(text)))),
        "byte": ByteTokenizer(),
        "sentencepiece": pieces(),
    }[unit]
    decode = tokenizer.streamer()
    assert "".join(decode(int(symbol)) for symbol in tokenizer.encode(text)) == text


@contextmanager
def drafted(text: str, documents: str = "none", chunk: int = 1 << 20) -> Iterator[Draft]:
    """A draft of the text, read in chunks of that many bytes."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("seqlm.text.staging.BYTES_AT_ONCE", chunk)
        draft = Draft(Path(folder) / "draft", documents)
        draft.add(Item("text", BytesIO(text.encode("utf-8")), chosen=True))
        yield draft
        draft.close()


def text_of(draft: Draft, split: str) -> str:
    return b"".join(draft.chunks(draft.splits[split])).decode("utf-8")


@given(texts, st.sampled_from(["90,5,5", "50,50", "1,1,98"]), st.integers(4, 20))
def test_splits_by_position_cover_the_text_and_cut_no_character(text, split, chunk):
    with drafted(text, chunk=chunk) as draft:
        parts = shares(split)
        divide(draft, parts, len(text))
        read = [text_of(draft, name) for name in draft.splits]
    assert "".join(read) == text
    ends = np.cumsum([len(part) for part in read])
    for end, share in zip(ends, np.cumsum([float(s) for s in parts.values()]), strict=True):
        assert abs(end - share * len(text)) < 1


@given(few, st.integers(4, 20))
def test_every_line_goes_to_one_split_and_equal_lines_to_the_same(text, chunk):
    lines = [line for line in text.split("\n") if line.strip("\r")]
    with drafted(text, "lines", chunk) as draft:
        divide(draft, shares("50,50"), None)
        read = [text_of(draft, name).split("\n")[:-1] for name in draft.splits]
    assert Counter(read[0] + read[1]) == Counter(lines)
    assert not set(read[0]) & set(read[1])
    for split in read:  # in the order of the text
        kept = [line for line in lines if line in set(split)]
        assert split == kept


@st.composite
def readings(draw) -> tuple[int, TrainConfig]:
    """The size of a text, and a configuration whose batches it is long enough for."""
    batch, length = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    size = draw(st.integers(batch * length, 200))
    assume(size > 1)
    state = draw(st.sampled_from(["carry", "reset"]))
    return size, TrainConfig(batch=batch, length=length, state=state, seed=draw(st.integers(0, 9)))


@given(readings())
def test_a_batch_predicts_every_symbol_from_the_one_before_it(reading):
    """Symbol i is i, so that a target says from which place of the text it is."""
    size, config = reading
    batches, last = Batches(np.arange(size), config, beginning=size), {}
    learned = Counter()
    for step in range(batches.steps_per_epoch):
        (rows,) = batches.at(step)
        for x, y, fresh in zip(rows.inputs, rows.targets, rows.fresh, strict=True):
            assert np.array_equal(y, (y[0] + np.arange(len(y))) % size)
            assert np.array_equal(x[1:], y[:-1])
            assert x[0] == (size if fresh else (y[0] - 1) % size)
        learned.update(rows.targets.flatten().tolist())
        if config.state == "carry":  # every stream goes on where it stopped
            first = rows.targets[:, 0]
            assert not step or np.array_equal(first, (last["targets"] + 1) % size)
            last["targets"] = rows.targets[:, -1]
    if config.state == "carry":
        assert max(learned.values()) == 1, "no symbol is learned twice in an epoch"


@given(readings(), st.data())
def test_documents_begin_afresh_and_are_learned_at_most_once_an_epoch(reading, data):
    size, config = reading
    inner = data.draw(st.sets(st.integers(1, size - 1), max_size=size // 2))
    ends = np.array([*sorted(inner), size])
    starts = {0, *ends[:-1].tolist()}
    batches = DocumentBatches(np.arange(size), ends, config, beginning=size)
    learned = Counter()
    for step in range(batches.steps_per_epoch):
        for rows in batches.at(step):
            for x, y, n in zip(rows.inputs, rows.targets, rows.sizes, strict=True):
                assert (y[:n] != IGNORED).all() and (y[n:] == IGNORED).all()
                if n:
                    assert np.array_equal(y[:n], y[0] + np.arange(n)), "one piece of the text"
                    assert not starts & set(y[1:n].tolist()), "no row runs into a document"
                    assert np.array_equal(x[1:n], y[: n - 1])
                    assert x[0] == (size if y[0] in starts else y[0] - 1)
                learned.update(y[:n].tolist())
    assert max(learned.values()) == 1


@given(few, st.lists(st.text("ab é\n", min_size=1, max_size=4), max_size=3), st.integers(1, 80))
def test_a_text_stops_before_its_first_stop_string_however_it_comes(text, stops, chars):
    tokenizer = ByteTokenizer()  # so that characters and stop strings come in parts
    growing, read = Text(Rules(tokenizer, chars, stops)), ""
    for symbol in tokenizer.encode(text):
        read += growing.take(int(symbol))
        if growing.ended:
            break
    cut = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    # a stop string may end behind the last character that is wanted
    whole = [text.find(stop) for stop in stops if stop in text[:chars]]
    assert text[:chars].startswith(read)
    assert not any(stop in read for stop in stops)
    if growing.ended:
        assert read == text[: min([chars, *whole])]
    else:
        assert cut == len(text) and len(text) < chars


def legal(rule) -> st.SearchStrategy:
    """Values that a field of the configuration takes."""
    limits = rule.metadata
    if limits["choices"]:
        return st.sampled_from(limits["choices"])
    if rule.type is bool:
        return st.booleans()
    if rule.type is str:
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    low = limits["low"] if limits["low"] is not None else limits["above"]
    if rule.type is int:
        return st.integers(low, min(limits["high"] or 2**40, 2**40))
    floats = st.floats(low, limits["high"] or 1e15, allow_nan=False)
    return floats.filter(lambda x: limits["above"] is None or x > limits["above"])


@given(st.data())
def test_every_configuration_comes_back_from_its_file(data):
    chosen = {}
    for section in fields(Config):
        if section.name == "cell":
            continue
        for rule in fields(getattr(Config(), section.name)):
            if data.draw(st.booleans()):
                chosen[f"{section.name}.{rule.name}"] = data.draw(legal(rule))
    if chosen.get("train.steps") and chosen.get("train.time_limit"):
        del chosen["train.steps"]
    config = Config().updated(chosen)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(config.toml(), encoding="utf-8")
        assert Config().updated(read_toml(path)) == config


@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 33), st.integers(0, 99))
def test_scans_of_every_shape_are_the_reference(batch, time, width, seed):
    random = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(batch, time, width, generator=random) for _ in range(2))
    drive = torch.randn(batch, time, 2 * width, generator=random)
    h0 = torch.randn(batch, width, generator=random)
    a = a.tanh()
    with using_backend("reference"):
        linear, gated = ops.linear_scan(a, b, h0), ops.gated_scan(drive, h0)
    for backend in ("torch", "cpu"):
        with using_backend(backend):
            for found, truth in zip(
                (*ops.linear_scan(a, b, h0), *ops.gated_scan(drive, h0)),
                (*linear, *gated),
                strict=True,
            ):
                close(found, truth, 1e-5)
