"""Batches: the windows of a token file that training and validation see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpt.common.processes import share
from gpt.common.seeds import stream_seed


def windows(ids: np.ndarray, starts: np.ndarray, block_size: int) -> Tensor:
    """The windows of block_size + 1 tokens from each start, int64 (len(starts), block_size + 1)."""
    return torch.from_numpy(ids[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))


def to_device(window: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Windows as inputs and targets, each (B, T), on `device`."""
    if device.type == "cuda":  # a copy from pinned memory is asynchronous
        window = window.pin_memory().to(device, non_blocking=True)
    else:
        window = window.to(device)
    return window[:, :-1], window[:, 1:]


@dataclass(frozen=True)
class TrainBatches:
    """Random windows, chosen by the seed and the step alone. Runs with equal seeds see equal
    batches, and a resumed run needs only its step."""

    ids: np.ndarray
    batch_size: int
    grad_accum: int
    block_size: int
    seed: int

    def at(self, step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The grad_accum micro-batches of `step`: inputs and targets, each (B, T).

        Each process gets an equal share of every micro-batch.
        """
        rng = np.random.default_rng([stream_seed(self.seed, "data"), step])
        starts = rng.integers(
            len(self.ids) - self.block_size, size=self.grad_accum * self.batch_size
        )
        for micro in starts.reshape(self.grad_accum, self.batch_size):
            yield to_device(windows(self.ids, share(micro), self.block_size), device)


@dataclass(frozen=True)
class ValBatches:
    """Disjoint windows, at most max_tokens in all, evenly spread over the split: a fixed set."""

    ids: np.ndarray
    batch_size: int
    block_size: int
    max_tokens: int

    def starts(self) -> np.ndarray:
        available = (len(self.ids) - 1) // self.block_size
        count = max(1, min(available, self.max_tokens // self.block_size))
        return np.linspace(0, available - 1, count).astype(np.int64) * self.block_size

    def on(self, device: torch.device, equal: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets, each (B, T). `equal` drops a last batch of fewer windows."""
        starts = self.starts()
        if equal:
            starts = starts[: len(starts) // self.batch_size * self.batch_size]
        for i in range(0, len(starts), self.batch_size):
            yield to_device(
                windows(self.ids, starts[i : i + self.batch_size], self.block_size), device
            )
