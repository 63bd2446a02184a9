"""Named random streams: one scenario seed, one independent generator per purpose."""

import hashlib

import numpy as np

WIDEST = 3.0  # standard deviations from the middle beyond which nothing is drawn, or reckoned with


def stream_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream `names` of the scenario seed, stable across versions, platforms and processes."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """An independent generator for one purpose, e.g. `stream(0, "sample", 3)`.

    Two purposes never share draws, so adding a consumer changes nobody else's numbers.
    """
    return np.random.default_rng(stream_seed(seed, *names))
