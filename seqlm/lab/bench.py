"""The speed of seqlm on this machine, beside other libraries and lower bounds: `seqlm bench`.

Each contender runs in its own process, so that contenders cannot affect each other's memory,
threads or settings.  A turn times one call of each contender.  Times are compared within a turn,
because the load of the machine changes between turns; the medians are reported.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter, sleep
from typing import Any, NamedTuple, TypeVar

import torch

from seqlm.config import Config
from seqlm.errors import SeqlmError
from seqlm.lab.contenders import GROUPS, TRAINING, Built, Contender, Work
from seqlm.lab.processes import spawn
from seqlm.runtime import Runtime, peak_memory_bytes

TURNS = 7
SPIN, DEFAULT_SPIN = "GOMP_SPINCOUNT", "300000"  # libgomp's own default
WARM_UP_SECONDS = 1.0  # for compiling code and for memory to reach its size
SETTLE_SECONDS = 0.05  # for the waiting threads of the previous contender to go to sleep


@dataclass(frozen=True)
class Timing:
    """The measurements of one contender."""

    group: str
    contender: str
    dtype: str  # of the matrix products
    batch: int
    length: int
    parameters: int | None
    seconds: float  # of one call, median over the turns
    characters_per_second: float | None
    bytes_per_second: float | None  # only where memory bandwidth is the limit
    relative_time: float  # time for the same amount of work (seqlm = 1), median over the turns
    memory_bytes: int  # growth of the process's peak memory during the calls


class Ready(NamedTuple):
    """What a contender's process sends when it can be timed."""

    dtype: str
    characters: int | None  # of one call
    parameters: int | None
    bytes: int | None  # that one call moves
    memory: int  # bytes

    @property
    def amount(self) -> int:
        """The amount of work in one call; 1 where it is equal for all contenders of the group."""
        return self.bytes or self.characters or 1


class Running(NamedTuple):
    """A contender in its own process."""

    contender: Contender[Work]
    connection: Connection
    ready: Ready

    def time_call(self) -> float:
        """Run one call; returns its seconds."""
        sleep(SETTLE_SECONDS)
        with suppress(OSError):  # the process has ended; _receive reports it
            self.connection.send(True)
        return receive(self.connection, self.contender.name, float)


def matching_groups(config: Config) -> list[str]:
    """The groups that have a contender for this configuration."""
    return [group for group in GROUPS if any(one.applies(config) for one in GROUPS[group])]


