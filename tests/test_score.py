"""How surprising a text is: the parts of any unit add up to what `eval` states."""

import csv
import io
import json
import re
from itertools import groupby
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import valid

import seqlm
from seqlm.cli._app import app
from seqlm.errors import InputError, SeqlmError, UsageError
from seqlm.evaluation import evaluate, score
from seqlm.evaluation.passage import passage_of_text
from seqlm.lab import tint
from seqlm.model import LanguageModel
from seqlm.text.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    train_sentencepiece,
)

TEXT = "Ein Bär, ein Öl.\n\n  “Wer?”  fragt  er\tnicht.\nDas Ende" * 5


def pieces(documents: str) -> SentencePieceTokenizer:
    alphabet = np.array(sorted({ord(c) for c in TEXT}))
    return SentencePieceTokenizer(
        train_sentencepiece([TEXT.encode() * 20], alphabet, 330, "unigram"), documents
    )


def scored(kind: str, documents: str, per: str, text: str = TEXT, **options):
    """The rows of a text by an untrained model, and the bits that `eval` states for it."""
    tokenizer = {
        "char": lambda: CharTokenizer("".join(sorted({*TEXT, "\n"})), documents),
        "byte": lambda: ByteTokenizer(documents),
        "pieces": lambda: pieces(documents),
    }[kind]()
    torch.manual_seed(1)
    model = LanguageModel(tokenizer.vocab_size, 16, 1, "mingru").eval()
    torch.nn.init.normal_(model.head.weight if model.head else model.embedding.weight)
    passage = passage_of_text([text.encode(), text.encode()], tokenizer)
    top = options.pop("top", 0)
    rows = [*score.rows(score.chunks(model, passage, top), tokenizer, passage, per, **options)]
    return rows, evaluate.score(model, tokenizer, passage).nats / log(2), passage


@pytest.mark.parametrize("per", score.UNITS)
@pytest.mark.parametrize("documents", ["none", "lines", "files"])
@pytest.mark.parametrize("kind", ["char", "byte", "pieces"])
def test_the_bits_of_all_rows_are_those_of_eval(kind, documents, per):
    for space in score.SPACES:
        rows, bits, passage = scored(kind, documents, per, space=space)
        assert sum(row.surprisal_bits for row in rows) == pytest.approx(bits, rel=1e-6)
        assert sum(row.chars for row in rows) == passage.chars
        assert [row.offset for row in rows] == sorted(row.offset for row in rows)


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_the_characters_of_the_rows_are_the_text(kind):
    rows, _, _ = scored(kind, "none", "char")
    assert "".join(row.text for row in rows) == 2 * TEXT
    assert [row.line for row in rows] == [
        1 + (2 * TEXT)[:i].count("\n") for i in range(2 * len(TEXT))
    ]


@pytest.mark.parametrize("kind", ["char", "byte", "pieces"])
@pytest.mark.parametrize("space", score.SPACES)
def test_the_words_are_those_of_the_regular_expression(kind, space):
    text = "  One two,  three\n\nfour \n"
    rows, _, _ = scored("byte", "none", "word", text, space=space)
    assert [row.text for row in rows] == (2 * text).split()
    rows, _, _ = scored("byte", "none", "word", text, space=space, words="[a-z]+")
    assert [row.text for row in rows] == re.findall("[a-z]+", 2 * text)


def test_the_space_counts_to_the_word_after_or_before_it():
    """The first word also takes the text before it, and the last word the text after it."""
    text = " a bb\n"
    after, _, _ = scored("byte", "files", "word", text, space="after")
    assert [(row.text, row.chars) for row in after] == [("a", 3), ("bb", 3)] * 2
    before, _, _ = scored("byte", "files", "word", text, space="before")
    assert [(row.text, row.chars) for row in before] == [("a", 2), ("bb", 4)] * 2


def test_of_equal_probabilities_one_is_the_likeliest_as_for_eval():
    logits, targets = torch.zeros(1, 4, 10), torch.tensor([[0, 3, 9, 0]])
    ranks = score.details(0)(logits, targets)[2]
    assert ranks.tolist() == [[1, 4, 10, 1]]
    assert torch.equal(ranks == 1, evaluate.loss_and_hit(logits, targets)[1] == 1)


