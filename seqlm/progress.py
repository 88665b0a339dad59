"""The callback by which long work says how far it has come."""

from collections.abc import Callable

# called now and then with the share that is done, from 0 to 1, and what is being done
OnProgress = Callable[[float, str], None]


def silent(share: float, what: str = "") -> None:
    """Show nothing."""
