"""Separate random streams, so that changing one thing changes nothing else.

Two runs that differ only in their norm start from the same shared weights and see the same
batches, since `init`, `data`, `dropout` and `sample` never draw from one another's stream.
"""

from __future__ import annotations

import hashlib


def stream_seed(seed: int, name: str) -> int:
    """The seed in [0, 2⁶³) of the random stream `name`, from the run's `seed`."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