def bench(
    config: Config,
    lengths: Sequence[int] = (),
    groups: Sequence[str] = (),
    warn: Callable[[str], None] = print,
) -> Iterator[list[Timing]]:
    """Yield the rows of each group, and then those of a training step at each of the `lengths`.

    config: complete.  lengths: the batch shrinks as the length grows, so that a step has the same
    number of characters.  warn: called with the error of another library's contender, which is then
    left out.  Raises SeqlmError when seqlm's own contender fails.
    """
    for group in groups:
        yield _measure(group, config, warn)
    characters = config.train.batch * config.train.length
    for length in lengths:
        train = replace(config.train, batch=max(1, characters // length), length=length)
        names = "seqlm", "minGRU-pytorch"
        yield _measure(TRAINING, replace(config, train=train), warn, names)


def missing(config: Config, contenders: Iterable[Contender[Any]]) -> list[str]:
    """The names of the contenders for this configuration that are not installed."""
    matching = (one for one in contenders if one.applies(config))
    return [*dict.fromkeys(one.name for one in matching if not _is_installed(one))]


def taking_part(config: Config, contenders: Iterable[Contender[Built]]) -> list[Contender[Built]]:
    """The contenders that suit the configuration and are installed."""
    return [one for one in contenders if one.applies(config) and _is_installed(one)]


def _measure(
    group: str, config: Config, warn: Callable[[str], None], names: Sequence[str] | None = None
) -> list[Timing]:
    """Measure the contenders of a group; names: only these."""
    contenders = [
        one for one in taking_part(config, GROUPS[group]) if names is None or one.name in names
    ]
    with ExitStack() as processes:
        running: list[Running] = []
        for contender in contenders:
            try:
                running.append(processes.enter_context(_started(group, contender, config)))
            except SeqlmError as error:
                if contender is contenders[0]:  # seqlm itself
                    raise
                warn(str(error))
        turns = [[one.time_call() for one in running] for _ in range(TURNS)]
    rows, amount = [], running[0].ready.amount
    for one, seconds in zip(running, zip(*turns, strict=True), strict=True):
        ready, typical = one.ready, median(seconds)
        ratios = [own / turn[0] for own, turn in zip(seconds, turns, strict=True)]
        row = Timing(
            group=group,
            contender=one.contender.name,
            dtype=ready.dtype,
            batch=config.train.batch,
            length=config.train.length,
            parameters=ready.parameters,
            seconds=typical,
            characters_per_second=ready.characters and ready.characters / typical,
            bytes_per_second=ready.bytes and ready.bytes / typical,
            relative_time=median(ratios) * amount / ready.amount,
            memory_bytes=ready.memory,
        )
        rows.append(row)
    return rows


def _is_installed(one: Contender[Any]) -> bool:
    return one.package is None or find_spec(one.package) is not None


Answer = TypeVar("Answer")


def receive(connection: Connection, name: str, kind: type[Answer]) -> Answer:
    """The next answer of a contender's process; SeqlmError when it failed or ended."""
    try:
        answer = connection.recv()
    except (EOFError, OSError):
        raise SeqlmError(
            f"The process of {name} ended without an answer; the memory may be full. Choose a "
            "smaller --batch."
        ) from None
    if isinstance(answer, str):
        raise SeqlmError(f"{name} failed: {answer}. Choose another shape or cell.")
    assert isinstance(answer, kind), (name, answer)
    return answer


@contextmanager
def process(
    one: Contender[Any], work: Callable[..., None], *arguments: Any
) -> Iterator[Connection]:
    """Run work(connection, *arguments) in the contender's process, and end it after the block."""
    spin = os.environ.get(SPIN)
    if not one.is_ours:  # other libraries run with libgomp's default, not with seqlm's setting
        os.environ[SPIN] = DEFAULT_SPIN
    started, connection = spawn(work, *arguments, daemon=True)
    os.environ.pop(SPIN, None)
    if spin is not None:
        os.environ[SPIN] = spin
    try:
        yield connection
    finally:
        connection.close()  # the process ends when it sends or receives
        started.join(timeout=10)
        started.kill()
        started.join()


@contextmanager
def reporting(connection: Connection) -> Iterator[None]:
    """The block of a contender's process: an error is sent, and `receive` raises it."""
    try:
        yield
    except (EOFError, BrokenPipeError):
        return  # the bench has ended
    except Exception as error:  # another library may raise anything
        connection.send(f"{type(error).__name__}: {error}")


@contextmanager
def _started(group: str, one: Contender[Work], config: Config) -> Iterator[Running]:
    """Start the contender's process, wait until it is ready, and end it after the block."""
    with process(one, _run_contender, group, one.name, config) as connection:
        yield Running(one, connection, receive(connection, one.name, Ready))


def _run_contender(connection: Connection, group: str, name: str, config: Config) -> None:
    """The contender's process: sends Ready, then the seconds of one call for each request."""
    with reporting(connection):
        one = next(one for one in GROUPS[group] if one.name == name)
        runtime = Runtime.pick(config.runtime)
        device = runtime.device.value
        with runtime.active():
            work = one.build(config)
            before = peak_memory_bytes(device)
            began, calls = perf_counter(), 0
            while calls < 3 or perf_counter() - began < WARM_UP_SECONDS:
                timed(work.call, device)
                calls += 1
            memory = peak_memory_bytes(device) - before
            ready = Ready(work.dtype, work.characters, work.parameters, work.bytes, memory)
            connection.send(ready)
            while connection.recv():
                connection.send(timed(work.call, device))


def timed(call: Callable[[], object], device: str) -> float:
    """The seconds of a call, including the kernels that it leaves running on a GPU."""
    began = perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - began
