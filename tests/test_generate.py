import os
import time
from itertools import islice

import numpy as np
import pytest
import torch

from seqlm import cells, generate
from seqlm.errors import InputError, SeqlmError, UsageError
from seqlm.generate import Sampling
from seqlm.model import LanguageModel
from seqlm.text.tokenizer import ByteTokenizer, CharTokenizer

ALPHABET = CharTokenizer("abcdefg")
LOGITS = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()


def draws(sampling: Sampling, count: int = 2000) -> np.ndarray:
    random = torch.Generator().manual_seed(0)
    found = [sampling.draw(LOGITS, random) for _ in range(count)]
    return np.bincount(found, minlength=5) / count


def text(model, prompt="", tokenizer=ALPHABET, **options) -> str:
    return "".join(generate.generate(model, tokenizer, prompt, **options))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LanguageModel(7, width=12, layers=2, conv=3).eval()


def test_temperature_one_draws_by_the_models_probabilities():
    np.testing.assert_allclose(draws(Sampling()), LOGITS.exp(), atol=0.03)


def test_temperature_zero_takes_the_likeliest():
    assert draws(Sampling(temperature=0), 50)[0] == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-310])
def test_a_temperature_near_zero_is_nearly_greedy(temperature):
    assert draws(Sampling(temperature=temperature), 50)[0] == 1


def test_temperature_sharpens_and_flattens():
    expected = (LOGITS / 0.5).softmax(0)
    np.testing.assert_allclose(draws(Sampling(temperature=0.5)), expected, atol=0.03)


@pytest.mark.parametrize(
    "sampling, left",
    [
        (Sampling(top_k=2), 2),
        (Sampling(top_k=99), 5),
        (Sampling(top_p=0.69), 2),
        (Sampling(top_p=0.71), 3),
        (Sampling(top_p=0.01), 1),
        (Sampling(min_p=0.3), 3),
        (Sampling(min_p=1.0), 1),
        (Sampling(top_k=4, top_p=0.9, min_p=0.5), 2),
    ],
    ids=str,
)
def test_filters_keep_the_likeliest_in_their_proportions(sampling, left):
    kept = LOGITS.exp()[:left] / LOGITS.exp()[:left].sum()
    found = draws(sampling)
    assert found[left:].sum() == 0
    np.testing.assert_allclose(found[:left], kept, atol=0.03)


def test_top_k_keeps_exactly_k_and_of_equal_ones_the_lower_numbers():
    random = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    assert {Sampling(top_k=3).draw(logits, random) for _ in range(200)} == {0, 1, 2}
    assert {Sampling(top_k=1).draw(torch.zeros(300), random) for _ in range(20)} == {0}


@pytest.mark.parametrize("cell", cells.names())
def test_text_continues_the_prompt_as_the_sequence_form_would(cell):
    """Greedy steps against the whole text read anew for every character."""
    model = LanguageModel(7, width=12, layers=2, cell=cell).double().eval()
    written = text(model, "abc", chars=30, sampling=Sampling(temperature=0))
    whole = torch.tensor([[7, 0, 1, 2]])
    for _ in range(30):
        whole = torch.cat([whole, model(whole)[0][:, -1:].argmax(-1)], 1)
    assert written == ALPHABET.decode(whole[0, 4:].numpy())


@pytest.mark.parametrize("prompt", ["", "abcabc", "a" * 5000])
def test_a_prompt_in_chunks_is_the_prompt_as_a_whole(model, prompt):
    ids = ALPHABET.encode(prompt)
    logits, state = generate.prefill(model, ids)
    whole = torch.from_numpy(np.concatenate([[7], ids]))[None]
    expected, end = model(whole)
    torch.testing.assert_close(logits, expected[0, -1], rtol=1e-4, atol=1e-5)
    for s, e in zip(state, end, strict=True):
        torch.testing.assert_close(s, e, rtol=1e-4, atol=1e-5)


def test_a_seed_decides_the_text(model):
    assert text(model, seed=1) == text(model, seed=1) != text(model, seed=2)


