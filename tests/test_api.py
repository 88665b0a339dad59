"""seqlm as a library: its public names, options and results."""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHAKESPEARE, SMALL, needs_shakespeare, sentences

import seqlm
from seqlm.errors import InputError, UsageError


def test_a_run_is_loaded_and_used(run):
    loaded = seqlm.load("checkpoints/story-mingru")
    assert (loaded.step, loaded.path, loaded.runtime.device.value) == (4, Path(run.path), "cpu")
    assert loaded.config.cell.name == "mingru" and loaded.tokenizer.unit == "char"
    written = loaded.generate("the ", chars=20, seed=1)
    assert len(written) == 20 and written == run.generate("the ", chars=20, seed=1)
    assert 0 < loaded.bits_per_char("the cat sees a dog.") < 10


def test_the_matrices_of_a_loaded_run_can_be_rounded(run, seqlm_command):
    rounded = seqlm.load(run.path, dtype="bfloat16")
    for name, exact in run.model.named_parameters():
        weight = rounded.model.get_parameter(name)
        matrix = exact.ndim == 2 and "embedding" not in name and "conv" not in name
        assert torch.equal(weight, exact.bfloat16().float() if matrix else exact)
    bits = seqlm_command("eval", "bits-per-char", "--dtype", "bfloat16", "-q")
    assert float(bits.out) == pytest.approx(rounded.evaluate()["bits_per_char"], abs=1e-4)
    with pytest.raises(UsageError, match="'half'.*bfloat16"):
        seqlm.load(run.path, dtype="half")
    refused = seqlm_command("generate", "--dtype", "half")
    assert refused.code == 2 and "float32" in refused.err and "bfloat16" in refused.err


def test_the_model_is_what_design_says():
    from seqlm.model import LanguageModel

    model = LanguageModel(vocab_size=65, width=256, layers=4, cell="mingru", cell_options={})
    logits, state = model(torch.zeros(2, 3, dtype=torch.int64))
    assert logits.shape == (2, 3, 65)
    logits, state = model.step(torch.zeros(2, dtype=torch.int64), state)
    assert logits.shape == (2, 65)


def test_training_takes_the_commands_options_by_the_same_names(corpus):
    run = seqlm.train(
        "data/story",
        cell="lem",
        preset="tiny",
        width=8,
        layers=1,
        batch=2,
        length=8,
        lr=0.01,
        dropout=0.1,
        steps=2,
        state="reset",
        seed=3,
        device="cpu",
        dtype="float32",
        threads=1,
        set={"cell.dt": 0.5, "train.eval_every": 1},
    )
    assert run.config.cell.options["lem"]["dt"] == 0.5
    assert (run.config.model.width, run.config.train.seed) == (8, 3)
    assert run.path == Path("checkpoints/story-lem")


def test_an_option_that_does_not_exist_is_refused(corpus):
    with pytest.raises(UsageError, match="Unknown option of train 'stepz'. Did you mean 'steps'"):
        seqlm.train(corpus, stepz=3)


def test_training_can_be_resumed_and_replaced(corpus, run):
    with pytest.raises(UsageError, match="exists. Continue it with --resume"):
        seqlm.train(corpus, **SMALL)
    more = seqlm.train(run="story-mingru", resume=True, steps=6)
    assert seqlm.load(more.path, "last").step == 6
    with pytest.raises(UsageError, match="--preset has no effect"):
        seqlm.train(run="story-mingru", resume=True, preset="tiny")
    again = seqlm.train(corpus, force=True, **SMALL)
    assert seqlm.load(again.path, "last").step == 4


def test_the_first_name_imported_from_a_module_changes_nothing(run):
    """`seqlm.train` is the function, even after `seqlm.training` was imported."""
    import seqlm.api
    import seqlm.training.loop

    assert callable(seqlm.train) and callable(seqlm.load)


def test_evaluation_is_all_that_json_promises(run):
    figures = run.evaluate()
    assert set(figures) >= {
        *("run", "step", "data", "split", "protocol", "bits_per_char", "bits_per_byte"),
        *("nats_per_char", "perplexity", "chars", "bytes", "tokens", "unknown", "seconds"),
        *("chars_per_second", "split_sha256", "params", "device", "dtype"),
    }
    assert (figures["data"], figures["split"]) == ("data/story", "val")
    assert (figures["chars"], figures["protocol"]) == (200, "stream")
    text = sentences(4000)[3600:3800]
    assert figures["bits_per_char"] == pytest.approx(run.bits_per_char(text), rel=1e-6)
    assert figures["bits_per_char"] == pytest.approx(figures["nats_per_char"] / math.log(2))


def test_another_corpus_is_read_in_the_runs_symbols(run, tmp_path):
    from seqlm.text.prepare import prepare

    (tmp_path / "other.txt").write_text("the old dog fears the cat.\n" * 20 + "!")
    prepare(["other.txt"])
    figures = run.evaluate(data="other", split="train")
    assert figures["own_corpus"] is False and figures["data"] == "data/other"
    with pytest.raises(InputError, match="Character '!'"):
        run.evaluate(data="other", split="test")
    skipped = run.evaluate(data="other", split="test", on_unknown="skip")
    assert (skipped["unknown"], skipped["chars"]) == (1, 27)


def test_a_corpus_that_is_gone_or_changed_is_refused(run, text_file):
    from seqlm.text.prepare import prepare

    text_file.write_text(sentences(4000, seed=9))
    prepare([str(text_file)], force=True)
    with pytest.raises(InputError, match="is not the corpus that .* was trained on"):
        run.evaluate()
    Path("data/story").rename("data/moved")
    with pytest.raises(InputError, match="The run's corpus data/story does not exist"):
        run.evaluate()
    assert run.evaluate(data="moved")["own_corpus"] is False


