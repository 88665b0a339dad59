"""bits-per-char is exact: against plain loops, against entropies that are known, on hard text."""

import math
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from conftest import KINDS

import seqlm
from seqlm.errors import InputError, SeqlmError, UsageError
from seqlm.evaluation import evaluate
from seqlm.evaluation.passage import passage_of_split, passage_of_text
from seqlm.model import LanguageModel
from seqlm.text import staging
from seqlm.text.corpus import open_corpus
from seqlm.text.prepare import prepare
from seqlm.text.tokenizer import ByteTokenizer, CharTokenizer

V = 7
SYMBOLS = np.random.default_rng(0).integers(0, V, 1500).astype(np.uint8)


@pytest.fixture
def model():
    return LanguageModel(V, width=12, layers=2, conv=3).eval()


def by_hand(model, symbols, state=None, first=None):
    """Sum of -ln p, one step at a time: the first input is `first`, and all symbols count."""
    state = model.initial_state(1) if state is None else state
    nats, before = 0.0, model.beginning if first is None else first
    with torch.no_grad():
        for symbol in symbols.tolist():
            logits, state = model.step(torch.tensor([before]), state)
            nats -= torch.log_softmax(logits[0].double(), 0)[symbol].item()
            before = symbol
    return nats


@pytest.mark.parametrize("cell", KINDS)
def test_stream_is_every_symbol_stepped_through_by_hand(cell):
    model = LanguageModel(V, width=12, layers=2, cell=cell).eval()
    assert evaluate.stream(model, SYMBOLS[:400]).nats == pytest.approx(
        by_hand(model, SYMBOLS[:400]), rel=1e-6
    )


@pytest.mark.parametrize("tie", [False, True])
def test_a_tempered_model_has_its_logits_divided(tie):
    model = LanguageModel(V, width=12, layers=2, tie=tie).eval()
    tokens = torch.randint(V, (2, 9))
    with torch.no_grad():
        logits = model(tokens)[0]
        model.temper(1.25)
        torch.testing.assert_close(model(tokens)[0], logits / 1.25)


def test_the_protocol_says_the_temperature_and_the_rounding(run, seqlm_command):
    found = seqlm_command("eval", "--temperature", "1.25", "--dtype", "bfloat16", "--json").json
    assert found["protocol"] == "stream, temperature 1.25, bfloat16 matrices"
    assert found["dtype"] == "bfloat16"
    rounded = seqlm.load(run.path, dtype="bfloat16").tempered(1.25)
    assert rounded.evaluate()["nats_per_char"] == found["nats_per_char"]
    both = seqlm_command("eval", "--with", str(run.path), "--temperature", "1.25", "--json").json
    assert both["protocol"] == "stream, ensemble of 2, temperature 1.25"
    assert both["nats_per_char"] == pytest.approx(run.tempered(1.25).evaluate()["nats_per_char"])
    for wrong in ("0", "-1", "nan", "101"):
        refused = seqlm_command("eval", "--temperature", wrong)
        assert refused.code == 2 and "must be above 0, and at most 100" in refused.err


@pytest.mark.parametrize("chunk", [1, 7, 256, 4096])
def test_stream_does_not_depend_on_the_chunk(model, chunk):
    assert evaluate.stream(model, SYMBOLS, chunk=chunk).nats == pytest.approx(
        evaluate.stream(model, SYMBOLS).nats, rel=1e-6
    )


@pytest.mark.parametrize("context", [1, 5, 64, 599, 5000])
def test_window_is_a_naive_loop_over_cold_windows(model, context):
    nats, symbols = 0.0, SYMBOLS[:600]
    for start in range(0, len(symbols) - 1, context):
        inside = symbols[start : start + context + 1]
        with torch.no_grad():  # after the symbol for the beginning of text
            _, begun = model.step(torch.tensor([model.beginning]))
        nats += by_hand(model, inside[1:], begun, first=int(inside[0]))
    assert evaluate.window(model, symbols, context).nats == pytest.approx(nats, rel=1e-6)


def test_stripes_count_every_symbol_once_after_a_warmup(model):
    """Five stripes of 300, each but the first behind the 256 symbols before it."""
    nats = by_hand(model, SYMBOLS[:300])
    for start in range(300, 1500, 300):
        before = torch.from_numpy(SYMBOLS[start - 256 : start - 1].astype(np.int64))
        with torch.no_grad():
            state = model(before[None])[1]
        part = SYMBOLS[start : start + 300]
        nats += by_hand(model, part, state, first=int(SYMBOLS[start - 1]))
    assert evaluate.stripes(model, SYMBOLS).nats == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 511, 512, 513, 1027])
