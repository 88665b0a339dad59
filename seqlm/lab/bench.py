"""seqlm's speed on this machine, beside what people would use in its place: `seqlm bench`.

Each contender has a process of its own, so that none meets the memory, threads or settings that
another left.  They take turns, one call each and only one at a time; what is compared is the times
of one turn, of which the median counts.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch

from seqlm.config import Config
from seqlm.errors import SeqlmError
from seqlm.lab.contenders import GROUPS, TRAINING, Contender, Work
from seqlm.lab.processes import spawned
from seqlm.runtime import Runtime, peak_memory_bytes

TURNS = 7
SPIN, UNSET = "GOMP_SPINCOUNT", "300000"  # which libgomp takes where nothing is said
WARM_UP = 1.0  # seconds in which code is compiled, and memory settles
SETTLE = 0.05  # seconds for the threads of the one before to go to sleep


@dataclass(frozen=True)
class Row:
    """What one contender came to."""

    group: str
    contender: str
    dtype: str  # of its matrix products
    batch: int
    length: int
    parameters: int | None
    seconds: float  # of a call, the median
    characters_per_second: float | None
    bytes_per_second: float | None  # where moving bytes is what limits it
    times: float  # its time for as much work over that of seqlm, the median over the turns
    memory_bytes: int  # its process took by calling it

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def groups_of(config: Config) -> list[str]:
    """The groups that say something about the configuration."""
    return [group for group in GROUPS if any(one.beside(config) for one in GROUPS[group])]


def bench(
    config: Config,
    lengths: Sequence[int] = (),
    groups: Sequence[str] = (),
    failed: Callable[[str], None] = print,
) -> Iterator[list[Row]]:
    """The rows of each of `groups`, one group at a time, then those of a training step at each of
    the `lengths`, the characters of a step kept as near as they go.

    config: complete.  failed: called with what a contender of others says that fails here, and
    without which it goes on.  Raises SeqlmError where seqlm itself fails.
    """
    for group in groups:
        yield _measure(group, config, failed)
    characters = config.train.batch * config.train.length
    for length in lengths:
        train = replace(config.train, batch=max(1, characters // length), length=length)
        both = "seqlm", "minGRU-pytorch"
        yield _measure(TRAINING, replace(config, train=train), failed, both)


def missing(config: Config, groups: Sequence[str]) -> list[str]:
    """The contenders of the cell that are not installed."""
    found = (one for group in groups for one in GROUPS[group] if one.beside(config))
    return [*dict.fromkeys(one.name for one in found if not _installed(one))]


def _measure(
    group: str, config: Config, failed: Callable[[str], None], only: Sequence[str] | None = None
) -> list[Row]:
    contenders = [
        one
        for one in GROUPS[group]
        if one.beside(config) and _installed(one) and (only is None or one.name in only)
    ]
    with ExitStack() as processes:
        ready = []
        for one in contenders:
            told = processes.enter_context(_process(group, one, config))
            try:
                ready.append((one, told, *_answer(told, one)))
            except SeqlmError as error:
                if one.name == contenders[0].name:
                    raise
                failed(str(error))
        turns = [[_turn(told, one) for one, told, *_ in ready] for _ in range(TURNS)]
    rows, first = [], _size(ready[0][2])
    for (one, _, work, memory), seconds in zip(ready, zip(*turns, strict=True), strict=True):
        middle, share = median(seconds), first / _size(work)
        ratios = [own * share / turn[0] for own, turn in zip(seconds, turns, strict=True)]
        rates = [work[name] and work[name] / middle for name in ("characters", "bytes")]
        what = group, one.name, work["dtype"], config.train.batch, config.train.length
        rows.append(Row(*what, work["parameters"], middle, *rates, median(ratios), memory))
    return rows


def _size(work: dict[str, Any]) -> int:
    """How much work a call is: bytes or characters, or the same as of all others."""
    return work["bytes"] or work["characters"] or 1


def _installed(one: Contender) -> bool:
    return one.package is None or find_spec(one.package) is not None


def _turn(told: Connection, one: Contender) -> float:
    sleep(SETTLE)
    return _answer(told, one, True)


def _answer(told: Connection, one: Contender, word: bool | None = None) -> Any:
    """What a contender's process says, to the word if there is one."""
    try:
        if word is not None:
            told.send(word)
        answer = told.recv()
    except (EOFError, OSError):
        raise SeqlmError(
            f"{one.name} ended without a word; was there enough memory? Choose a smaller --batch."
        ) from None
    if isinstance(answer, str):
        raise SeqlmError(f"{one.name} fails here: {answer}. Choose another shape or cell.")
    return answer


@contextmanager
def _process(group: str, one: Contender, config: Config) -> Iterator[Connection]:
    spin = os.environ.get(SPIN)
    if not one.is_ours:  # the waiting of threads as it comes
        os.environ[SPIN] = UNSET
    process, ours = spawned(_work, group, one.name, config, daemon=True)
    os.environ.pop(SPIN, None)
    if spin is not None:
        os.environ[SPIN] = spin
    try:
        yield ours
    finally:
        ours.close()  # which ends its loop
        process.join(timeout=10)
        process.kill()


def _work(told: Connection, group: str, name: str, config: Config) -> None:
    """The process of a contender: what it is, then the seconds of a call for every word."""
    try:
        one = next(one for one in GROUPS[group] if one.name == name)
        runtime = Runtime.pick(config.runtime)
        device = runtime.device.value
        with runtime.active():
            work = one.build(config)
            before = peak_memory_bytes(device)
            began, calls = perf_counter(), 0
            while calls < 3 or perf_counter() - began < WARM_UP:
                _timed(work, device)
                calls += 1
            memory = peak_memory_bytes(device) - before
            told.send(({**work._asdict(), "call": None}, memory))
            while told.recv():
                told.send(_timed(work, device))
    except (EOFError, BrokenPipeError):
        return  # the one who asked has gone
    except Exception as error:  # of another's library: said by the process that asked
        told.send(f"{type(error).__name__}: {error}")


def _timed(work: Work, device: str) -> float:
    """The seconds of a call, to the end of what it left a GPU to do."""
    began = perf_counter()
    work.call()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - began