OWN = """
from torch import nn
from seqlm.cells import Recurrence

class Sum(Recurrence):
    def __init__(self, width):
        super().__init__()
        self.width, self.inputs = width, nn.Linear(width, width)
    def initial_state(self, batch):
        return (self.zeros(batch, self.width),)
    def project(self, x):
        return self.inputs(x)
    def recur(self, drive, state):
        h = 0.9 * state[0] + drive
        return h, (h,)
"""


def test_a_runs_own_cell_is_code_that_is_never_run_unasked(corpus, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    seqlm.train(corpus, cell="./mine.py", **SMALL)
    (tmp_path / "mine.py").write_text(OWN + "\nraise SystemExit('it ran')\n")
    with pytest.raises(InputError, match="If you trust the file, name it: --cell ./mine.py"):
        seqlm.load("story-mine")
    (tmp_path / "mine.py").write_text(OWN)
    assert seqlm.load("story-mine", cell="./mine.py").step == 4


def test_the_hints_of_a_run_with_its_own_cell_name_the_file(seqlm_command, corpus, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    shape = [word for key, value in SMALL.items() for word in (f"--{key}", value)]
    result = seqlm_command("train", "--data", corpus, "--cell", "./mine.py", *shape)
    assert "seqlm eval --run checkpoints/story-mine --cell ./mine.py" in result.err, result.err
    result = seqlm_command("eval", "--run", "story-mine", "--cell", "./mine.py")
    assert "seqlm generate --run checkpoints/story-mine --cell ./mine.py" in result.err


@pytest.mark.parametrize(
    "old, new",
    [
        ("def recur", "def recurr"),
        ("(h,)", "h"),
        ("0.9 *", "'a' *"),
        ("super().__init__()", "1 / 0"),
        ("def initial", "def initiall"),
    ],
)
def test_a_cell_that_does_not_work_is_refused_before_a_run_is_made(corpus, tmp_path, old, new):
    (tmp_path / "mine.py").write_text(OWN.replace(old, new))
    with pytest.raises(InputError, match="./mine.py does not work as a cell"):
        seqlm.train(corpus, cell="./mine.py", **SMALL)
    assert not Path("checkpoints").exists()


@needs_shakespeare
def test_stepping_through_a_whole_val_split_by_hand_gives_evals_figure(tmp_path):
    """10,000 characters, -log p summed in float64: equal to 1e-4."""
    from seqlm.text.prepare import prepare

    text = SHAKESPEARE.read_text()[:200_000]
    (tmp_path / "some.txt").write_text(text)
    run = seqlm.train(prepare(["some.txt"])[0], **{**SMALL, "steps": 20})
    text = text[180_000:190_000]
    model, state = run.model, run.model.initial_state(1)
    symbols = torch.from_numpy(run.tokenizer.encode(text).astype(np.int64))
    given = torch.cat([torch.tensor([model.beginning]), symbols[:-1]])
    logits = torch.empty(len(text), model.head.out_features)
    with torch.inference_mode():
        for t, symbol in enumerate(given.split(1)):
            logits[t], state = model.step(symbol, state)
        nats = F.cross_entropy(logits.double(), symbols, reduction="sum").item()
    by_hand = nats / np.log(2) / len(text)
    figures = run.evaluate()
    assert figures["chars"] == len(text)
    assert figures["bits_per_char"] == pytest.approx(by_hand, abs=1e-4)


def test_a_stop_string_alone_is_one_string(run):
    whole = run.generate("the", chars=60, seed=3)
    stop = whole[20:23]
    assert run.generate("the", chars=60, seed=3, stop=stop) == whole.partition(stop)[0]


def test_a_run_is_one_line_to_read(run):
    assert re.fullmatch(
        r"<Run checkpoints/story-mingru, step 4: mingru, [0-9,]+ parameters>", repr(run)
    )


def test_the_public_names_are_listed():
    assert {"Run", "load", "train", "__version__"} <= set(dir(seqlm))


def test_threads_may_generate_at_once(run):
    """Each thread generates the same text as alone; threads share no context."""
    alone = [run.generate("the", chars=40, seed=seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        texts = pool.map(lambda seed: run.generate("the", chars=40, seed=seed), range(6))
        assert list(texts) == alone


def test_a_corpus_that_was_moved_is_found_by_its_fingerprint(run, seqlm_command):
    bits = run.evaluate()["bits_per_char"]
    Path("data/story").rename("data/poems")
    damaged = Path("data/damaged")
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{")
    found = run.evaluate()
    assert found["data"] == "data/poems" and found["own_corpus"]
    assert found["bits_per_char"] == bits
    ran = seqlm_command("check", "--json")
    assert ran.code == 0 and not [c for c in ran.json["checks"] if c["status"] == "not run"]
    resumed = seqlm.train(run=run.path, resume=True, steps=5)
    assert resumed.config.data.path == "data/poems"


def test_train_draws_a_bar_when_it_is_asked_to(corpus, capsys):
    seqlm.train(corpus, run="quiet", **SMALL)
    assert capsys.readouterr() == ("", "")
    seqlm.train(corpus, run="shown", progress=True, **SMALL)
    drawn = capsys.readouterr()
    assert drawn.out == "" and re.search(r"step 4 loss [0-9.]+ +100%\|", drawn.err)


def test_an_empty_name_is_no_run(run):
    with pytest.raises(UsageError, match="--run is empty"):
        seqlm.load("")


def test_the_hash_of_a_corpus_is_not_a_setting(corpus):
    """It was ignored without a word."""
    with pytest.raises(UsageError, match="data.fingerprint is computed from the corpus"):
        seqlm.train("data/story", set={"data.fingerprint": "x"}, steps=1)
