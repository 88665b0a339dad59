"""Check on this machine that a run is sound: `seqlm check`.

Most checks compute the same numbers in two ways, and report the deviation.
"""

# B rows, T time, V vocabulary

import codecs
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import wraps
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from seqlm import api, ops
from seqlm.cells import State
from seqlm.errors import InputError, SeqlmError, UsageError
from seqlm.evaluation import evaluate
from seqlm.files import is_locked
from seqlm.generation.context import prefill, single_step
from seqlm.model import LanguageModel, build
from seqlm.progress import OnProgress
from seqlm.run import Run
from seqlm.runtime import Runtime, autocast
from seqlm.store import checkpoint, history, runs
from seqlm.store.checkpoint import Progress
from seqlm.temporary import scratch
from seqlm.text.card import implausible
from seqlm.text.corpus import Corpus, find_corpus, moved_corpus, open_corpus, recorded_corpus
from seqlm.text.staging import code_points
from seqlm.text.tokenizer import ByteTokenizer, Tokenizer
from seqlm.training import launch
from seqlm.training.launch import Training

PASS, FAIL, WARN, NOT_RUN = "pass", "fail", "warn", "not run"
STEPS, POINTERS = "hashes of the steps", "pointers best and last"
METRICS = "metrics of each step"
CORPUS = "hashes of the corpus"
SEQUENCE, CHUNKED = "sequence = steps", "prefill in chunks = whole"
FUTURE, ROWS_ALONE = "no look into the future", "rows are independent"
EVALUATION, SAVED = "eval and prompt = steps", "saved and loaded = same"
TEXT_BACK, RESUME = "decode(encode(text)) = text", "resume = uninterrupted"
PLAUSIBLE = "loss is plausible"
HEADINGS = ("check", "result", "dtype", "deviation", "tolerance", "details")
IN_ORDER = (
    *(STEPS, POINTERS, METRICS, CORPUS, SEQUENCE, CHUNKED, FUTURE, ROWS_ALONE, EVALUATION, SAVED),
    *(TEXT_BACK, RESUME, PLAUSIBLE),
)

# Relative to the norm of all logits.  In float32 only the order of sums differs, over 400 steps and
# all layers.  bfloat16 and float16 round the inputs of every matrix product to 8 and 11 bits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
ROWS, BEFORE, LENGTH = 3, 64, 336  # rows; symbols before the compared ones; compared symbols
PIECES = (1, 2, 7, 65)  # symbols of the first chunks; the last chunk has the rest
RESUMED = 2  # training steps before the interruption, and as many after it
JUDGED = 1 << 16  # symbols of the val split for the plausibility of the loss
DECODED_AT_ONCE = 1 << 20  # symbols; limits the memory