def test_stripes_of_any_size_are_close_to_the_stream(model, size):
    symbols = SYMBOLS[:size]
    stripes, stream = evaluate.stripes(model, symbols).nats, evaluate.stream(model, symbols).nats
    assert stripes == pytest.approx(stream, rel=1e-3)


def constant(model, logits):
    """The model that always says the same."""
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(logits)
    return model


def test_a_uniform_model_scores_log2_v_by_every_protocol(model):
    constant(model, torch.zeros(V))
    by = {"stream": evaluate.stream(model, SYMBOLS), "stripes": evaluate.stripes(model, SYMBOLS)}
    by["window"] = evaluate.window(model, SYMBOLS, 64)
    for protocol, sums in by.items():
        count = 1499 if protocol == "window" else 1500
        assert sums.nats / count == pytest.approx(math.log(V), abs=1e-6), protocol


def test_a_model_of_the_counts_scores_the_entropy(model):
    p = np.bincount(SYMBOLS, minlength=V) / len(SYMBOLS)
    constant(model, torch.from_numpy(p).log())
    entropy = -(p * np.log2(p)).sum()
    nats = evaluate.stream(model, SYMBOLS).nats
    assert nats / math.log(2) / len(SYMBOLS) == pytest.approx(entropy, abs=1e-6)


MODEL = "model.safetensors"
HARD = "  tab\t CRLF\r\n é e\u0301 日本語 🙂👩‍👩‍👧 \u2581"


@pytest.mark.parametrize("unit", ["char", "byte"])
def test_characters_and_bytes_come_from_the_text_whatever_the_unit(unit):
    data = HARD.encode()
    symbols = "".join(sorted(set(data.decode())))
    tokenizer = CharTokenizer(symbols) if unit == "char" else ByteTokenizer()
    model = constant(LanguageModel(tokenizer.vocab_size, 8, 1), torch.zeros(tokenizer.vocab_size))
    passage = passage_of_text([data], tokenizer)
    score = evaluate.score(model, tokenizer, passage)
    assert (score.chars, score.bytes) == (len(HARD), len(data))
    bits = score.tokens * math.log2(tokenizer.vocab_size)
    assert score.bits_per_char == pytest.approx(bits / len(HARD), rel=1e-6)
    assert score.bits_per_byte == pytest.approx(bits / len(data), rel=1e-6)
    assert score.nats_per_char == pytest.approx(score.bits_per_char * math.log(2))
    assert score.perplexity == pytest.approx(tokenizer.vocab_size, rel=1e-5)


def test_window_leaves_the_first_symbol_out_of_the_counts():
    tokenizer = CharTokenizer("ab🙂")
    model = LanguageModel(3, 8, 1)
    score = evaluate.score(
        model, tokenizer, passage_of_text(["🙂ab".encode()], tokenizer), "window", 2
    )
    assert (score.tokens, score.chars, score.bytes) == (2, 2, 2)


def test_where_characters_are_bytes_all_counts_are_bytes():
    tokenizer, model = ByteTokenizer(), LanguageModel(256, 8, 1)
    passage = passage_of_text(["éab🙂".encode()], tokenizer, in_bytes=True)
    for protocol, counted in ("stream", 8), ("window", 7):
        score = evaluate.score(model, tokenizer, passage, protocol)
        assert (score.tokens, score.chars, score.bytes) == (counted, counted, counted)


def test_bytes_that_are_not_text_have_no_bits_per_char():
    tokenizer, model = ByteTokenizer(), LanguageModel(256, 8, 1)
    score = evaluate.score(model, tokenizer, passage_of_text([b"\xff\xfe"], tokenizer))
    assert score.bits_per_char is None and score.bits_per_byte > 0


def test_a_figure_too_large_or_not_finite_is_no_number(model):
    tokenizer = CharTokenizer("abcdefg")
    passage = passage_of_text([b"bbbb"], tokenizer)
    constant(model, torch.tensor([1e4, 0, 0, 0, 0, 0, 0]))
    assert evaluate.score(model, tokenizer, passage).perplexity is None
    constant(model, torch.full((V,), float("nan")))
    with pytest.raises(SeqlmError, match="not a finite number. Choose another step with --step"):
        evaluate.score(model, tokenizer, passage)


