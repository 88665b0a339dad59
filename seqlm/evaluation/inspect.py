"""What the state of a model remembers: how far back, for how long, and what units follow.

All three are measured on a text that the model reads from the beginning.
"""

# N symbols, T symbols read one by one, H units of a layer, U units of all layers, F features

import codecs
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from seqlm.cells import Cell, State
from seqlm.errors import InputError, UsageError, not_utf8
from seqlm.evaluation.evaluate import Score, each_document, finite
from seqlm.evaluation.passage import Passage, passage_of_text
from seqlm.model import LanguageModel
from seqlm.progress import OnProgress, silent
from seqlm.text.tokenizer import Tokenizer

READ = 32_768  # characters of a text that are read; longer ones take minutes
STEPS = 8_192  # symbols that are read one by one, to see each state
NUMBERS = 1 << 25  # cap on the numbers of all states together; larger models read fewer symbols
SHORTEST = 64  # symbols
REACHES = tuple(2**power for power in range(15))  # 1 .. 16,384
ENOUGH = 10  # occurrences of a feature, and of its absence, in each half of the text
TOP = 5  # units kept for each feature
LEVELS = (0.5, 0.75, 0.9)  # shares of the text below the levels of a unit's value


class Reach(NamedTuple):
    """Bits per character if the state is reset every `reset_every` symbols of each document.

    Each symbol is then predicted from 1 to `reset_every` symbols before it.
    """

    reset_every: int
    bits_per_char: float


@dataclass(frozen=True)
class TimeConstants:
    """For how many symbols the units of one part of a layer's state keep what they hold.

    A unit with a constant gate a keeps the share a^n over n symbols: 1/e, or 37 %, over
    -1 / ln a symbols, its time constant.  Gates change with the text.  The memory of a unit is the
    sum, over all earlier symbols, of the share that is left of its state after that symbol.  Its
    time constant is that of a constant gate with the same mean memory over the text.  (A mean of
    the logarithms of the gates would be ruled by the few symbols at which a gate is near 0.)
    """

    layer: int  # from 1
    part: str  # its name in the cell's equations
    symbols: np.ndarray  # (H,) float64; at most about half the symbols that were read


class Follower(NamedTuple):
    """A unit whose value tells where a feature is present.

    AUC: the probability that the unit is higher (or lower) at a random symbol with the feature than
    at a random one without; 0.5 is chance.
    """

    layer: int  # from 1
    unit: int  # from 1, over all parts of the layer's state
    high: bool  # whether its value is higher where the feature is present
    chosen_auc: float  # on the first half, where the unit and `high` were chosen
    auc: float  # on the second half


class Feature(NamedTuple):
    name: str
    share: float  # of the text's symbols
    units: list[Follower]  # the best ones of the first half; empty if the text has too few


@dataclass(frozen=True)
class Walk:
    """The states of a model after each of the first T symbols of a text."""

    text: list[str]  # (T,) what each symbol adds to it; "" for one that only begins a character
    states: list[np.ndarray]  # for each layer (T, H) float32; H is 0 for a cell without units
    times: list[TimeConstants]

    def unit(self, name: str) -> np.ndarray:
        """(T,) the values of a unit 'LAYER:INDEX'; both count from 1.  Raises UsageError."""
        layer, index = place_of(name, [values.shape[1] for values in self.states])
        return self.states[layer][:, index]


def place_of(unit: str, widths: Sequence[int]) -> tuple[int, int]:
    """Layer and index of a unit 'LAYER:INDEX', where they count from 1; the result's from 0.

    widths: the number of units of each layer.  Raises UsageError if none of them is the unit.
    """
    layer, _, index = unit.partition(":")
    if not (layer.isdecimal() and index.isdecimal()):
        raise UsageError(f"The unit {unit!r} is not LAYER:INDEX. Give a unit such as 1:5.")
    if not 1 <= int(layer) <= len(widths):
        raise UsageError(f"There is no layer {layer}. Layers go from 1 to {len(widths)}.")
    if not 1 <= int(index) <= widths[int(layer) - 1]:
        raise UsageError(
            f"The unit {unit} is not in the layer, which has {widths[int(layer) - 1]} units. They "
            "count from 1."
        )
    return int(layer) - 1, int(index) - 1


def widths_of(model: LanguageModel) -> list[int]:
    """The number of units of each layer."""
    blocks = cast(Sequence[nn.Module], model.blocks)
    states = (cast(Cell, block.cell).initial_state(1) for block in blocks)
    return [sum(map(len, _units(state))) for state in states]