@dataclass(frozen=True)
class Check:
    name: str
    status: str  # PASS, FAIL, WARN or NOT_RUN
    dtype: str | None = None  # of the compared numbers
    deviation: float | None = None
    tolerance: float | None = None
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields; a deviation that is not finite is null."""
        fields = asdict(self)
        if self.deviation is not None and not self.deviation < inf:
            fields["deviation"] = None
        return fields

    def row(self) -> list[str | None]:
        """The cells of a table below HEADINGS."""
        small = [
            x if x is None else f"{x:.1e}" if x else "0" for x in (self.deviation, self.tolerance)
        ]
        return [self.name, self.status, self.dtype, *small, self.detail]


def check(
    path: str | None = None,
    step: str = "best",
    *,
    data: str | None = None,
    cell: str | None = None,
    runtime: Runtime | None = None,
) -> Iterator[Check]:
    """Yield the results of all checks of a run, in the order of IN_ORDER.

    data: the path of the run's corpus, if it was moved.  cell: the file of the user's own cell.
    runtime: the runtime to check, which may differ from the training's; None: this machine's best.
    Raises InputError when no step can be read.
    """
    runtime = runtime or Runtime.pick()
    folder = runs.find(path)
    yield _step_files(folder)
    yield _pointers(folder)
    yield _metrics(folder)
    run = api.read(folder, step, runtime, cell)
    api.refuse_cell_without_effect(cell, run)
    corpus, corpus_check = _corpus(run, data)
    yield corpus_check
    tokens = _tokens(run, corpus)
    with runtime.active():
        # no yield in this block, because the runtime would stay active while the generator waits
        model_checks = [
            result
            for dtype in dict.fromkeys(("float32", runtime.dtype.value))
            for result in _forms(run.model, tokens, dtype, runtime.device.value)
        ]
        model_checks += [_evaluation(run.model, tokens), _save_and_load(run, tokens)]
    yield from model_checks
    if corpus is None:
        needed = (TEXT_BACK, RESUME, PLAUSIBLE)
        yield from (Check(name, NOT_RUN, detail="needs the run's corpus") for name in needed)
        return
    yield _text(run.tokenizer, corpus)
    yield _resume(folder, corpus, cell, runtime)
    with runtime.active():
        plausible = _plausible(run, corpus)
    yield plausible


def collect(checks: Iterable[Check], tick: OnProgress) -> list[Check]:
    """All results of `check`; tick is called after each of them."""
    found = []
    for one in checks:
        found.append(one)
        tick((IN_ORDER.index(one.name) + 1) / len(IN_ORDER), one.name)
    return found


def refuse_in_training(run: Path) -> None:
    """Raises UsageError while a process trains the run, whose last step then changes."""
    if is_locked(run):
        raise UsageError(f"{run} is being trained. Check it after the training has stopped.")


def _compared(name: str, dtype: str, tolerance: float, *pairs: tuple[Tensor, Tensor]) -> Check:
    """A check of the largest deviation over the pairs (actual, expected), relative to the norm of
    `expected`.  Tolerance 0: the pairs must be equal bit for bit."""
    doubles = [(actual.cpu().double(), expected.cpu().double()) for actual, expected in pairs]
    deviations = [(a - e).norm() / e.norm().clamp_min(1e-30) for a, e in doubles]
    worst = torch.stack(deviations).max().item()  # max() returns NaN if there is one
    status = PASS if worst <= tolerance else FAIL
    return Check(name, status, dtype, worst, tolerance)


def _named(name: str) -> Callable[[Callable[..., str | Check]], Callable[..., Check]]:
    """Make a check of a function.  It returns the details of a PASS, or a Check; an error that it
    raises is a FAIL."""

    def decorate(function: Callable[..., str | Check]) -> Callable[..., Check]:
        @wraps(function)
        def run(*arguments: Any) -> Check:
            try:
                result = function(*arguments)
            except (SeqlmError, OSError, UnicodeDecodeError) as error:
                return Check(name, FAIL, detail=str(error))
            return result if isinstance(result, Check) else Check(name, PASS, detail=result)

        return run

    return decorate


# Files


@_named(STEPS)
def _step_files(folder: Path) -> str:
    """Compare the files of each saved step with its manifest."""
    steps = runs.steps(folder)
    for step in steps:
        checkpoint.verify(step)
        checkpoint.open_step(step)
    return f"{len(steps)} steps"


@_named(POINTERS)
def _pointers(folder: Path) -> str:
    """Check that `last` names the last saved step, and `best` the best step of the training."""
    last, warnings = runs.load(folder, runs.LAST)
    best = last.progress.best_step
    named = runs.target(folder / runs.BEST)
    if warnings:
        raise InputError(warnings[0])
    if last.folder != runs.steps(folder)[-1]:
        raise InputError(f"last names step {last.step}, but there are later steps")
    if (named and checkpoint.step_number(named.name)) != (best or None):
        raise InputError(f"best does not name step {best}, the best step")
    return f"best {best or 'none'}, last {last.step}"


@_named(METRICS)
def _metrics(folder: Path) -> str:
    """Check that metrics.jsonl has a line for each step up to the last saved one."""
    last = runs.load(folder, runs.LAST)[0].step
    history.refuse_missing(folder, last)
    return f"{last} steps"


def _corpus(run: Run, data: str | None) -> tuple[Corpus | None, Check]:
    """The run's corpus (None if it is missing or damaged), and the check of its files."""
    name, recorded = CORPUS, run.config.data
    moved = None if data else moved_corpus(recorded.fingerprint)
    if data is None and moved is None and not os.path.isdir(recorded.path):
        detail = f"{recorded.path} does not exist; give the path of the corpus with --data"
        return None, Check(name, NOT_RUN, detail=detail)
    try:
        if data is None:
            corpus = recorded_corpus(recorded.path, recorded.fingerprint)
        else:
            corpus = open_corpus(find_corpus(data))
        for split in corpus.splits:
            corpus.verify(split)
    except InputError as error:
        return None, Check(name, FAIL, detail=str(error))
    if not corpus.has(recorded.fingerprint):
        return None, Check(
            name, FAIL, detail=f"{corpus.path} is not the corpus that the run was trained on"
        )
    return corpus, Check(name, PASS, detail=str(corpus.path))


# The model