def test_ranks_entropies_and_alternatives_are_those_of_the_logits():
    tokenizer = CharTokenizer("".join(sorted(set(TEXT))))
    model = LanguageModel(tokenizer.vocab_size, 16, 1, "lem").eval()
    torch.nn.init.normal_(model.embedding.weight)
    passage = passage_of_text([TEXT.encode()], tokenizer)
    chunks = score.chunks(model, passage, top=3)
    with torch.inference_mode():
        symbols = torch.from_numpy(passage.symbols.astype(np.int64))
        inputs = torch.cat([torch.tensor([model.beginning]), symbols[:-1]])
        p = torch.softmax(model(inputs[None])[0][0].double(), dim=-1)
    for row, q, symbol in zip(
        score.rows(chunks, tokenizer, passage), p, symbols.tolist(), strict=True
    ):
        assert row.probability == pytest.approx(float(q[symbol]), rel=1e-4)
        assert row.entropy_bits == pytest.approx(float(-(q * q.log2()).sum()), rel=1e-4)
        assert row.rank == 1 + int((q > q[symbol]).sum())
        expected = q.topk(3)
        assert [text for text, _ in row.alternatives] == [
            tokenizer.symbols[i] for i in expected.indices.tolist()
        ]
        assert [p for _, p in row.alternatives] == pytest.approx(expected.values.tolist(), rel=1e-4)


def test_a_character_of_several_bytes_is_one_row_without_a_rank():
    rows, _, _ = scored("byte", "none", "char", "aÖ", top=2)
    assert [(row.text, row.rank is None, len(row.alternatives)) for row in rows] == [
        ("a", False, 2),
        ("Ö", True, 0),
    ] * 2


def test_bytes_that_are_no_text_are_rows_too():
    tokenizer = ByteTokenizer()
    model = LanguageModel(256, 8, 1, "mingru").eval()
    passage = passage_of_text([b"a\xffb\xc3"], tokenizer)
    rows = [*score.rows(score.chunks(model, passage), tokenizer, passage)]
    assert [row.text for row in rows] == ["a", "\ufffd", "b", "\ufffd"]
    bits = evaluate.score(model, tokenizer, passage).nats / log(2)
    assert sum(row.surprisal_bits for row in rows) == pytest.approx(bits)


def test_a_line_and_a_document_end_within_a_character_too():
    model = LanguageModel(257, 8, 1, "mingru").eval()
    for documents, raw, lines in (
        ("none", [b"a\xc3\nb\n"], [(1, 1, "a\ufffd\n"), (1, 2, "b\n")]),
        ("files", [b"a\xc3", b"b"], [(1, 1, "a\ufffd"), (2, 1, "b")]),
    ):
        tokenizer = ByteTokenizer(documents=documents)
        passage = passage_of_text(raw, tokenizer)
        chunks = score.chunks(model, passage)
        rows = [(*row[:2], row.text) for row in score.rows(chunks, tokenizer, passage, "line")]
        assert rows == lines


def test_the_place_of_an_answer_is_that_in_the_text():
    text = "1+1=2\n12+13=25\n7=7\n"
    tokenizer = CharTokenizer("\n+12357=", "lines", "=")
    model = LanguageModel(tokenizer.vocab_size, 8, 1, "mingru").eval()
    passage = passage_of_text([text.encode()], tokenizer)
    rows = [*score.rows(score.chunks(model, passage), tokenizer, passage, "line")]
    assert [(row.document, row.line, row.text) for row in rows] == [
        (1, 1, "2"),
        (2, 2, "25"),
        (3, 3, "7"),
    ]
    assert [text[row.offset : row.offset + row.chars] for row in rows] == ["2", "25", "7"]


@pytest.mark.parametrize("documents", ["none", "files"])
def test_the_rows_do_not_depend_on_how_symbols_are_grouped(monkeypatch, documents):
    whole, _, _ = scored("char", documents, "char", top=2)
    monkeypatch.setattr(evaluate, "GROUP", 7)
    monkeypatch.setattr(evaluate, "CHUNK", 5)
    split, _, _ = scored("char", documents, "char", top=2)
    for one, other in zip(whole, split, strict=True):
        assert one[:5] == other[:5]
        assert one.surprisal_bits == pytest.approx(other.surprisal_bits, rel=1e-5)


