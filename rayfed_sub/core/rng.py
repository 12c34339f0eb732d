"""Random streams by purpose: every draw in the system comes from hash(seed, purpose).

numpy's Philox gives the same numbers on every processor (torch's generators do not), and a stream named by
its purpose does not care who draws first, on which worker, or whether the run was resumed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def stream(seed: int, *purpose: int | str) -> np.random.Generator:
    """The generator for one purpose, e.g. `stream(seed, "batches", client, epoch)`.

    The key is the first 128 bits of SHA-256 over the seed and the purpose.

    >>> float(stream(0, "a").random()) == float(stream(0, "a").random())
    True
    >>> float(stream(0, "a", 1).random()) == float(stream(0, "a", 2).random())
    False
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it code that is not ours draws what this seed gives, from torch's, numpy's and Python's own generators,
    which go on afterwards as if it had drawn nothing.

    >>> with seeded(7): first = random.random()
    >>> with seeded(7): print(random.random() == first)
    True
    """
    import torch

    state, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(legacy)
