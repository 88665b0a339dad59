"""The errors that a user can cause, and the exit code of each.

SeqlmError          1  any failure that is none of the following
|- PeerLost         1  another process of the same training has ended
|- UsageError       2  an unknown name, option, key or metric; a value out of range; an existing run
|- InputError       3  a file, corpus, run or character that is missing, damaged or unknown
|  `- NotFound      3  the corpus of a run is not there, or is another one
`- Diverged         4  training whose loss or gradient is no longer finite

A message says what was given, what is right, and what to do.
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


class NotFound(InputError):
    """The corpus of a run is not there, or is another one."""


class Diverged(SeqlmError):
    exit_code = 4


class ShapeError(SeqlmError):
    """An op got tensors whose shapes do not fit together."""


def unknown(kind: str, name: str, known: Iterable[str], remedy: str = "") -> UsageError:
    """The error for an unknown name.  It suggests the nearest known name, and lists all of them."""
    known = list(known)
    near = get_close_matches(name, known, n=1) or [k for k in known if name and k.startswith(name)]
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return UsageError(f"Unknown {kind} '{name}'. {hint}{remedy or 'Known: ' + ', '.join(known)}.")


def not_finite() -> SeqlmError:
    """The error for a model whose logits are not finite."""
    return SeqlmError("The model's weights are not finite. Choose another step with --step.")
