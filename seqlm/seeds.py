"""Random seeds.  A seed depends only on its purpose, so no generator state has to be saved."""

import hashlib
from numbers import Integral


def derived_seed(*parts: object) -> int:
    """A seed in 0 .. 2^63 - 1 from parts such as (seed, "batch", step), as Python prints them."""
    parts = tuple(int(part) if isinstance(part, Integral) else part for part in parts)  # numpy's
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