def test_generation_neither_reads_nor_moves_torchs_generator(model):
    before = torch.random.get_rng_state()
    text(model, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("chars", [1, 2, 50])
@pytest.mark.parametrize("tokenizer", [ALPHABET, ByteTokenizer()])
def test_as_many_characters_as_asked_for(chars, tokenizer):
    model = LanguageModel(tokenizer.vocab_size, width=8, layers=1).eval()
    written = text(model, chars=chars, tokenizer=tokenizer)
    assert len(written) == chars
    written.encode("utf-8")


def test_text_ends_before_a_stop_string_that_may_span_pieces(model):
    whole = text(model, chars=200, seed=3)
    stop = whole[60:64]
    assert text(model, chars=200, seed=3, stop=[stop, "never"]) == whole[: whole.index(stop)]


def test_text_held_back_for_a_stop_string_is_given_out_at_the_end(model):
    whole = text(model, chars=50, seed=3)
    assert text(model, chars=50, seed=3, stop=[whole[-3:] + "x"]) == whole


def test_pieces_come_as_they_are_drawn(model):
    pieces = generate.generate(model, ALPHABET, chars=10**9)
    assert all(len(piece) == 1 for piece in islice(pieces, 20))


def test_a_character_takes_the_same_time_and_state_however_many_came_before():
    model = LanguageModel(7, width=16, layers=1).eval()
    drawn = generate.generate(model, ALPHABET, chars=10**9)
    spans = []
    for _ in range(40):
        began = time.thread_time()
        for _ in islice(drawn, 100):
            pass
        spans.append(time.thread_time() - began)
    # medians of the first and last ten: growth would be 4x
    assert np.median(spans[-10:]) < 2 * np.median(spans[:10])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1.0}, "--temperature -1.0: it must be from 0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": -1}, "--top-k -1: it must be at least 1"),
        ({"top_p": 0.0}, "--top-p 0.0: it must be above 0"),
        ({"top_p": 1.5}, "--top-p 1.5: it must be above 0 and at most 1"),
        ({"min_p": -0.1}, "--min-p -0.1: it must be from 0 to 1"),
    ],
)
def test_a_value_out_of_range_is_refused(options, message):
    with pytest.raises(UsageError) as error:
        Sampling(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("stop", [(), ("ab", "c")])
def test_a_text_among_others_is_what_its_seed_alone_gives(model, stop):
    seeds = range(5, 16)  # more than are made side by side
    texts, ended = [""] * len(seeds), []
    options = dict(chars=60, stop=stop)
    for number, piece, last in generate.generate_many(model, ALPHABET, seeds=seeds, **options):
        assert number not in ended
        texts[number] += piece
        ended += [number] * last
    assert sorted(ended) == [*range(len(seeds))]
    assert texts == [text(model, seed=seed, **options) for seed in seeds]


def test_no_characters_and_an_empty_stop_string_are_refused(model):
    with pytest.raises(UsageError, match="--chars 0: it must be at least 1"):
        text(model, chars=0)
    with pytest.raises(UsageError, match="--stop '': the string to stop at is empty"):
        text(model, stop=[""])


def test_a_model_that_is_not_finite_writes_nothing(model):
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(SeqlmError, match="weights are not finite"):
        text(model)


def test_a_prompt_with_an_unknown_character_is_refused(model):
    with pytest.raises(InputError, match="'!' .* at position 2 is not in the vocabulary"):
        text(model, "ab!")


# Documents


@pytest.mark.parametrize("documents, last", [("lines", "\n"), ("files", "")])
def test_a_sample_is_one_document(documents, last):
    tokenizer = CharTokenizer("\nabcdef", documents)
    model = LanguageModel(tokenizer.vocab_size, width=12, layers=1).eval()
    samples = [text(model, "", tokenizer, chars=1000, seed=seed) for seed in range(20)]
    assert all(sample.endswith(last) for sample in samples)
    if documents == "lines":
        assert all(sample.count("\n") == 1 for sample in samples)
    assert len({len(sample) for sample in samples}) > 3, "they end where they like"
    assert max(map(len, samples)) < 1000


def test_a_document_may_be_cut_by_the_number_of_characters():
    tokenizer = CharTokenizer("\nabcdef", "lines")
    model = LanguageModel(tokenizer.vocab_size, width=12, layers=1).eval()
    assert all(len(text(model, "", tokenizer, chars=2, seed=seed)) <= 2 for seed in range(9))


@pytest.mark.parametrize(
    "prompt, read",
    [("cab", "cab"), ("bad\nfee\ncab", "cab"), ("", ""), ("bad\n", ""), ("\ncab", "cab")],
)
def test_only_the_document_that_a_prompt_begins_is_read(monkeypatch, prompt, read):
    tokenizer, seen = CharTokenizer("\nabcdef", "lines"), []
    model = LanguageModel(tokenizer.vocab_size, width=12, layers=1).eval()
    plain = generate.prefill
    monkeypatch.setattr(generate, "prefill", lambda m, ids: seen.append(ids) or plain(m, ids))
    text(model, prompt, tokenizer, chars=5)
    assert tokenizer.decode(seen[0]) == read


@pytest.mark.parametrize("stop", [b"\xff", os.fsdecode(b"\xff"), [b"zz", b"\xffa"], b"a\xff"])
def test_a_model_of_bytes_stops_at_raw_bytes(stop, monkeypatch):
    """0xff is part of no character; the shell gives it as a surrogate."""
    written = iter(b"ab\xc3\xa9\xfea\xffa" * 9)
    monkeypatch.setattr(Sampling, "draw", lambda *_: next(written))
    model = LanguageModel(256, width=4, layers=1).eval()
    ends = {b"a\xff": "ab\u00e9\ufffd"}.get(stop if isinstance(stop, bytes) else b"")
    found = text(model, b"\xff\xfe", ByteTokenizer(), stop=stop, chars=30)
    assert found == (ends or "ab\u00e9\ufffda")


def test_a_prompt_of_raw_bytes_is_read_as_it_is(monkeypatch):
    read = []
    real = generate.prefill
    monkeypatch.setattr(generate, "prefill", lambda m, p: read.extend(p.tolist()) or real(m, p))
    model = LanguageModel(256, width=4, layers=1).eval()
    text(model, b"\xff\x00", ByteTokenizer(), chars=1)
    assert read == [0xFF, 0]
    with pytest.raises(InputError, match="not UTF-8"):
        text(LanguageModel(7, width=4, layers=1), b"\xff", chars=1)


@pytest.mark.parametrize("given", [dict(allow="the ca\n"), dict(ban="e\n"), dict(ban="a")])
def test_constrained_symbols_follow_the_exact_conditional_distribution(run, given):
    """Chi-square of 20,000 first characters against the probabilities among those allowed."""
    predictor = run.predictor().feed("the ")
    symbols, p = np.array(predictor.symbols), predictor.probabilities()
    allowed = [s in given.get("allow", s) and s not in given.get("ban", "") for s in symbols]
    p = np.where(allowed, p, 0) / p[allowed].sum()
    drawn = [text for _, text, _ in run.samples("the ", 20_000, chars=1, **given)]
    counts = np.array([drawn.count(symbol) for symbol in symbols])
    assert counts.sum() == 20_000 and not counts[p == 0].any()
    expected = 20_000 * p[p > 0]
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # 4 standard deviations above the mean


def test_banned_characters_never_occur(seqlm_command, run):
    text = seqlm_command("generate", "--ban", "e\n", "--chars", "300", "--seed", "1").out
    assert len(text) == 300 and not set("e\n") & set(text)
    text = seqlm_command("generate", "--allow", "the ", "--chars", "300", "--seed", "1").out
    assert set(text) <= set("the ")


@pytest.mark.parametrize(
    "given, said",
    [
        (["--ban", "€"], "--ban: '€' is not a symbol of the run's vocabulary."),
        (["--allow", "€"], "--allow: '€' is not a symbol of the run's vocabulary."),
        (["--allow", "a", "--ban", "a"], "--allow and --ban leave no symbol."),
    ],
)
def test_characters_that_cannot_be_constrained_are_errors(seqlm_command, run, given, said):
    result = seqlm_command("generate", *given)
    assert result.code == 3 and said in result.err and result.out == ""