def test_what_cannot_be_evaluated_is_refused():
    tokenizer, model = CharTokenizer("ab"), LanguageModel(2, 8, 1)
    with pytest.raises(InputError, match="the text is empty"):
        passage_of_text([b""], tokenizer)
    with pytest.raises(InputError, match="nothing to evaluate"):
        passage_of_text([b"xyz"], tokenizer, "skip")
    with pytest.raises(UsageError, match="Unknown value of --on-unknown 'drop'"):
        passage_of_text([b"xyz"], tokenizer, "drop")
    one = passage_of_text([b"a"], tokenizer)
    with pytest.raises(InputError, match="needs at least 2 symbols"):
        evaluate.score(model, tokenizer, one, "window")
    with pytest.raises(UsageError, match="Unknown protocol 'streem'. Did you mean 'stream'"):
        evaluate.score(model, tokenizer, one, "streem")
    with pytest.raises(UsageError, match="--context 0: it must be at least 1"):
        evaluate.score(model, tokenizer, one, "window", 0)


# Documents


def cut_into_documents(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.resize(SYMBOLS, sum(sizes)), np.cumsum(sizes)


@pytest.mark.parametrize("side_by_side", [1, 3, 1024])
@pytest.mark.parametrize("at_once", [1, 16, 16384])
def test_each_document_is_a_stream_of_its_own(model, monkeypatch, side_by_side, at_once):
    monkeypatch.setattr(evaluate, "SIDE_BY_SIDE", side_by_side)
    monkeypatch.setattr(evaluate, "AT_ONCE", at_once)
    symbols, ends = cut_into_documents([1, 40, 3, 3, 117, 1, 64])
    alone = sum(evaluate.stream(model, part).nats for part in np.split(symbols, ends[:-1]))
    assert evaluate.each_document(model, symbols, ends).nats == pytest.approx(alone, rel=1e-6)


def test_documents_in_another_order_have_the_same_figure(model):
    symbols, ends = cut_into_documents([5, 40, 3, 20])
    parts = np.split(symbols, ends[:-1])
    turned = np.concatenate(parts[::-1]), np.cumsum([len(part) for part in parts[::-1]])
    assert evaluate.each_document(model, *turned).nats == pytest.approx(
        evaluate.each_document(model, symbols, ends).nats, rel=1e-6
    )


@pytest.mark.parametrize(
    "documents, given, ends",
    [
        ("none", [b"ab\n", b"c"], None),
        ("lines", [b"ab\n", b"c\n"], [3, 5]),
        ("lines", [b"\n\nab\n\nc"], [3, 5]),
        ("files", [b"ab\n", b"c"], [4, 6]),
    ],
)
def test_a_text_is_cut_into_the_documents_of_the_tokenizer(documents, given, ends):
    tokenizer = CharTokenizer("\nabc", documents)
    passage = passage_of_text(given, tokenizer)
    assert passage.ends is None if ends is None else passage.ends.tolist() == ends
    read = b"ab\nc\n" if documents == "lines" else b"ab\nc"
    assert tokenizer.decode_bytes(passage.symbols) == read
    assert (passage.chars, passage.bytes) == (len(read), len(read))


@pytest.mark.parametrize("documents", ["none", "lines", "files"])
@pytest.mark.parametrize("text", ["a line\n" * 60_000, "é" * 200_000, "x\n\n" * 100_000 + "end"])
def test_a_long_text_is_read_in_pieces_as_if_it_were_one(monkeypatch, documents, text):
    """The symbols, counts and hash do not depend on the pieces; memory stays below 3 texts."""
    tokenizer, data = CharTokenizer("\n adeilnxé", documents), text.encode("utf-8")
    tracemalloc.start()
    monkeypatch.setattr(staging, "BYTES_AT_ONCE", 20_000)
    passage = passage_of_text([data], tokenizer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    monkeypatch.setattr(staging, "BYTES_AT_ONCE", 1 << 20)
    whole = passage_of_text([data], tokenizer)
    assert np.array_equal(passage.symbols, whole.symbols) and passage.symbols.dtype == np.uint8
    assert passage[1:5] == whole[1:5] and passage.chars == len(tokenizer.decode(whole.symbols))
    lines = 8 * len(passage.ends) if passage.ends is not None else 0
    assert peak < 3 * len(data) + 500_000 + 3 * lines


def test_a_character_that_is_unknown_is_placed_in_a_long_text(monkeypatch):
    """A message about a later piece says behind which byte the piece begins."""
    monkeypatch.setattr(staging, "BYTES_AT_ONCE", 1000)
    tokenizer = CharTokenizer("ab")
    with pytest.raises(InputError, match=r"^In the part .* behind byte 2,000: .* at position 5 is"):
        passage_of_text([b"ab" * 1002 + b"ac"], tokenizer)
    with pytest.raises(InputError, match=r"^Character 'c' \(U\+0063\) at position 1 is"):
        passage_of_text([b"ac"], tokenizer)


def test_windows_over_documents_are_refused(model):
    tokenizer = CharTokenizer("\nabcdef", "lines")
    passage = passage_of_text([b"ab\ncd\n"], tokenizer)
    assert evaluate.score(model, tokenizer, passage).tokens == 6
    with pytest.raises(UsageError, match="would read across the borders of documents"):
        evaluate.score(model, tokenizer, passage, "window")


@pytest.mark.parametrize("unit", ["char", "byte", "sentencepiece"])
@pytest.mark.parametrize("documents", ["none", "lines", "files"])
def test_a_split_is_scored_over_its_raw_characters_whatever_the_unit(tmp_path, unit, documents):
    """A uniform model of V symbols costs log2 V for every symbol, whatever these stand for."""
    (tmp_path / "texts").mkdir()
    for i in range(30):
        text = f"日本 {i} é🙂\tx  y\n" * (i + 1)
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    folder, manifest, _ = prepare(["texts"], unit=unit, documents=documents)
    corpus = open_corpus(folder)
    passage = passage_of_split(corpus, "val", corpus.tokenizer)
    counts = manifest["splits"]["val"]
    text = corpus.tokenizer.decode_bytes(passage.symbols)
    assert (counts["chars"], counts["bytes"]) == (len(text.decode()), len(text))
    uniform = LanguageModel(manifest["vocab_size"], width=4, layers=1).eval()
    torch.nn.init.zeros_(uniform.head.weight)
    found = evaluate.score(uniform, corpus.tokenizer, passage)
    bits = counts["tokens"] * math.log2(manifest["vocab_size"])
    assert found.bits_per_char == pytest.approx(bits / counts["chars"], rel=1e-6)
    assert found.bits_per_byte == pytest.approx(bits / counts["bytes"], rel=1e-6)
    texts = (
        [text]
        if documents != "files"
        else [
            corpus.tokenizer.decode_bytes(part)
            for part in np.split(passage.symbols, passage.ends[:-1])
        ]
    )
    again = passage_of_text(texts, corpus.tokenizer)
    assert np.array_equal(again.symbols, passage.symbols)
    assert again.sha256 == counts["sha256"]


def test_a_split_that_was_changed_is_not_scored(corpus):
    opened = open_corpus(corpus)
    path = corpus / "val.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(InputError, match="val.bin was cut or changed after it was written"):
        passage_of_split(opened, "val", opened.tokenizer)


def test_a_large_vocabulary_is_read_in_smaller_pieces_and_scored_the_same(model, monkeypatch):
    symbols, ends = cut_into_documents([300, 40, 3, 700])

    def everything():
        sums = [evaluate.stream(model, SYMBOLS), evaluate.stripes(model, SYMBOLS)]
        sums += [evaluate.window(model, SYMBOLS, 64), evaluate.each_document(model, symbols, ends)]
        return np.array(sums)

    whole = everything()
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].numel()))
    monkeypatch.setattr("seqlm.model.LOGITS", 700 * V)
    assert everything() == pytest.approx(whole, rel=1e-6)
    assert max(sizes) <= 700


