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
    hint = did_you_mean(nearest(name, known))
    return UsageError(f"Unknown {kind} '{name}'. {hint}{remedy or 'Known: ' + ', '.join(known)}.")


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """The known names that are most like a name; if none is, those that begin with it."""
    known = list(known)
    like = get_close_matches(name, known, n=most)
    return like or [other for other in known if name and other.startswith(name)][:most]


def did_you_mean(names: Iterable[str]) -> str:
    """A question about names, for an error; '' for none."""
    listed = " or ".join(f"'{name}'" for name in names)
    return f"Did you mean {listed}? " if listed else ""


def not_utf8(
    name: str, error: UnicodeDecodeError, remedy: str = "Convert it to UTF-8."
) -> InputError:
    """The error for bytes that are not UTF-8.  name: of the text or its file."""
    byte = error.object[error.start]
    return InputError(f"{name} is not UTF-8: byte 0x{byte:02x} at offset {error.start:,}. {remedy}")


def not_finite() -> SeqlmError:
    """The error for a model whose logits are not finite."""
    return SeqlmError("The model's weights are not finite. Choose another step with --step.")
