"""Words for failures: everything a user can cause, with the exit code it ends in.

SeqlmError          1  any failure below
|- PeerLost         1  another process of the same training that is gone
|- UsageError       2  an unknown name, option, key or metric; a value out of range; an existing run
|- InputError       3  a file, corpus, run or character that is missing, damaged or unknown
`- Diverged         4  training that stopped being finite

A message says in one sentence what was given and what is right, and in another what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SeqlmError(Exception):
    exit_code = 1


class PeerLost(SeqlmError):
    """Another process of the same training ended or does not answer."""


class UsageError(SeqlmError):
    exit_code = 2


class InputError(SeqlmError):
    exit_code = 3


class Diverged(SeqlmError):
    exit_code = 4


class ShapeError(SeqlmError):
    """Tensors given to an op whose shapes do not go together."""


def unknown(kind: str, given: str, known: Iterable[str], remedy: str = "") -> UsageError:
    """The error for a name that does not exist: suggests the nearest and lists the rest."""
    known = list(known)
    near = get_close_matches(given, known, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return UsageError(f"Unknown {kind} '{given}'. {hint}{remedy or 'Known: ' + ', '.join(known)}.")
