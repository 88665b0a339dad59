"""The command line from end to end, on small texts: output, streams and exit codes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread
from typing import ClassVar

import pytest
from conftest import sentences

from seqlm.cli import _app, _complete
from seqlm.errors import UsageError
from seqlm.files import to_json
from seqlm.manifest import seal
from seqlm.store import runs

TRAIN = ["train", "--preset", "tiny", "--width", 16, "--layers", 1, "--batch", 4, "--length", 16]
TRAIN += ["--steps", 4]


def test_the_four_commands_in_a_row(seqlm_command, text_file):
    prepared = seqlm_command("prepare", text_file)
    assert prepared.code == 0
    assert prepared.out.splitlines()[1].split("\t")[:4] == ["train", "3600", "3600", "3600"]
    assert "next: seqlm train --data data/story" in prepared.err
    trained = seqlm_command(*TRAIN)
    assert trained.code == 0 and "val bits per char" in trained.out
    assert "device cpu (no GPU found)" in trained.err and "dtype" in trained.err
    evaluated = seqlm_command("eval")
    assert "bits per char" in evaluated.out and "protocol\tstream" in evaluated.out
    written = seqlm_command("generate", "the ", "--chars", 30, "--seed", 1)
    assert written.code == 0 and written.out.startswith("the ") and len(written.out) == 34
    assert "seed 1" in written.err


def test_the_tables_for_people_have_no_rows_that_say_nothing(seqlm_command, text_file):
    """--json has all fields; the table leaves out what is not there or as usual."""
    seqlm_command("prepare", text_file)
    trained = [line.split("\t") for line in seqlm_command(*TRAIN).out.splitlines()]
    names = {name for name, _ in trained}
    assert not names & {"skipped steps", "newton fell back", "graphs", "processes"}
    assert names >= {"steps", "val bits per char", "peak memory MB", "backend"}
    assert 50 < int(dict(trained)["peak memory MB"]) < 50_000
    evaluated = dict(line.split("\t") for line in seqlm_command("eval").out.splitlines())
    assert not set(evaluated) & {"context", "documents", "unknown", "others"}
    assert evaluated["a character is"] == "a code point" and "-" not in evaluated.values()
    windows = seqlm_command("eval", "--protocol", "window", "--context", 16).out
    assert "context\t16" in windows


def test_training_needs_no_argument(seqlm_command, small_library):
    """The built-in corpus is prepared if there is no corpus."""
    trained = seqlm_command(*TRAIN)
    assert trained.code == 0, trained.err
    assert "Prepared the built-in corpus, stdlib, into data/stdlib." in trained.err
    assert runs.is_run(runs.RUNS / "stdlib-mingru")


def test_json_of_every_command(seqlm_command, text_file):
    prepared = seqlm_command("prepare", text_file, "--json").json
    assert prepared["data"] == "data/story"
    assert (prepared["unit"], prepared["vocab_size"]) == ("char", len(set(sentences(4000))))
    assert set(prepared["splits"]["val"]) == {"chars", "bytes", "tokens", "documents", "sha256"}
    trained = seqlm_command(*TRAIN, "--json").json
    assert set(trained) >= {
        *("run", "cell", "params", "steps", "seconds", "chars_per_second", "val_bits_per_char"),
        *("best_step", "peak_memory_bytes", "device", "dtype", "backend"),
    }
    assert (trained["run"], trained["steps"]) == ("checkpoints/story-mingru", 4)
    evaluated = seqlm_command("eval", "--json").json
    assert evaluated["bits_per_char"] == pytest.approx(trained["val_bits_per_char"])
    written = seqlm_command("generate", "the ", "--chars", 9, "--seed", 5, "--json").json
    assert set(written) >= {"text", "prompt", "seed", "chars", "seconds", "chars_per_second"}
    assert (written["prompt"], written["seed"], len(written["text"])) == ("the ", 5, 9)
    training = {r["cell"]: r["training"] for r in seqlm_command("cells", "--json").json["cells"]}
    assert training["mingru"] == training["minlstm"] == "parallel scan"
    assert training["lem"] == training["cfc"] == "step by step, or diagonal: parallel"
    assert seqlm_command("runs", "--json").json["runs"][0]["best_step"] == 4
    assert seqlm_command("env", "--json").json["device"] == "cpu"


def test_quiet_prints_only_the_key_value(seqlm_command, run):
    for arguments in (["eval", "-q"], ["eval", "bits-per-char", "-q"]):
        result = seqlm_command(*arguments)
        assert float(result.out) == pytest.approx(run.evaluate()["bits_per_char"], abs=1e-6)
        assert result.err == ""
    assert seqlm_command("runs", "-q").out == "checkpoints/story-mingru\n"
    assert seqlm_command("generate", "-q", "--chars", 5, "--seed", 1).err == ""


@pytest.mark.parametrize(
    "metric", ["bits-per-char", "bits-per-byte", "nats-per-char", "perplexity"]
)
def test_a_metric_prints_its_number(seqlm_command, run, metric):
    expected = run.evaluate()[metric.replace("-", "_")]
    assert float(seqlm_command("eval", metric).out) == pytest.approx(expected, abs=1e-6)


def test_a_text_is_evaluated_from_a_file_or_standard_input(
    seqlm_command, run, tmp_path, monkeypatch
):
    (tmp_path / "t.txt").write_text("the cat sees a dog.")
    value = run.bits_per_char("the cat sees a dog.")
    result = seqlm_command("eval", "bits-per-char", "--text", "t.txt")
    assert float(result.out) == pytest.approx(value, abs=1e-6)
    with open(tmp_path / "t.txt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        result = seqlm_command("eval", "bits-per-char", "--text", "-")
    assert float(result.out) == pytest.approx(value, abs=1e-6)


def test_unknown_characters_are_an_error_or_counted(seqlm_command, run, tmp_path):
    (tmp_path / "t.txt").write_text("the cat! sees é")
    result = seqlm_command("eval", "--text", "t.txt")
    assert result.code == 3 and "'!' (U+0021) at position 7" in result.err
    assert "Or count and leave out such characters with --on-unknown skip." in result.err
    result = seqlm_command("eval", "--text", "t.txt", "--on-unknown", "skip", "--json")
    assert (result.json["unknown"], result.json["chars"]) == (2, 13)
    assert "Characters that are not in the vocabulary and were skipped: 2." in result.err


def test_a_prompt_comes_by_argument_by_file_or_by_standard_input(
    seqlm_command, run, tmp_path, monkeypatch
):
    (tmp_path / "p.txt").write_text("a dog ")
    rest = ["--chars", 10, "--seed", 1]
    expected = seqlm_command("generate", "a dog ", *rest).out
    assert seqlm_command("generate", "--prompt-file", "p.txt", *rest).out == expected
    for arguments in (["-"], ["--prompt-file", "-"]):
        with open(tmp_path / "p.txt") as file:
            monkeypatch.setattr(sys, "stdin", file)
            assert seqlm_command("generate", *arguments, *rest).out == expected


def test_samples_differ_and_are_set_apart(seqlm_command, run):
    result = seqlm_command("generate", "a ", "--samples", 3, "--chars", 12, "--seed", 1)
    texts = result.out.split("\n----\n")
    assert len(texts) == len(set(texts)) == 3
    assert all(text.startswith("a ") and len(text) == 14 for text in texts)


def test_print_config_shows_what_results_and_can_be_given_back(seqlm_command, tmp_path):
    shown = seqlm_command(
        "train", "--preset", "base", "--cell", "lem", "--lr", 0.5, "--print-config"
    )
    assert 'name = "lem"' in shown.out and "lr = 0.5" in shown.out and "dt = 1.0" in shown.out
    (tmp_path / "c.toml").write_text(shown.out)
    again = seqlm_command("train", "--config", "c.toml", "--print-config")
    assert again.out == shown.out
    assert 'path = "poems.txt"\n' in seqlm_command("train", "poems.txt", "--print-config").out


def test_a_resumed_run_shows_what_changed_and_a_finished_one_says_so(seqlm_command, run):
    result = seqlm_command("train", "--resume", "--steps", 6)
    assert result.code == 0 and "changed: train.steps = 6 (was 4)" in result.err
    assert "Resuming from step 4." in result.err
    result = seqlm_command("train", "--resume")
    assert result.code == 0 and "is finished: nothing is left to train" in result.err


def test_training_that_diverges_ends_with_4_and_leaves_a_run_that_loads(seqlm_command, corpus):
    result = seqlm_command(*TRAIN[:-2], "--steps", 50, "--lr", 1e30)
    assert (result.code, result.out) == (4, "")
    assert "10 steps in a row" in result.err and "lower --lr" in result.err
    saved, warnings = runs.load(runs.RUNS / "story-mingru", "last")
    assert warnings == [] and all(t.isfinite().all() for t in saved.weights(saved.config).values())


def test_an_underscore_is_as_good_as_a_dash(seqlm_command, corpus):
    assert seqlm_command(*TRAIN[:-2], "--time_limit", "0.1s", "-q").code == 0


def test_the_version(seqlm_command):
    from seqlm import __version__

    assert seqlm_command("--version").out == f"seqlm {__version__}\n"


def test_help_shows_every_command_and_imports_no_torch():
    code = "import sys, seqlm.cli as c\ntry: c.main()\nfinally: print('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.endswith("False\n")
    for name in ("prepare", "train", "eval", "generate", "bench", "cells", "runs", "env"):
        assert f" {name} " in ran.stdout


ERRORS = [
    # arguments, exit code, part of the message
    (["nonsense"], 2, "No such command 'nonsense'"),
    (["trian"], 2, "Did you mean 'train'"),
    (["eval", "--runn", "x"], 2, "No such option: --runn (Possible options: --run)"),
    (["score", "hello world"], 3, "no file 'hello world'. To score a text itself: echo 'hello"),
    (["score", "story.txt", "--html", "data"], 1, "Cannot write data: it is a folder. Name a file"),
    (["export", "--onnx", "data", "--force"], 1, "Cannot write data: it is a folder. Name a file"),
    (["export", "--onnx", "a/b.onnx"], 1, "the folder a does not exist. Create it, or choose"),
    (["generate", "--count", 3], 2, "No such option: --count. Use --samples."),
    (["eval", "bits"], 2, "Unknown metric 'bits'. Did you mean 'bits-per-char'?"),
    (["score", "story.txt", "--csv"], 2, "No such option: --csv ╰"),
    (["eval", "bits-per-chr"], 2, "Unknown metric 'bits-per-chr'. Did you mean 'bits-per-char'"),
    (["eval", "--protocol", "streem"], 2, "Unknown protocol 'streem'. Did you mean 'stream'"),
    (["eval", "--protocol", "window", "--context", 0], 2, "--context 0: it must be at least 1."),
    (["eval", "--split", "valid"], 2, "no valid split. Choose one of: train, val, test."),
    (["eval", "--on-unknown", "drop"], 2, "Unknown value of --on-unknown 'drop'"),
    (["eval", "--text", "a", "--data", "b"], 2, "Both --text and --data are given"),
    (["eval", "--step", "newest"], 2, "--step newest: write best, last or the number"),
    (
        ["eval", "--device", "gpu"],
        2,
        "--device is 'gpu'; it must be one of: auto, cuda, mps, cpu.",
    ),
    (["eval", "--step", 99], 3, "has no saved step 99. Saved: 0, 4."),
    (["eval", "--run", "nothing"], 3, "neither nothing nor checkpoints/nothing is a run"),
    (
        ["eval", "--run", "story"],
        3,
        "is a run. Did you mean 'story-mingru'? List yours: seqlm runs",
    ),
    (["eval", "--run", "stroy-mingru"], 3, "is a run. Did you mean 'story-mingru'?"),
    (["eval", "--run", "data/story"], 3, "data/story is a corpus, not a run. Name a run that was"),
    (["eval", "--run", "data/story"], 3, "trained on it, such as story-mingru."),
    (["eval", "--data", "nothing"], 3, "is a prepared corpus"),
    (["eval", "--with", "nothing"], 3, "--with nothing: neither nothing nor checkpoints/nothing"),
    (["score", *"story.txt --per word --against b".split()], 3, "--against b: neither b nor"),
    (["eval", "--text", "nothing.txt"], 3, "--text nothing.txt: No such file or directory"),
    (["generate", "--run", "model.pt"], 3, "is a pickle"),
    (["generate", "--chars", 0], 2, "--chars 0: it must be at least 1, or 0 with --save-state."),
    (["generate", "--chars", -1], 2, "--chars -1: it must be at least 1."),
    (["generate", "--chars", "1e5"], 2, "'--chars': '1e5'. Give a whole number, such as 500."),
    (["generate", "--top-p", "x"], 2, "'--top-p': 'x'. Give a number, such as 0.5."),
    (["train", "--config", "."], 3, ". is not a plain file. Check the path"),
    (["generate", "--temperature", -1], 2, "--temperature -1.0: it must be from 0 (greedy)"),
    (["generate", "--top-p", 2], 2, "--top-p 2.0: it must be above 0 and at most 1."),
    (["generate", "--samples", 0], 2, "--samples 0: it must be at least 1."),
    (["generate", "--stop", ""], 2, "the string to stop at is empty"),
    (["generate", "t!"], 3, "Character '!' (U+0021) at position 1 is not in the vocabulary"),
    (["generate", "x", "--prompt-file", "y"], 2, "Both a PROMPT and --prompt-file are given"),
    (["generate", "--prompt-file", "nothing"], 3, "--prompt-file nothing: No such file"),
    (["train", "--cell", "mingruu"], 2, "Unknown cell 'mingruu'. Did you mean 'mingru'"),
    (["train", *"--set train.early_stop=2 --set train.eval_every=0".split()], 2, "counts validat"),
    (["train", "--preset", "smal"], 2, "Unknown preset 'smal'. Did you mean 'small'"),
    (["train", "--width", 0], 2, "--width is 0; it must be at least 1."),
    (["train", "--state", "keep"], 2, "--state is 'keep'; it must be one of: carry, reset."),
    (["train", "--set", "model.widht=3"], 2, "Did you mean 'model.width'"),
    (["train", "--set", "model.width"], 2, "write it as key=value"),
    (["train", "--set", "cell.dtt=1"], 2, "Unknown option of lem 'dtt'"),
    (["train", "--cell", "lem", "--set", "cell.dt=7"], 2, "cell.dt is 7.0; it must be above 0"),
    (["train", "--steps", 5, "--time-limit", "5m"], 2, "Choose --steps or --time-limit."),
    (["sample"], 2, "There is no command 'sample'. To produce text: seqlm generate"),
    (["surprisal"], 2, "How surprising a text is: seqlm score FILE"),
    (["help", "nonsense"], 2, "No such command 'nonsense'"),
    (["generate", "--length", 3], 2, "No such option: --length. Use --chars."),
    (["generate", "x", "--prompt", "y"], 2, "Both a PROMPT and --prompt are given"),
    (["eval", "--context", -5], 2, "has an effect only with --protocol window"),
    (["eval", "--text", "f", "--split", "test"], 2, "--split test is a split of a corpus"),
    (["train", "--init-from", "nope", "--run", "new"], 3, "--init-from nope: neither nope nor"),
    (["cells", "lemm"], 2, "Did you mean 'lem'"),
    (["train", "--lr", 0], 2, "--lr is 0.0; it must be greater than 0."),
    (["train", "--time-limit", 0, "--run", "new"], 2, "--time-limit 0 leaves no time to train."),
    (["train", "--set", "train.steps=1", "--steps", 2], 2, "--steps is 2 and train.steps is 1."),
    (["train", "--set", "optim.lr=1", "--set", "optim.lr=2"], 2, "gives optim.lr twice: 1 and 2."),
    (["eval", "--set", "model.width=8"], 2, "this command only takes runtime.KEY=VALUE."),
    (["check", "--set", "runtime.backand=torch"], 2, "Did you mean 'runtime.backend'"),
    (["generate", "--set", "runtime.threads=1", "--threads", 2], 2, "Keep one of them."),
    (["train", "--time-limit", "soon"], 2, "'soon' is not a duration"),
    (["train", "--config", "nothing.toml"], 3, "Cannot read nothing.toml"),
    (["train", "--run", "new", "--device", "cuda"], 2, "torch finds no such device here"),
    (["train", "--preset", "tiny"], 2, "exists. Continue it with --resume"),
    (["train", "--data", "nothing"], 3, "nothing is neither a file, a folder nor a known corpus"),
    (
        ["train", "--data", "stroy"],
        3,
        "Did you mean 'story'? Check the path, or name one of: stdlib",
    ),
    (["train", "--data", "stroy"], 3, "brackets. Prepared corpora: data/story."),
    (["train", "nothing"], 3, "nothing is neither a file, a folder nor a known corpus"),
    (["train", "a.txt", "--data", "b"], 2, "Both a.txt and --data b are given. Keep one"),
    (["train", "--set", "data.path=x", "--data", "y"], 2, "data.path is x and another corpus"),
    (["train", "--batch", 4000, "--run", "new"], 3, "The largest that fit: --batch"),
    (["train", "--resume", "--run", "nothing"], 3, "is a run. List yours: seqlm runs"),
    (["train", "--resume", "--width", 99], 2, "which cannot change to"),
    (["train", "--resume", "--force"], 2, "--resume continues a run and --force replaces it"),
    (["train", "--set", "cell.lem=3"], 2, "cell.lem is 3; write cell.lem.OPTION"),
    (["train", "--run", "/proc/nothing/x", *TRAIN[1:]], 1, "Cannot write /proc/nothing/x"),
    (["generate", "--threads", -1], 2, "at least 0; 0 means: PyTorch's choice."),
    (["train", "--steps", -5], 2, "it must be at least 0; 0 means: until the time limit."),
    (["train", "--steps", 0, "--run", "new"], 2, "no time limit is set. Add --time-limit, such"),
    (["prepare", ""], 2, "A SOURCE is empty"),
    (["prepare", "/dev/null"], 3, "is a device"),
    (["train", "--set", "train.time_limit=true"], 2, "True is not a duration"),
    (["train", "--set", "cell.mingru=3", "--set", "cell.mingru.expansion=2.0"], 2, "Keep one"),
    (["generate", os.fsdecode(b"\xff"), "--on-unknown", "skip"], 3, "byte 0xff at offset 0"),
    (["generate", os.fsdecode(b"the \xff")], 3, "The text is not UTF-8: byte 0xff at offset 4"),
    (["generate", "!" * 300], 3, "Character '!' (U+0021) at position 0 is not in the vocabulary"),
    (["eval", "x" * 300], 2, "Unknown metric"),
    (["eval", "--run", "x" * 300], 3, "is a run. List yours: seqlm runs"),
    (["eval", "--data", "x" * 300], 3, "is a prepared corpus"),
    (["prepare", "x" * 300], 3, "neither a file, a folder nor a known corpus"),
    (["prepare", "stdlib", "--encoding", "utf-16"], 2, "Remove --encoding"),
    (["prepare", "story.txt", "--out", "story.txt", "--force"], 2, "exists and is not a corpus"),
    (["prepare", "story.txt", "--out", "checkpoints", "--force"], 2, "exists and is not a corpus"),
    (["prepare", "nowhere.txt"], 3, "neither a file, a folder nor a known corpus"),
    (["prepare", "story.txt", "--unit", "word"], 2, "Unknown unit 'word'. Known: char, byte, sen"),
    (["prepare", "story.txt"], 2, "data/story exists. Replace it with --force"),
]


@pytest.mark.parametrize("arguments, code, message", ERRORS, ids=lambda v: str(v)[:60])
def test_an_error_says_what_is_wrong_and_what_to_do(seqlm_command, run, arguments, code, message):
    result = seqlm_command(*arguments)
    said = " ".join(result.err.replace("│", " ").split())
    assert (result.code, result.out) == (code, ""), said
    assert message in said
    assert "Traceback" not in result.err
    assert [path.name for path in runs.existing()] == ["story-mingru"], "nothing left behind"


INPUTS = [
    # bytes, exit code, part of the message or of the output
    (b"", 3, "The text is empty"),
    (b"x", 3, "too short to split"),
    (b"good " * 9 + b"\xff", 3, "byte 0xff at offset 45. Give --encoding NAME, or --unit byte"),
    ("wide text".encode("utf-16"), 3, "try --encoding utf-16"),
    (b"nul \x00 here " * 9, 0, "holds 9 NUL characters, kept as they are"),
    (b"line\r\nline\r\n" * 9, 0, "train\t97\t97\t97"),
    (b"no newline at the end" * 3, 0, "train\t56\t56\t56"),
    ("\ufeffbyte order mark".encode() * 3, 0, "train\t43\t49\t43"),
]


@pytest.mark.parametrize("data, code, message", INPUTS, ids=lambda v: str(v)[:30])
def test_odd_files_are_refused_or_kept_as_they_are(seqlm_command, tmp_path, data, code, message):
    (tmp_path / "odd.txt").write_bytes(data)
    result = seqlm_command("prepare", "odd.txt")
    assert result.code == code and message in result.err + result.out
    assert "Traceback" not in result.err
    assert (tmp_path / "data" / "odd").exists() == (code == 0)
    assert not list(tmp_path.glob("data/.tmp*"))


@pytest.mark.parametrize("command", [["score", "my l.txt"], ["eval", "--text", "my l.txt"]])
def test_a_text_in_another_encoding_is_named_with_the_command_that_converts_it(
    seqlm_command, run, tmp_path, command
):
    (tmp_path / "my l.txt").write_bytes(b"the \xe9")
    result = seqlm_command(*command)
    assert (result.code, result.out) == (3, "")
    assert "my l.txt is not UTF-8: byte 0xe9 at offset 4. If it is CP1252, " in result.err
    assert "iconv -f CP1252 -t UTF-8 'my l.txt' > NEW_FILE" in result.err


def test_a_traceback_is_for_those_who_ask(seqlm_command):
    ran = seqlm_command("bench", "--lengths", "0", "--debug")
    assert ran.code == 2 and "UsageError: --lengths 0" in ran.err
    assert "Traceback" in ran.err


def test_generated_bytes_are_valid_utf8_at_every_flush(seqlm_command, tmp_path):
    (tmp_path / "t.txt").write_text("жизнь 🙂 " * 100, encoding="utf-8")
    seqlm_command("prepare", "t.txt", "--unit", "byte")
    assert seqlm_command(*TRAIN).code == 0
    command = [sys.executable, "-m", "seqlm", "generate", "--chars", "300", "--seed", "1"]
    env = {**os.environ, "PYTHONIOENCODING": "latin-1", "LC_ALL": "C"}
    whole = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as ran:
        while piece := ran.stdout.read1(4096):
            piece.decode("utf-8")
            whole += piece
    assert ran.returncode == 0 and len(whole.decode("utf-8")) == 300


def test_a_reader_that_leaves_early_ends_generation_quietly(run):
    ran = subprocess.Popen(
        [sys.executable, "-m", "seqlm", "generate", "--chars", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    ran.stdout.read(5)
    ran.stdout.close()
    error = ran.stderr.read().decode()
    ran.stderr.close()
    assert ran.wait() == 1 and "Traceback" not in error and "Exception" not in error


METRICS = runs.RUNS / "story-mingru" / "metrics.jsonl"


def assert_saved(code, error):
    assert code == 130, error
    assert "To continue: seqlm train --resume --run checkpoints/story-mingru" in error
    last = json.loads(METRICS.read_text().splitlines()[-1])["step"]
    assert runs.load(runs.RUNS / "story-mingru", "last")[0].step == last


def when_trained(send, metrics=METRICS, over=None):
    """Send a signal during a training, at the latest after a minute."""
    deadline = time.monotonic() + 60
    while not metrics.is_file() and time.monotonic() < deadline:
        if over is not None and over.wait(0.01):
            return
        time.sleep(0.01)
    send()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_says_how_to_resume_and_ends_with_130(seqlm_command, corpus, number):
    over = Event()
    given = (lambda: os.kill(os.getpid(), number)), METRICS.resolve(), over
    sender = Thread(target=when_trained, args=given)
    sender.start()
    try:
        ended = seqlm_command(*TRAIN, "--steps", 1_000_000)
    finally:  # no later test is to get it
        over.set()
        sender.join()
    assert_saved(ended.code, ended.err)


def test_sigterm_to_a_process_that_trains_does_the_same(corpus):
    command = [sys.executable, "-m", "seqlm", *map(str, TRAIN), "--steps", "1000000"]
    ran = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    when_trained(ran.terminate)
    error = ran.communicate(timeout=60)[1]
    assert_saved(ran.returncode, error)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_prepare_leaves_nothing_half_written(tmp_path, number):
    (tmp_path / "big.txt").write_text(sentences(200_000) * 300)
    command = [sys.executable, "-m", "seqlm", "prepare", "big.txt"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("data/.tmp*/big/new/draft")):
        assert running.poll() is None, "it ended before the draft was seen"
        time.sleep(0.02)
    running.send_signal(number)
    assert running.wait(timeout=30) == 128 + number
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("where, reason", [(">/dev/full", "No space left"), (">&-", "is closed")])
def test_output_that_cannot_be_written_is_an_error(run, where, reason):
    command = f"{sys.executable} -m seqlm runs {where}"
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert ran.returncode == 1 and reason in ran.stderr, ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_name_that_is_not_utf8_is_escaped_in_json(seqlm_command, tmp_path):
    name = os.fsdecode(b"bad\xff.txt")
    (tmp_path / name).write_text(sentences(4000))
    prepared = seqlm_command("prepare", name, "--json", "--out", os.fsdecode(b"out\xff"))
    assert prepared.code == 0, prepared.err
    assert prepared.json["data"] == os.fsdecode(b"out\xff")


def test_quiet_evaluation_of_bytes_that_are_no_text_gives_bits_per_byte(seqlm_command, tmp_path):
    (tmp_path / "t.bin").write_bytes(bytes(range(256)) * 20)
    seqlm_command("prepare", "t.bin", "--unit", "byte")
    seqlm_command(*TRAIN)
    figures = seqlm_command("eval", "--json").json
    assert figures["bits_per_char"] is None
    assert float(seqlm_command("eval", "-q").out) == pytest.approx(
        figures["bits_per_byte"], abs=1e-6
    )
    refused = seqlm_command("eval", "bits-per-char")
    assert refused.code == 3 and "has no bits-per-char. Use bits-per-byte" in refused.err


def test_sigterm_ends_a_command_where_python_drops_its_exception_too():
    """Python drops exceptions in a destructor, for example, and in parts of an import."""
    code = (
        "import os, signal, time; from seqlm.cli import _app; _app.GRACE_SECONDS = 1\n"
        "signal.signal(signal.SIGTERM, _app._end)\n"
        "class Dropped:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)\n"
        "Dropped(); time.sleep(20); print('alive')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (143, "")


def test_a_prompt_of_raw_bytes_continues_a_model_of_bytes(seqlm_command, text_file):
    seqlm_command("prepare", text_file, "--unit", "byte")
    seqlm_command("train", "--preset", "tiny", "--width", 8, "--steps", 1)
    ran = seqlm_command("generate", os.fsdecode(b"the \xff"), "--chars", 3, "--json")
    assert ran.code == 0 and ran.json["prompt"] == "the \ufffd" and len(ran.json["text"]) == 3


def test_help_is_a_command_too(seqlm_command):
    assert seqlm_command("help").out == seqlm_command("--help").out
    assert seqlm_command("help", "train").out == seqlm_command("train", "--help").out


def test_every_example_of_help_is_a_command_line_that_is_understood():
    import typer

    program = typer.main.get_command(_app.app)
    for name, command in program.commands.items():
        examples = command.epilog.split("\n\n")[1:]
        assert examples, f"{name} shows no example"
        for example in examples:
            words = shlex.split(example)
            words = words[words.index("seqlm") + 1 :]
            assert words[0] == name
            with command.make_context(name, words[1:]) as context:
                assert context.args == []


@pytest.mark.parametrize("name", sorted({c.name for c in _app.app.registered_commands}))
def test_help_has_panels_and_no_types_beside_flags(seqlm_command, name):
    shown = seqlm_command(name, "--help").out
    assert "─ Output and help " in shown and "─ Options " not in shown and "<bool>" not in shown


def test_a_prompt_may_be_an_option(seqlm_command, run):
    written = seqlm_command("generate", "--prompt", "the ", "--chars", 5, "--seed", 1)
    assert written.out == seqlm_command("generate", "the ", "--chars", 5, "--seed", 1).out


def test_metrics_have_the_names_of_the_field(seqlm_command, run):
    for short, metric in (("bpc", "bits-per-char"), ("bpb", "bits-per-byte")):
        assert seqlm_command("eval", short).out == seqlm_command("eval", metric).out


def test_a_run_may_be_named_without_its_option(seqlm_command, run):
    assert seqlm_command("eval", "story-mingru", "--json").json["run"] == str(run.path)
    assert seqlm_command("train", "--resume", "story-mingru", "--steps", 5, "--json").json["steps"]
    written = seqlm_command("generate", "story-mingru", "--chars", 1, "--on-unknown", "skip")
    assert "is used as the prompt. It is also a run; to use the run: --run" in written.err


def test_cells_may_be_one(seqlm_command):
    assert seqlm_command("cells", "lem", "-q").out == "lem\n"


def test_text_that_is_piped_in_and_not_read_is_pointed_out(seqlm_command, run, monkeypatch):
    reading, writing = os.pipe()
    os.write(writing, b"the ")
    os.close(writing)
    with open(reading) as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        ran = seqlm_command("generate", "--chars", 1)
    assert ran.code == 0
    assert "Standard input is not read. To continue the text in it: seqlm generate -" in ran.err


def test_no_color_reaches_errors_of_usage():
    command = [sys.executable, "-m", "seqlm", "trian", "--no-color"]
    shown = {key: value for key, value in os.environ.items() if "COLOR" not in key}
    shown = {**shown, "FORCE_COLOR": "1", "TERM": "xterm", "_TYPER_FORCE_DISABLE_TERMINAL": ""}
    for arguments, coloured in ((command, False), (command[:-1], True)):
        ran = subprocess.run(arguments, capture_output=True, text=True, env=shown)
        assert ran.returncode == 2
        assert ("\x1b[31m" in ran.stderr) == coloured, ran.stderr


@pytest.mark.parametrize(
    "completer, typed, offered",
    [
        (_complete.settings, "train.st", ["train.steps=", "train.state="]),
        (_complete.settings, "train.state=c", ["train.state=carry"]),
        (_complete.settings, "model.tie=", ["model.tie=true", "model.tie=false"]),
        (_complete.runtime_settings, "runtime.b", ["runtime.backend="]),
        (_complete.runtime_settings, "model.w", []),
    ],
)
def test_settings_are_completed_with_their_values(completer, typed, offered):
    assert completer(typed) == offered


def test_steps_are_completed_with_those_of_the_run(run):
    class Context:
        params: ClassVar = {"run": "story-mingru"}

    assert _complete.steps(Context, "") == ["best", "last", "0", "4"]
    Context.params = {}
    assert _complete.steps(Context, "la") == ["last"]


@pytest.mark.parametrize("way", ["argument", "--data"])
def test_a_text_is_prepared_once_and_trained_on_in_one_command(seqlm_command, text_file, way):
    named = [text_file.name] if way == "argument" else ["--data", text_file.name]
    trained = seqlm_command(*TRAIN, *named)
    assert trained.code == 0, trained.err
    assert "Prepared story.txt into data/story." in trained.err
    manifest = Path("data/story/manifest.json")
    prepared = manifest.stat().st_mtime_ns
    assert seqlm_command(*TRAIN, *named, "--run", "again").code == 0
    assert manifest.stat().st_mtime_ns == prepared, "the same text is prepared once"
    assert [path.name for path in runs.existing()] == ["again", "story-mingru"]


def test_a_changed_text_is_prepared_again_and_a_run_keeps_the_old(seqlm_command, text_file):
    assert seqlm_command(*TRAIN, text_file.name).code == 0
    text_file.write_text(sentences(5000, seed=1))
    refused = seqlm_command(*TRAIN, text_file.name)
    assert refused.code == 2 and "--resume, replace it with --force, or choose" in refused.err
    refused = seqlm_command("train", "--resume", "--steps", 6, text_file.name)
    assert refused.code == 2 and "a run cannot change its corpus" in refused.err
    prepared = seqlm_command("prepare", text_file.name, "--out", "data/other")
    assert prepared.code == 0, prepared.err
    refused = seqlm_command("train", "--resume", "--steps", 6, "--set", "data.path=data/other")
    assert refused.code == 2 and "A run cannot change its corpus" in refused.err
    assert seqlm_command("train", "--resume", "--steps", 6).code == 0, "and its corpus is there"
    trained = seqlm_command(*TRAIN, text_file.name, "--run", "new")
    assert trained.code == 0 and "was prepared again" in trained.err
    assert json.loads(Path("data/story/manifest.json").read_text())["card"]["chars"] == 5000


def test_a_changed_text_is_not_prepared_again_where_options_would_be_lost(seqlm_command, text_file):
    assert seqlm_command("prepare", text_file.name, "--documents", "lines").code == 0
    assert seqlm_command(*TRAIN, text_file.name).code == 0, "the same text is taken as it is"
    text_file.write_text(sentences(5000, seed=1))
    refused = seqlm_command(*TRAIN, text_file.name, "--run", "new")
    assert refused.code == 2
    assert "seqlm prepare story.txt --documents lines --force" in " ".join(refused.err.split())


@pytest.mark.parametrize("sources", [["letters/story.txt"], ["story.txt", "letters/story.txt"]])
def test_the_corpus_of_another_text_with_the_same_name_is_not_replaced(
    seqlm_command, text_file, sources
):
    assert seqlm_command(*TRAIN, text_file.name).code == 0
    Path("letters").mkdir()
    Path(sources[-1]).write_text(sentences(5000, seed=1))
    refused = seqlm_command(*TRAIN, *sources, "--run", "new")
    assert refused.code == 2
    assert " ".join(refused.err.split()) == (
        f"error: data/story was prepared from story.txt, not from {' '.join(sources)}. Name "
        "data/story to train on it, or prepare this text into a folder of its own: seqlm prepare "
        f"{' '.join(sources)} --out data/NAME"
    )
    assert seqlm_command("eval").code == 0, "the first run still has its corpus"


@pytest.mark.parametrize("sources", [5, [5], ["\x1b[2J"]])
def test_forged_sources_of_a_corpus_are_an_error_and_not_shown(seqlm_command, text_file, sources):
    assert seqlm_command("prepare", text_file.name).code == 0
    path = Path("data/story/manifest.json")
    path.write_text(to_json(seal({**json.loads(path.read_text()), "sources": sources})))
    text_file.write_text(sentences(5000, seed=1))
    refused = seqlm_command(*TRAIN, text_file.name)
    assert refused.code == 3 and "manifest.json is damaged: its sources are no paths" in refused.err


def test_a_run_keeps_its_corpus_when_the_same_text_is_prepared_in_another_way(
    seqlm_command, text_file
):
    assert seqlm_command(*TRAIN, text_file.name).code == 0
    text_file.rename("tale.txt")
    again = ["prepare", "tale.txt", "--split", "90,5,5", "--out", "data/story", "--force"]
    assert seqlm_command(*again).code == 0
    assert seqlm_command("eval").code == 0
    resumed = seqlm_command("train", "--resume", "--steps", 6)
    assert resumed.code == 0 and "fingerprint" not in resumed.err
    assert seqlm_command("prepare", "tale.txt", "--split", "80,10,10", *again[4:]).code == 0
    assert seqlm_command("eval").code == 3


def test_sources_may_be_several_a_folder_a_glob_standard_input_or_a_name(
    seqlm_command, tmp_path, monkeypatch
):
    (tmp_path / "books").mkdir()
    for name in ("a.txt", "b.txt", "books/c.txt"):
        (tmp_path / name).write_text(sentences(1000, seed=len(name)))
    for sources, run in [
        (["a.txt", "b.txt"], "a-mingru"),
        (["books/"], "books-mingru"),
        (["boo*/*.txt"], "text-mingru"),
        (["data/a"], "again"),
        (["brackets:documents=400,length=16"], "brackets-length=16-documents=400-mingru"),
    ]:
        own = ["--run", run] if run == "again" else []
        trained = seqlm_command(*TRAIN, "--batch", 2, "--length", 32, *sources, *own)
        assert trained.code == 0, trained.err
        assert runs.is_run(runs.RUNS / run), sorted(runs.RUNS.iterdir())
    for run in ("stdin-mingru", "second"):
        with open("a.txt") as file:
            monkeypatch.setattr(sys, "stdin", file)
            assert seqlm_command(*TRAIN, "-", "--run", run).code == 0
    assert Path("data/stdin").is_dir()


def test_a_folder_and_a_corpus_of_one_name_are_told_apart(seqlm_command, corpus, tmp_path):
    assert seqlm_command(*TRAIN, "story").code == 0
    (tmp_path / "story").mkdir()
    (tmp_path / "story" / "a.txt").write_text(sentences(3000, seed=2))
    refused = seqlm_command(*TRAIN, "story", "--run", "new")
    assert refused.code == 2 and "data/story was prepared from story.txt, not from story" in (
        " ".join(refused.err.split())
    )
    assert seqlm_command(*TRAIN, "data/story", "--run", "new").code == 0


def test_the_library_trains_on_a_text_too(text_file):
    import seqlm

    run = seqlm.train(text_file, preset="tiny", width=8, layers=1, batch=2, length=16, steps=1)
    assert run.path == runs.RUNS / "story-mingru"
    assert run.config.data.path == "data/story"
    with pytest.raises(UsageError, match="data.path is data/story and another corpus is named"):
        seqlm.train("data/other", set={"data.path": "data/story"})