def table(text: str) -> list[dict[str, str]]:
    return [*csv.DictReader(io.StringIO(text), dialect="excel-tab")]


def test_score_prints_the_totals_of_eval(seqlm_command, run, text_file):
    found = seqlm_command("score", text_file, "--json").json
    stated = seqlm_command("eval", "--text", text_file, "--json").json
    for key in ("bits_per_char", "bits_per_byte", "perplexity", "accuracy", "chars", "tokens"):
        assert found[key] == pytest.approx(stated[key], rel=1e-6)
    assert found["bits"] == pytest.approx(stated["bits_per_char"] * stated["chars"])
    assert found["text_sha256"] == stated["split_sha256"]


@pytest.mark.parametrize("per", score.UNITS)
def test_score_writes_a_table_whose_bits_add_up(seqlm_command, run, text_file, per):
    rows = table(seqlm_command("score", text_file, "--per", per).out)
    bits = seqlm_command("score", text_file, "--json").json["bits"]
    assert sum(float(row["surprisal_bits"]) for row in rows) == pytest.approx(bits, rel=1e-6)
    assert sum(int(row["chars"]) for row in rows) == 4000
    assert ("rank" in rows[0]) == (per == "char")


def test_a_table_keeps_one_line_for_a_row(seqlm_command, run, text_file):
    rows = table(seqlm_command("score", text_file, "--per", "char", "--top", "2").out)
    text = "".join(row["char"].replace("\\n", "\n") for row in rows)
    assert text == text_file.read_text()
    assert all(len(row["alternatives"].split(":")) >= 3 for row in rows)


def test_quotation_marks_do_not_join_the_rows_of_a_table(seqlm_command, run):
    seqlm_command("prepare", "story.txt", "--unit", "byte", "--out", "data/bytes")
    seqlm.train("data/bytes", run="bytes", **SMALLER)
    words = ['"hello', '"', "5'", '"no"', 'end"']
    Path("a.txt").write_text(" ".join(words))
    rows = table(seqlm_command("score", "a.txt", "--run", "bytes", "--per", "word").out)
    assert [row["word"] for row in rows] == words


def test_jsonl_has_the_rows_of_the_table(seqlm_command, run, text_file):
    given = ["score", text_file, "--per", "char", "--top", "1", "--against", str(run.path)]
    rows = table(seqlm_command(*given).out)
    lines = [json.loads(line) for line in seqlm_command(*given, "--jsonl").out.splitlines()]
    assert len(lines) == len(rows) == 4000
    for line, row in zip(lines[:50], rows[:50], strict=True):
        valid("score-line", line)
        assert line["text"] == row["char"].replace("\\n", "\n")
        assert f"{line['surprisal_bits']:.6f}" == row["surprisal_bits"] == row["against_bits"]
        assert (line["rank"], line["line"]) == (int(row["rank"]), int(row["line"]))
        assert f":{line['alternatives'][0]['probability']:.4f}" in row["alternatives"]


def test_a_text_without_a_word_is_one_row_with_a_warning(seqlm_command, run, text_file):
    result = seqlm_command("score", text_file, "--per", "word", "--words", "zzz")
    assert [row["word"] for row in table(result.out)] == [""]
    assert "Documents without a word: 1. Each has a row whose word is empty." in result.err


def test_sort_puts_the_most_surprising_line_first(seqlm_command, run, text_file):
    rows = table(seqlm_command("score", text_file, "--per", "line", "--sort").out)
    rates = [float(row["surprisal_bits"]) / int(row["chars"]) for row in rows]
    assert rates == sorted(rates, reverse=True)


def test_against_shows_both_runs(seqlm_command, run, text_file):
    (text_file.parent / "checkpoints/story-mingru").rename("checkpoints/one")
    seqlm.train("data/story", run="two", **SMALLER)
    rows = table(seqlm_command("score", "story.txt", "--per", "word", "--against", "one").out)
    one = seqlm_command("score", "story.txt", "--run", "one", "--json").json["bits"]
    assert sum(float(row["against_bits"]) for row in rows) == pytest.approx(one, rel=1e-6)
    given = ["score", "story.txt", "--per", "line", "--run", "one", "--dtype", "bfloat16"]
    for row in table(seqlm_command(*given, "--against", "one").out):
        assert row["surprisal_bits"] == row["against_bits"], "both are rounded"
    rounded = seqlm_command(*given[:2], *given[4:], "--json").json
    assert (rounded["protocol"], rounded["dtype"]) == ("stream, bfloat16 matrices", "bfloat16")


