"""Random choices that leave each other alone.

Each has a generator of its own, seeded by a whole number and the name of its purpose. So no switch of a method, which
adds or leaves out a part or a draw, changes what the others get: two variants differ in what their settings say alone.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch


def seed_of(seed: int, *purpose: str | int) -> int:
    """The seed of one purpose; another purpose has another, unrelated one.

    Examples
    --------
    >>> from vitad.randomness import seed_of
    >>> seed_of(0, "order", "stage1", 3) == seed_of(0, "order", "stage1", 3) != seed_of(0, "order", "stage1", 4)
    True
    """
    hashed = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return int.from_bytes(hashed[:8], "big")


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator for the random choices of one purpose, on the CPU, so that every device has the same ones."""
    return torch.Generator().manual_seed(seed_of(seed, *purpose))


@lru_cache
def fixed_order(n: int) -> torch.Tensor:
    """(n,) the whole numbers below n, shuffled in one way for good: for scores, which have to repeat."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def next_seed(random: torch.Generator | None = None) -> int:
    """A seed from torch's state: the same after the same `torch.manual_seed`, another one at the next call.

    From a generator: what torch's state would give after the same `manual_seed`.
    """
    return int(torch.randint(2**63 - 1, (), device="cpu", generator=random))


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Within, torch's state on the CPU is that of one purpose, as for the weights of a part; afterwards as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, *purpose))
        yield
