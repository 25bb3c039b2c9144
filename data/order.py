"""Which example stands at which position of an endless stream: by a seed and the position alone."""

from collections.abc import Sequence

import numpy as np

BLOCK = 1024  # positions whose sources are drawn at once


class EpochOrder:
    """position -> index: epochs of `size` examples, each a permutation drawn from (seed, epoch).

    size 0: endless, as they come. `source`: a number that other orders of the seed do not have.
    """

    def __init__(self, size: int, seed: int, source: int = 0):
        self.size, self.seed, self.source, self.epoch = size, seed, source, -1
        self.permutation = np.empty(0, int)

    def __call__(self, position: int) -> int:
        if not self.size:
            return position
        epoch, offset = divmod(position, self.size)
        if epoch != self.epoch:
            # a 0 at the end of what seeds a generator changes nothing
            generator = np.random.default_rng([self.seed, epoch, self.source])
            self.epoch, self.permutation = epoch, generator.permutation(self.size)
        return int(self.permutation[offset])


class MixedOrder:
    """position -> index of several sources, whose examples stand one source after the other.

    The source of a position is drawn by the weights, from (seed, block of positions). Each source
    is gone through in epochs of its own, as often as its weight asks for.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        self.seed = seed
        self.starts = np.cumsum([0, *sizes])[:-1]
        self.orders = [EpochOrder(size, seed, n) for n, size in enumerate(sizes)]
        self.bounds = (np.cumsum(weights) / np.sum(weights))[:-1]
        self.counts = [np.zeros(len(sizes), int)]  # how often each was drawn before a block
        self.block, self.sources = 0, self._draw(0)

    def __call__(self, position: int) -> int:
        block, offset = divmod(position, BLOCK)
        while len(self.counts) <= block:
            drawn = np.bincount(self._draw(len(self.counts) - 1), minlength=len(self.orders))
            self.counts.append(self.counts[-1] + drawn)
        if block != self.block:
            self.block, self.sources = block, self._draw(block)
        source = self.sources[offset]
        before = np.count_nonzero(self.sources[:offset] == source)
        number = self.orders[source](int(self.counts[block][source] + before))
        return int(self.starts[source]) + number

    def _draw(self, block: int) -> np.ndarray:
        """The sources of a block's positions."""
        generator = np.random.default_rng([self.seed, block, 0, 1])
        return np.searchsorted(self.bounds, generator.random(BLOCK), side="right")