def _tokens(run: Run, corpus: Corpus | None) -> Tensor:
    """Symbols of the val split, (B, 64 + T); random symbols if there is no corpus."""
    size = (ROWS, BEFORE + LENGTH)
    random = np.random.default_rng(0)
    symbols = random.integers(0, run.model.vocab_size, size)
    if corpus is not None:
        val = corpus.symbols("val")
        starts = random.integers(0, len(val), (ROWS, 1))
        symbols = val[(starts + np.arange(size[1])) % len(val)].astype(np.int64)
        symbols %= run.model.vocab_size  # if the tokenizers differ, which _text reports
    return torch.from_numpy(symbols).to(run.model.embedding.weight.device)


@torch.inference_mode()
def _forms(model: LanguageModel, tokens: Tensor, dtype: str, device: str) -> Iterator[Check]:
    """Four checks from the state after 64 symbols: single steps, chunks, causality, batch rows."""
    with autocast(device, dtype), ops.count_newton(ops.NewtonCounts()) as solves:
        _, state = model(tokens[:, :BEFORE])
        x = tokens[:, BEFORE:]
        whole, end = model(x, state)
        stepped, stepped_end = _steps(model, x, state)
        chunked, chunked_end = _chunks(model, x, state)
        futures = [_other_future(model, x, state, t) for t in (1, LENGTH // 2, LENGTH - 1)]
        others = x.clone()
        others[1] = _changed(model, x[1])
        rows, _ = model(others, state)
    tolerance = TOLERANCE[dtype]
    expected = (whole, *end)
    yield _compared(
        SEQUENCE, dtype, tolerance, *zip((stepped, *stepped_end), expected, strict=True)
    )
    yield _compared(CHUNKED, dtype, tolerance, *zip((chunked, *chunked_end), expected, strict=True))
    before = [(logits, whole[:, : logits.shape[1]]) for logits in futures]
    exact = tolerance if solves.calls else 0.0  # Newton's method ends with a small residual
    yield _compared(FUTURE, dtype, exact, *before)
    yield _compared(ROWS_ALONE, dtype, exact, (rows[[0, 2]], whole[[0, 2]]))


def _steps(model: LanguageModel, x: Tensor, state: State) -> tuple[Tensor, State]:
    outputs, step = [], single_step(model)
    for token in x.unbind(1):
        logits, *after = step(token, *state)
        state = tuple(after)
        outputs.append(logits)
    return torch.stack(outputs, dim=1), state


def _chunks(model: LanguageModel, x: Tensor, state: State) -> tuple[Tensor, State]:
    outputs = []
    for part in x.split([*PIECES, x.shape[1] - sum(PIECES)], dim=1):
        logits, state = model(part, state)
        outputs.append(logits)
    return torch.cat(outputs, dim=1), state


def _other_future(model: LanguageModel, x: Tensor, state: State, t: int) -> Tensor:
    """The logits before symbol t, when symbol t and all later symbols are changed."""
    return model(torch.cat([x[:, :t], _changed(model, x[:, t:])], dim=1), state)[0][:, :t]


def _changed(model: LanguageModel, x: Tensor) -> Tensor:
    return (x + 1) % (model.vocab_size + 1)


@torch.inference_mode()
def _evaluation(model: LanguageModel, tokens: Tensor) -> Check:
    """Compare the loss of `eval` and the prompt of `generate`, in chunks, with single steps."""
    symbols = tokens[:1]
    inputs = torch.cat([torch.full_like(symbols[:, :1], model.beginning), symbols], dim=1)
    logits, _ = _steps(model, inputs, model.initial_state(1))
    p = torch.log_softmax(logits[0, :-1].cpu().double(), dim=-1)
    nats = -p.gather(1, symbols[0, :, None].cpu()).sum()
    in_numpy = symbols[0].cpu().numpy()
    streamed = evaluate.stream(model, in_numpy, chunk=7).nats
    read, _ = prefill(model, in_numpy, chunk=7)
    pairs = (torch.tensor(streamed), nats), (read, logits[0, -1])
    return _compared(EVALUATION, "float32", TOLERANCE["float32"], *pairs)


# Saving and resuming


@torch.inference_mode()
def _save_and_load(run: Run, tokens: Tensor) -> Check:
    here = run.runtime.environment()
    with scratch() as place:
        progress, tensors = Progress(step=run.step), {"model": run.model.state_dict()}
        tensors |= {"optimizer": {}, "state": {}}
        folder = checkpoint.save(place, run.config, run.tokenizer, progress, here, tensors)
        model = build(run.config, run.tokenizer.vocab_size)
        model.load_state_dict(checkpoint.open_step(folder).weights(run.config))
    model.to(run.runtime.device.value).eval()
    pair = model(tokens)[0], run.model(tokens)[0]
    return _compared(SAVED, "float32", 0.0, pair)


@_named(RESUME)
def _resume(folder: Path, corpus: Corpus, cell: str | None, runtime: Runtime) -> Check:
    """Train two copies of the last step: one without a stop, one saved and resumed half-way.

    Without validations, because they take long and do not change the training.
    """
    saved, _ = runs.load(folder, runs.LAST, *checkpoint.KINDS)
    half, end = saved.step + RESUMED, saved.step + 2 * RESUMED
    given = {"train.steps": end + 1, **runtime.config()}
    given |= {f"train.{every}_every": 0 for every in ("eval", "save")}
    given |= {"cell.name": cell} if cell else {}
    with scratch() as place:
        whole, resumed = place / "whole", place / "resumed"
        for copy, stops in ((whole, [end]), (resumed, [half, end])):
            copy.mkdir()
            runs.point(copy, runs.LAST, checkpoint.copy(saved.folder, copy))
            for stop in stops:
                setup = launch.start(str(corpus.path), run=str(copy), settings=given, resume=True)
                _train_to(setup, stop)
        expected, rest = _saved(whole, end)
        actual, other_rest = _saved(resumed, end)
    if rest != other_rest or actual.keys() != expected.keys():
        raise InputError("the progress, the metrics or the names of tensors differ")
    pairs = [(actual[key], tensor) for key, tensor in expected.items()]
    result = _compared(RESUME, runtime.dtype.value, 0.0, *pairs)
    return replace(result, detail=f"{2 * RESUMED} steps from step {saved.step}")


def _train_to(setup: Training, step: int) -> None:
    for _ in setup.reports(interrupted=lambda: setup.trainer.progress.step == step):
        pass


def _saved(run: Path, step: int) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """The tensors of a run at a step; and its progress, without the time, with its metrics."""
    folder = run / checkpoint.folder_name(step)
    tensors = {
        f"{kind}.{name}": tensor
        for kind, file in checkpoint.KINDS.items()
        for name, tensor in load_file(folder / file).items()
    }
    progress = replace(checkpoint.open_step(folder).progress, elapsed=0.0)
    return tensors, (progress, (run / history.METRICS).read_bytes())


# The text


@_named(TEXT_BACK)
def _text(tokenizer: Tokenizer, corpus: Corpus) -> str:
    """Decode each split, encode the text, decode again, and compare with the prepared text."""
    if tokenizer.vocab_size != corpus.tokenizer.vocab_size:
        raise InputError("the tokenizers of the run and of its corpus differ")
    for split, counts in corpus.splits.items():
        symbols, digest = corpus.symbols(split), hashlib.sha256()
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(symbols), DECODED_AT_ONCE):
            corpus.refuse_cut(split)
            text = tokenizer.decode_bytes(symbols[start : start + DECODED_AT_ONCE])
            digest.update(text)
            if not isinstance(tokenizer, ByteTokenizer):  # others encode whole characters only
                text = decoder.decode(text).encode("utf-8")
            if tokenizer.decode_bytes(tokenizer.encode(text)) != text:
                raise InputError(f"{split} changes when it is encoded and decoded")
        if digest.hexdigest() != counts["sha256"]:
            raise InputError(f"{split} is not the prepared text")
    return f"{sum(counts['bytes'] for counts in corpus.splits.values()):,} bytes"


@_named(PLAUSIBLE)
def _plausible(run: Run, corpus: Corpus) -> str | Check:
    """Compare the loss on val with the size of the corpus under xz -9."""
    if run.tokenizer.to_dict() != corpus.tokenizer.to_dict():
        return Check(PLAUSIBLE, NOT_RUN, detail="the tokenizers of run and corpus differ")
    if run.tokenizer.mark:
        return Check(PLAUSIBLE, NOT_RUN, detail="only answers are counted, so 0 bits are possible")
    corpus.refuse_cut("val")
    symbols, ends = corpus.symbols("val"), corpus.ends("val")
    if ends is None:
        # a copy, so that a file that is cut meanwhile does not matter
        symbols = symbols[:JUDGED].copy()
        nats = evaluate.stripes(run.model, symbols).nats
    else:
        ends = ends[: max(1, np.searchsorted(ends, JUDGED))]
        symbols = symbols[: ends[-1]].copy()
        nats = evaluate.each_document(run.model, symbols, ends).nats
    text, card = run.tokenizer.decode_bytes(symbols), corpus.manifest["card"]
    count = len(text) if corpus.splits["val"]["chars"] is None else code_points(text)
    bits = nats / evaluate.NATS_PER_BIT / count
    detail = f"{bits:.4f} bits per character; xz -9 reaches {card['xz_bits_per_char']:.4f}"
    if not isfinite(bits):
        raise InputError("the loss is not finite")
    if implausible(bits, card):
        detail += ": the model may see the symbols that it predicts"
        return Check(PLAUSIBLE, WARN, detail=detail)
    return detail