def test_the_lines_of_two_files_are_not_run_together(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(f"line {i}")  # without a newline
    corpus = open_corpus(prepare(["texts"], unit="byte", documents="files")[0])
    passage = passage_of_split(corpus, "train", ByteTokenizer("lines"))
    assert len(passage.ends) == len(corpus.ends("train"))


# The command


def independent_bits_per_char(step: Path, corpus: Path) -> float:
    """minGRU by hand in numpy and float64, straight from the files: shares no line with seqlm."""
    w = {k: v.astype(np.float64) for k, v in safetensors.numpy.load_file(step / MODEL).items()}
    text, layers = np.fromfile(corpus / "val.bin", np.uint8), 2
    norm = lambda x, g: g * x / np.sqrt((x * x).mean() + np.finfo(np.float32).eps)  # noqa: E731
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    linear = lambda name, x: w[f"{name}.weight"] @ x + w[f"{name}.bias"]  # noqa: E731
    h, nats, before = [0.0] * layers, 0.0, len(w["head.bias"])
    for symbol in text:
        x = w["embedding.weight"][before]
        for i in range(layers):
            name = f"blocks.{i}"
            k, u = np.split(
                linear(f"{name}.cell.inputs", norm(x, w[f"{name}.cell_norm.weight"])), 2
            )
            g = np.where(u >= 0, u + 0.5, sigmoid(u))
            h[i] = (1 - sigmoid(k)) * h[i] + sigmoid(k) * g
            x = x + linear(f"{name}.cell.outputs", h[i])
            m = linear(f"{name}.mlp.inputs", norm(x, w[f"{name}.mlp_norm.weight"]))
            gelu = m * 0.5 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in m]))
            x = x + linear(f"{name}.mlp.outputs", gelu)
        logits = linear("head", norm(x, w["norm.weight"]))
        nats, before = nats + np.log(np.exp(logits).sum()) - logits[symbol], symbol
    return nats / math.log(2) / len(text)


