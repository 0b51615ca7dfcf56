"""How much memory a backward needs kept for it: what autograd saves, each storage once, weights left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class Activations:
    """The most bytes kept for a backward so far.

    Measured whenever a call keeps more tokens than any before it; a smaller one cannot be the peak, and is not
    slowed down by being watched.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        self.peak_bytes = 0
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self._most_tokens = 0
        self._kept: dict[int, int] = {}  # address of a storage → its bytes

    @contextmanager
    def of_call(self, tokens: int) -> Iterator[None]:
        """Watch a call that keeps at most so many tokens at a time."""
        if tokens <= self._most_tokens:
            yield
            return
        self._kept.clear()  # a call that failed may have left what it kept
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield
        self._most_tokens = tokens
        self.let_go()

    def let_go(self) -> None:
        """What was kept so far has been used by a backward."""
        self.peak_bytes = max(self.peak_bytes, sum(self._kept.values()))
        self._kept.clear()

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor
