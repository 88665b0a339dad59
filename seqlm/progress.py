"""The callback for the progress of long work."""

from collections.abc import Callable

# gets the share of the work that is done, from 0 to 1, and a text about it
OnProgress = Callable[[float, str], None]


def silent(share: float, what: str = "") -> None:
    """Show nothing."""