SMALLER = dict(preset="tiny", width=8, layers=1, batch=4, length=16, steps=2)


def test_a_page_holds_every_character_with_its_facts(seqlm_command, run):
    Path("a.txt").write_text("the cat\n", encoding="utf-8")
    result = seqlm_command("score", "a.txt", "--html", "a.html")
    assert result.code == 0, result.err
    page = Path("a.html").read_text(encoding="utf-8")
    (data,) = re.findall(r"const \[runs, facts\] = (.*);\n", page)
    runs, facts = json.loads(data)
    assert runs == ["story-mingru"] and len(facts) == len("the cat\n")
    shown = re.search(r'aria-label="[^"]*"\n>(.*)</pre>', page, re.S)[1]
    assert "".join(re.findall(r'<i class="l-?\d">(.)</i>', shown, re.S)) == "the cat\n"
    assert not re.search("https?:", page) and "default-src 'none'" in page  # nothing is loaded


def test_text_cannot_break_out_of_a_page(seqlm_command, run, text_file):
    seqlm_command("prepare", text_file, "--unit", "byte", "--out", "data/bytes")
    seqlm.train("data/bytes", run="bytes", **SMALLER)
    Path("a.txt").write_text("</script><b>&amp;", encoding="utf-8")
    assert seqlm_command("score", "a.txt", "--run", "bytes", "--html", "a.html").code == 0
    page = Path("a.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 1 and "<b>" not in page


def test_color_without_a_terminal_prints_bits(seqlm_command, run):
    Path("a.txt").write_text("the cat sees.\nthe old king\n", encoding="utf-8")
    shown = seqlm_command("score", "a.txt", "--color").out
    rows = table(seqlm_command("score", "a.txt", "--per", "word").out)
    expected = [f"{row['word']}[{float(row['surprisal_bits']):.1f}]" for row in rows]
    assert shown.split() == expected
    assert shown.count("\n") == 2


@pytest.fixture
def painted(monkeypatch):
    """A command on a terminal: [(character, its background or None), ...] of what it writes."""

    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    def command(*arguments):
        terminal = Terminal(io.BytesIO(), encoding="utf-8")
        with monkeypatch.context() as patched, pytest.raises(SystemExit):
            patched.setattr("sys.stdout", terminal)
            patched.delenv("NO_COLOR")
            patched.setenv("TERM", "xterm-256color")
            patched.setenv("COLORTERM", "truecolor")
            app(["score", *arguments], prog_name="seqlm")
        terminal.flush()
        parts = re.split(r"\x1b\[([\d;]*)m", terminal.buffer.getvalue().decode())
        styles = [None, *map(background, parts[1::2])]
        return [(c, style) for text, style in zip(parts[::2], styles, strict=True) for c in text]

    return command


def background(codes: str) -> str | None:
    """The background of black text, as #rrggbb, of the codes of a terminal."""
    found = re.fullmatch(r"30;48;2;(\d+);(\d+);(\d+)", codes)
    return "#{:02x}{:02x}{:02x}".format(*map(int, found.groups())) if found else None


def test_color_tints_each_character_by_its_surprise_and_begins_with_a_legend(painted, run):
    text = "the cat sees.\nkkk"
    Path("a.txt").write_text(text, encoding="utf-8")
    shown = painted("a.txt", "--color")
    end = shown.index(("\n", None))
    legend = tint.legend(["story-mingru"])
    assert legend_of(shown[:end]) == {meaning: tint.color(level) for level, meaning in legend}
    bits = run.score(text).surprisal_bits
    colors = [tint.color(sum(b >= limit for limit in tint.SURPRISE)) for b in bits]
    colors[text.index("\n")] = None  # a line's end has no width
    assert shown[end + 1 : -1] == [*zip(text, colors, strict=True)]
    assert len({*colors}) > 1


def legend_of(shown: list) -> dict:
    """{text: background} of the legend: each text has a space of the same colour around it."""
    found = {}
    for color, group in groupby(shown, lambda pair: pair[1]):
        found["".join(c for c, _ in group)[1:-1]] = color
    return found


def test_color_against_is_blue_where_the_first_run_is_better_and_else_orange(painted, run):
    Path("checkpoints/story-mingru").rename("checkpoints/one")
    text = "the cat sees a dog."
    Path("a.txt").write_text(text, encoding="utf-8")
    two = seqlm.train("data/story", run="two", preset="tiny", batch=4, length=16, steps=30)
    shown = painted("a.txt", "--color", "--against", "one", "--run", "two")
    mine, theirs = (r.score(text).surprisal_bits for r in (two, seqlm.load("one")))
    expected = []
    for character, difference in zip(text, mine - theirs, strict=True):
        level = sum(abs(difference) >= limit for limit in tint.DIFFERENCE)
        hue = tint.ORANGE if difference > 0 else tint.BLUE
        expected.append((character, hue[level - 1] if level else None))
    assert shown[shown.index(("\n", None)) + 1 : -1] == expected
    assert {color for _, color in expected} & {*tint.BLUE}


def test_unknown_characters_are_skipped_and_counted(seqlm_command, run):
    Path("a.txt").write_text("the €cat\n", encoding="utf-8")
    assert seqlm_command("score", "a.txt").code == 3
    result = seqlm_command("score", "a.txt", "--on-unknown", "skip", "--json")
    assert result.json["unknown"] == 1 and result.json["chars"] == 8
    assert "1 characters that the model never saw were skipped" in result.err


@pytest.mark.parametrize(
    "given, said",
    [
        (["--per", "word", "--json"], "--json gives the totals only. For the rows of --per, give"),
        (["--jsonl"], "--jsonl has an effect only with --per. Add --per line, or remove --jsonl."),
        (["--top", "2"], "--top 2 has an effect only with --per char."),
        (["--words", "a"], "--words has an effect only with --per word."),
        (["--per", "line", "--space", "foo"], "--space has an effect only with --per word."),
        (["--against", "one", "--json"], "--against shows where one run is better: add --per"),
        (["--sort"], "--sort has an effect only with --per."),
        (["--against", "one"], "--against shows where one run is better: add --per"),
        (["--per", "word", "--words", "("], "--words '(' is not a regular expression: "),
        (["--per", "char", "--top", "-1"], "--top -1: it must be at least 0."),
    ],
)
def test_an_option_that_cannot_take_effect_is_an_error(seqlm_command, run, text_file, given, said):
    result = seqlm_command("score", text_file, *given)
    assert result.code == 2 and said in result.err


def test_run_score_gives_arrays(run):
    found = run.score("the cat\nsees", per="word")
    assert found.text.tolist() == ["the", "cat", "sees"] and len(found) == 3
    assert found.surprisal_bits.sum() == pytest.approx(12 * run.bits_per_char("the cat\nsees"))
    assert np.allclose(found.probability, 2.0**-found.surprisal_bits)
    chars = run.score("the", top=2)
    assert chars.rank.dtype == np.float64 and len(chars.alternatives[0]) == 2
    with pytest.raises(UsageError, match="Unknown unit 'sentence'"):
        run.score("the", per="sentence")
    with pytest.raises(InputError):
        run.score("€")


def test_scores_become_a_data_frame_or_say_what_to_install(run):
    found = run.score("the cat", per="word")
    try:
        import pandas  # noqa: F401
    except ImportError:
        with pytest.raises(SeqlmError, match=r"Run pip install -e '.\[pandas\]'"):
            found.to_pandas()
        return
    frame = found.to_pandas()
    assert [*frame["text"]] == ["the", "cat"]


@pytest.mark.parametrize(
    "given", [["score", "--html"], ["inspect", "--html"], ["compress", "--out"]], ids=str
)
def test_the_file_that_is_read_is_not_written_over(seqlm_command, run, text_file, given):
    before = text_file.read_bytes()
    result = seqlm_command(given[0], "story.txt", given[1], "./story.txt")
    assert result.code == 2 and "story.txt is the file that is read" in result.err
    assert text_file.read_bytes() == before