def test_eval_prints_what_an_independent_script_finds_whatever_the_chunk(
    corpus, seqlm_command, monkeypatch
):
    seqlm.train(
        corpus,
        cell="mingru",
        preset="tiny",
        width=16,
        layers=2,
        batch=4,
        length=32,
        steps=60,
        set={"model.mlp": 2.0, "model.conv": 0},
    )
    by_script = independent_bits_per_char(Path("checkpoints/story-mingru/step-00000060"), corpus)
    stream = evaluate.stream
    for chunk in (1, 7, 256, 4096):
        monkeypatch.setattr(evaluate, "stream", partial(stream, chunk=chunk))
        printed = float(seqlm_command("eval", "bits-per-char").out)
        exact = seqlm_command("eval", "--json").json["bits_per_char"]
        assert exact == pytest.approx(by_script, abs=1e-6), chunk
        assert printed == pytest.approx(exact, abs=1e-6)
        assert exact < 4, "a model that learned something"


@pytest.mark.parametrize("unit", ["char", "byte", "sentencepiece"])
def test_the_command_counts_characters_and_bytes_of_hard_text_whatever_the_unit(
    seqlm_command, unit
):
    """Emoji, combining marks, Chinese, leading spaces, tabs, CRLF: counted by Python itself."""
    text = "".join(f"{HARD}\r\n  {i} " for i in range(300))
    Path("hard.txt").write_bytes(text.encode("utf-8"))
    folder = prepare(["hard.txt"], unit=unit)[0]
    seqlm.train(folder, preset="tiny", width=16, layers=1, batch=4, length=16, steps=2)
    found = seqlm_command("eval", "--data", folder, "--json").json
    corpus = open_corpus(folder)
    val = corpus.tokenizer.decode_bytes(corpus.symbols("val"))
    assert val.decode("utf-8") in text
    assert (found["chars"], found["bytes"]) == (len(val.decode("utf-8")), len(val))
    nats = found["nats_per_char"] * found["chars"]
    assert found["bits_per_char"] == pytest.approx(nats / math.log(2) / found["chars"])
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"])


def test_bytes_that_are_no_text_have_a_figure_per_byte(seqlm_command):
    data = bytes(np.random.default_rng(0).integers(0, 256, 3000, "u1"))
    Path("noise.bin").write_bytes(data)
    folder = prepare(["noise.bin"], unit="byte")[0]
    seqlm.train(folder, preset="tiny", width=16, layers=1, batch=4, length=16, steps=2)
    found = seqlm_command("eval", "--json").json
    assert (found["bits_per_char"], found["chars"]) == (None, None)
    assert found["bytes"] == len(np.fromfile(folder / "val.bin", np.uint8))
    assert 7.9 < found["bits_per_byte"] < 9
    assert seqlm_command("eval", "bits-per-char").code == 3