def _units(state: State) -> list[Tensor]:
    """The parts of a state that are units; a window over characters is not."""
    return [part[0] for part in state if part.ndim == 2 and part.shape[1] > 1]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found in a text."""

    chars: int
    reach: list[Reach]  # in the last one the state is reset only between documents
    walk: Walk
    features: list[Feature]  # the best followed first

    @property
    def bits_per_char(self) -> float:
        return self.reach[-1].bits_per_char


def opening(raw: bytes, whole: bool) -> bytes:
    """At most READ characters of a text.  whole: whether `raw` is the text to its end.

    Raises InputError for bytes that are not UTF-8.
    """
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw, whole)[:READ].encode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8("The text", error) from None


def passage_to_inspect(raw: bytes, tokenizer: Tokenizer, on_unknown: str = "error") -> Passage:
    """A text in the symbols of a model; InputError if it is too short, or only answers count."""
    passage = passage_of_text([raw], tokenizer, on_unknown)
    if len(passage.symbols) < SHORTEST:
        raise InputError(
            f"The text has {len(passage.symbols)} symbols; at least {SHORTEST} are needed. Give a "
            "longer text."
        )
    if passage.answers is not None:
        raise UsageError(
            "This run was trained on questions with answers, which are too short to inspect a "
            "state. Choose another run with --run."
        )
    return passage


def inspect(
    model: LanguageModel, tokenizer: Tokenizer, passage: Passage, tick: OnProgress = silent
) -> Inspection:
    """All that can be said of a passage from `passage_to_inspect`."""
    found = bits_by_reach(model, passage, lambda share, text: tick(share / 2, text))
    read = walk(model, tokenizer, passage, lambda share, text: tick((1 + share) / 2, text))
    assert passage.chars is not None, "the text is UTF-8"
    return Inspection(passage.chars, found, read, followed(read))


def bits_by_reach(model: LanguageModel, passage: Passage, tick: OnProgress = silent) -> list[Reach]:
    """Bits per character by how far back the state may see, up to each document's beginning.

    The text is cut every k symbols, for each k in REACHES that is shorter than the longest
    document.  Each piece is read from a fresh state.  Its first input is the symbol before it.
    """
    symbols = passage.symbols
    ends = np.array([len(symbols)]) if passage.ends is None else passage.ends
    starts = np.append(0, ends[:-1])
    longest = int((ends - starts).max())
    reaches = [*(k for k in REACHES if k < longest), longest]
    found = []
    for number, k in enumerate(reaches):
        cuts = [np.arange(start + k, end, k) for start, end in zip(starts, ends, strict=True)]
        pieces = np.sort(np.concatenate([*cuts, ends]))
        begins = np.isin(np.append(0, pieces[:-1]), starts)
        nats, _ = each_document(model, symbols, pieces, begins=begins)
        tick((number + 1) / len(reaches), f"reset every {k:,}")
        score = finite(Score(nats, 0, len(symbols), passage.chars, passage.bytes))
        bits = score.bits_per_char
        assert bits is not None, "the text is UTF-8"
        found.append(Reach(k, bits))
    return found


class _Watched(Cell):
    """A cell whose states and gates are recorded at each step."""

    def __init__(self, cell: Cell):
        super().__init__()
        self.cell = cell
        self.steps = 0
        self.memory: dict[str, Tensor] = {}  # of each unit in the document
        self.total: dict[str, Tensor] = {}  # the sum of the memory over the steps

    def initial_state(self, batch: int) -> State:
        return self.cell.initial_state(batch)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        self.steps += 1
        for part, kept in self.cell.kept(x, state).items():
            self.memory[part] = kept[0].cpu().double() * (1 + self.memory.get(part, 0))
            self.total[part] = self.memory[part] + self.total.get(part, 0)
        y, state = self.cell.step(x, state)
        self.last = _units(state)
        return y, state

    def times(self, layer: int) -> list[TimeConstants]:
        totals = {part: total.numpy() for part, total in self.total.items()}
        with np.errstate(divide="ignore"):  # a memory of 0 has the time constant 0
            return [
                TimeConstants(layer, part, 1 / np.log1p(self.steps / total))
                for part, total in totals.items()
            ]


@torch.inference_mode()
def walk(
    model: LanguageModel, tokenizer: Tokenizer, passage: Passage, tick: OnProgress = silent
) -> Walk:
    """Read up to STEPS symbols one by one, each document from a fresh state."""
    widths, model = widths_of(model), deepcopy(model)
    blocks = cast(Sequence[nn.Module], model.blocks)
    watched = [_Watched(cast(Cell, block.cell)) for block in blocks]
    for block, cell in zip(blocks, watched, strict=True):
        block.cell = cell
    steps = min(len(passage.symbols), STEPS, NUMBERS // max(1, sum(widths)))
    starts = {0} if passage.ends is None else {0, *passage.ends.tolist()}
    device = model.embedding.weight.device
    states = torch.empty(steps, sum(widths), device=device)
    symbols = torch.from_numpy(passage.symbols[:steps].astype(np.int64)).to(device)
    beginning = torch.tensor([model.beginning], device=device)
    state: State = ()
    for place in range(steps):
        if place in starts:
            for cell in watched:
                cell.memory.clear()
            _, state = model.step(beginning, None)
        _, state = model.step(symbols[place : place + 1], state)
        parts = [unit for cell in watched for unit in cell.last]
        states[place] = torch.cat(parts) if parts else states[place]
        tick((place + 1) / steps, f"{place + 1:,} of {steps:,} states")
    layers = states.cpu().split(widths, dim=1)
    decode = tokenizer.streamer()
    return Walk(
        [decode(symbol) for symbol in passage.symbols[:steps].tolist()],
        [values.numpy() for values in layers],
        [time for layer, cell in enumerate(watched, start=1) for time in cell.times(layer)],
    )


def features_of(text: Sequence[str]) -> dict[str, np.ndarray]:
    """{feature: (T,) whether it is present after each symbol} of the text.

    A blank line ends quotations and brackets, so that a mark without its partner does not turn
    the rest of the text around.
    """
    quoted, depth, column, last = False, 0, 0, ""
    rows = []
    for piece in text:
        for c in piece:
            if c == last == "\n":
                quoted, depth = False, 0
            quoted = (c == "“") or (quoted != (c == '"') and c != "”")
            depth = max(0, depth + (c in "([{") - (c in ")]}"))
            column = 0 if c == "\n" else column + 1
            last = c
        rows.append((quoted, depth, column, last.isupper(), last.isdecimal()))
    late = int(median(row[2] for row in rows))
    quotes, depths, columns, capitals, digits = np.array(rows).T
    return {
        "inside quotation marks": quotes > 0,
        "inside brackets": depths > 0,
        "inside brackets in brackets": depths > 1,
        f"past character {late} of the line": columns > late,
        "at a capital letter": capitals > 0,
        "at a digit": digits > 0,
    }


def followed(read: Walk) -> list[Feature]:
    """Which units follow which feature of the text.

    The units, and whether high or low values mean the feature, are chosen on the first half of
    the symbols.  Their AUC is that of the second half.
    """
    values = np.concatenate(read.states, axis=1)
    owners = [
        (layer, unit)
        for layer, states in enumerate(read.states, start=1)
        for unit in range(1, states.shape[1] + 1)
    ]
    features, half = features_of(read.text), len(read.text) // 2
    present = np.array([*features.values()])
    on_first = auc(values[:half], present[:, :half])
    on_second = auc(values[half:], present[:, half:])
    found = []
    for name, row, first, second in zip(features, present, on_first, on_second, strict=True):
        halves = row[:half], row[half:]
        enough = all(ENOUGH <= part.sum() <= len(part) - ENOUGH for part in halves)
        order = np.argsort(-abs(first - 0.5), kind="stable")
        best = order[: TOP if enough else 0]
        units = [_follower(owners[unit], float(first[unit]), float(second[unit])) for unit in best]
        found.append(Feature(name, float(row.mean()), units))
    return sorted(found, key=lambda feature: -feature.units[0].auc if feature.units else 0)


def _follower(owner: tuple[int, int], first: float, second: float) -> Follower:
    if first >= 0.5:
        return Follower(*owner, True, first, second)
    return Follower(*owner, False, 1 - first, 1 - second)


def auc(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """values: (T, U), present: (F, T) -> (F, U): the AUC of each unit for each feature.

    It is the share of the pairs (with the feature, without it) in which the first value is the
    higher one; equal values count one half.  NaN where a feature is always or never present.
    """
    ranks = np.empty(values.shape)  # mean ranks, from 1
    for unit, column in enumerate(values.T):
        _, inverse, counts = np.unique(column, return_inverse=True, return_counts=True)
        ranks[:, unit] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    with_it = present.sum(1, keepdims=True)
    pairs = with_it * (present.shape[1] - with_it)
    above = present.astype(float) @ ranks - with_it * (with_it + 1) / 2
    return np.divide(above, pairs, out=np.full(above.shape, np.nan), where=pairs > 0)


def levels(values: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """(T,) values of a unit -> levels from -3 (low) to 3 (high), and the limits around the median.

    Half of the text has level 0, the values nearest to the median.
    """
    distance = values - np.median(values)
    limits = np.quantile(abs(distance), LEVELS)
    sizes = (abs(distance)[:, None] > limits).sum(1)
    return np.where(distance < 0, -sizes, sizes), limits.tolist()
