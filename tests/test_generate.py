import os
import time
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from conftest import KINDS

from seqlm.errors import InputError, SeqlmError, UsageError
from seqlm.generation import context, generate
from seqlm.generation.generate import Rules, Sampling, Text
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


def test_a_penalty_makes_recent_symbols_less_likely_whatever_the_sign_of_their_logits():
    logits = torch.tensor([2.0, -1.0, 1.0, -2.0])
    random = torch.Generator().manual_seed(0)
    sampling = Sampling(repetition_penalty=2.0)
    found = [sampling.draw(logits, random, recent=[0, 1, 0]) for _ in range(2000)]
    expected = torch.tensor([1.0, -2.0, 1.0, -2.0]).softmax(0)
    np.testing.assert_allclose(np.bincount(found, minlength=4) / 2000, expected, atol=0.03)


def test_a_penalty_ends_the_repetition_of_a_greedy_text(run):
    plain = run.generate("the ", 60, temperature=0)
    varied = run.generate("the ", 60, temperature=0, repetition_penalty=3.0)
    assert len(set(varied)) > len(set(plain))


def test_a_penalty_sees_the_symbols_of_the_window_and_not_the_prompt(run, monkeypatch):
    seen = []
    real = Sampling.draw
    monkeypatch.setattr(Sampling, "draw", lambda *given: seen.append([*given[3]]) or real(*given))
    written = run.generate("the ", 70, seed=1)
    symbols = run.tokenizer.encode(written).tolist()
    assert seen == [symbols[max(0, n - generate.WINDOW) : n] for n in range(70)]


@pytest.mark.parametrize(
    "values, expected",
    [
        (0.7, [0.7] * 5),
        ((0.3, 0.8), [0.3, 0.425, 0.55, 0.675, 0.8]),
        ((0.2, 1.0, 0.0), [0.2, 0.6, 1.0, 0.5, 0.0]),
    ],
)
def test_temperatures_go_piecewise_linearly_from_the_first_to_the_last(
    run, monkeypatch, values, expected
):
    seen = []
    real = Sampling.draw
    monkeypatch.setattr(
        Sampling,
        "draw",
        lambda self, *given: seen.append(self.temperature_at(given[3])) or real(self, *given),
    )
    run.generate("the ", 5, seed=1, temperature=values)
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize("cell", KINDS)
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
    logits, state = context.prefill(model, ids)
    whole = torch.from_numpy(np.concatenate([[7], ids]))[None]
    expected, end = model(whole)
    torch.testing.assert_close(logits, expected[0, -1], rtol=1e-4, atol=1e-5)
    for s, e in zip(state, end, strict=True):
        torch.testing.assert_close(s, e, rtol=1e-4, atol=1e-5)


def test_a_prompt_of_a_large_vocabulary_is_read_in_smaller_pieces(model, monkeypatch):
    sizes, size = [], model.vocab_size
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].numel()))
    monkeypatch.setattr("seqlm.model.LOGITS", 10 * size)
    context.prefill(model, np.arange(25) % size)
    assert sizes == [10, 10, 6]


def test_a_seed_decides_the_text(model):
    assert text(model, seed=1) == text(model, seed=np.int64(1)) != text(model, seed=2)


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
        ({"repetition_penalty": 0.5}, "--repetition-penalty 0.5: it must be from 1 (none)"),
        ({"temperature": (0.5, 101.0)}, "--temperature 0.5,101.0: it must be from 0 (greedy) to"),
    ],
)
def test_a_value_out_of_range_is_refused(options, message):
    with pytest.raises(UsageError) as error:
        Sampling(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("stop", [(), ("ab", "c")])
def test_a_text_among_others_is_what_its_number_alone_gives(model, stop):
    numbers = range(11)  # more than are made side by side
    texts, ended = [""] * len(numbers), []
    options = dict(chars=60, stop=stop, seed=5)
    for number, piece, last in generate.generate_many(model, ALPHABET, numbers=numbers, **options):
        assert number not in ended
        texts[number] += piece
        ended += [number] * last
    assert sorted(ended) == [*numbers]
    assert texts == [text(model, numbers=[number], **options) for number in numbers]
    assert texts[0] == text(model, **options)


def test_the_texts_of_two_seeds_are_unrelated(model):
    def texts(seed: int) -> list[str]:
        drawn = generate.generate_many(model, ALPHABET, numbers=range(8), seed=seed, chars=1)
        return [piece for _, piece, _ in drawn]

    drawn = [texts(seed) for seed in range(30)]
    shifted = [a[1:] == b[:-1] for a, b in pairwise(drawn)]
    assert not any(shifted)


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
    plain = context.prefill
    monkeypatch.setattr(context, "prefill", lambda m, ids, after: seen.append(ids) or plain(m, ids))
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
    real = context.prefill
    monkeypatch.setattr(
        context, "prefill", lambda m, p, after: read.extend(p.tolist()) or real(m, p)
    )
    model = LanguageModel(256, width=4, layers=1).eval()
    text(model, b"\xff\x00", ByteTokenizer(), chars=1)
    assert read == [0xFF, 0]
    with pytest.raises(InputError, match="not UTF-8"):
        text(LanguageModel(7, width=4, layers=1), b"\xff", chars=1)


def p_value(counts: np.ndarray, p: np.ndarray) -> float:
    """Of a chi-square test: how likely counts that differ as much or more are under p."""
    assert not counts[p == 0].any()
    expected = counts.sum() * p[p > 0]
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    half = torch.tensor([(len(expected) - 1) / 2, chi_square / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*half))


@pytest.mark.parametrize(
    "given, begun, allowed",
    [
        (dict(allow="the ca\n"), "", "the ca\n"),
        (dict(ban="e\n"), "", " .abcdfghiklmnorstvy"),
        (dict(regex="c(at|o\u20ac)|do|k[^x]{3}"), "", "cdk"),
        (dict(regex="(cat|co|d(og)?|ki)*!?[.]", ban="k"), "c", "ao"),
    ],
)
def test_constrained_symbols_follow_the_exact_conditional_distribution(run, given, begun, allowed):
    """Chi-square of 8,000 draws: the model's probabilities among the symbols that may follow."""
    text = Text(
        Rules.of(run.tokenizer, 9, (), **{"allow": None, "ban": "", "regex": None, **given})
    )
    logits = context.read(run.model, run.tokenizer, "the " + begun).logits
    for symbol in run.tokenizer.encode(begun):
        text.take(int(symbol))
    drawn = [text.draw(logits) for _ in range(8000)]
    p = logits.double().softmax(0).numpy()
    p[[symbol not in allowed for symbol in run.tokenizer.shown]] = 0
    counts = np.bincount(drawn, minlength=len(p))
    assert p_value(counts, p / p.sum()) > 0.001


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
