"""Random seeds, each a function of what it is for: no generator state has to be saved."""

import hashlib


def derived_seed(*parts: object) -> int:
    """A seed in 0 .. 2^63 - 1, a function of how Python prints the parts: (seed, "batch", step)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
