"""Cutting a text into train, val and test: by position, or by documents."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from fractions import Fraction
from itertools import compress
from zlib import crc32

import numpy as np

from seqlm.errors import UsageError
from seqlm.text.staging import Draft, begins_character

SPLITS = ("train", "val", "test")
HASHES = 1 << 20  # hash values, each of which belongs to one split with all its documents
LINE = re.compile(rb"[^\n]*\n|[^\n]+")


def shares(text: str) -> dict[str, Fraction]:
    """'90,5,5' -> the share of each split; UsageError unless two or three parts make 100."""
    number = r"\s*\d+(\.\d+)?\s*"
    whole = re.fullmatch(f"{number}(,{number})+", text)
    parts = [Fraction(part.strip()) for part in text.split(",")] if whole else []
    if len(parts) not in (2, 3) or sum(parts) != 100 or min(parts) <= 0:
        raise UsageError(
            f"--split {text}: give the percent of train and val, and of test if there is to be "
            "one, 100 in all: 90,5,5."
        )
    return {name: part / 100 for name, part in zip(SPLITS, parts, strict=False)}


def divide(draft: Draft, shares: Mapping[str, Fraction], chars: int | None) -> None:
    """Cut the draft into splits of these shares.

    A stream is cut by position: a share of its `chars` characters, or of its bytes where `chars` is
    None.  Documents may be sorted, so each goes to the split that the hash of its text belongs to.
    """
    if draft.documents != "none":
        _deal(draft, shares)
        return
    done, start = Fraction(0), 0
    for name, share in shares.items():
        done += share
        place = draft.size * done if chars is None else chars * done
        end = _offset(draft, int(place), chars)
        draft.splits[name] = (start, end)
        start = end


def _offset(draft: Draft, place: int, chars: int | None) -> int:
    """The byte offset at which character number `place` begins."""
    if chars is None or chars == draft.size:
        return place
    offset = 0
    for chunk in draft.chunks((0, draft.size)):
        begins = begins_character(chunk)
        count = int(np.count_nonzero(begins))
        if place < count:
            return offset + int(np.flatnonzero(begins)[place])
        place, offset = place - count, offset + len(chunk)
    return offset


def _deal(draft: Draft, shares: Mapping[str, Fraction]) -> None:
    """Give every document to a split by the hash of its text: equal documents share a split.

    Documents keep their order within a split.
    """
    weights = np.zeros(HASHES)
    for hashes, pieces, _ in _hashed(draft):
        np.add.at(weights, hashes, [len(piece) for piece in pieces])
    owner = _owners(weights, list(shares.values()))
    paths = [draft.path.with_name(f"{draft.path.name}-{name}") for name in shares]
    ends: list[list[int]] = [[] for _ in paths]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for hashes, pieces, whole in _hashed(draft):
            owners = owner[hashes]
            for number, file in enumerate(files):
                file.writelines(compress(pieces, owners == number))
                if whole and owners[0] == number:
                    ends[number].append(file.tell())
    draft.become(dict(zip(shares, paths, strict=True)), ends)


def _hashed(draft: Draft) -> Iterator[tuple[np.ndarray, list[bytes], bool]]:
    """Pieces of documents, the hash of each piece's document, and whether a file ends here."""
    if draft.documents == "files":
        start = 0
        for end in draft.file_ends:
            value = 0
            for chunk in draft.chunks((start, end)):
                value = crc32(chunk, value)
            for chunk in draft.chunks((start, end)):
                start += len(chunk)
                yield np.array([value % HASHES]), [chunk], start == end
        return
    begun = None  # the hash of a line that began in an earlier chunk
    for chunk in draft.chunks((0, draft.size)):
        lines = LINE.findall(chunk)
        hashes = np.fromiter(map(crc32, lines), np.int64, len(lines)) % HASHES
        if begun is not None:
            hashes[0] = begun
        begun = None if chunk.endswith(b"\n") else hashes[-1]
        yield hashes, lines, False


def _owners(weights: np.ndarray, shares: list[Fraction]) -> np.ndarray:
    """The number of the split that each hash value belongs to.

    weights: (HASHES,) bytes of the documents with each hash value.  Every split but the first takes
    hash values in order until its share of the bytes, or of the documents, is full.  If each
    document alone is larger than the share, the split takes the smallest one.
    """
    owner = np.zeros(len(weights), dtype=np.int64)
    for number, share in enumerate(map(float, shares[1:]), 1):
        free = np.flatnonzero((weights > 0) & (owner == 0))
        fitting = free[weights[free] <= share * weights.sum()]
        taken = fitting[np.cumsum(weights[fitting]) <= share * weights.sum()]
        taken = taken[: max(1, int(share * np.count_nonzero(weights)))]
        if len(free) and not len(taken):
            taken = free[[np.argmin(weights[free])]]
        owner[taken] = number
    return owner
