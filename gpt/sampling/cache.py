"""Generation with a KV cache: each new token reads the keys and values of those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from gpt.common.terminal import warn
from gpt.model import GPT, Block
from gpt.norms.base import norms_of


class KeysAndValues:
    """The keys and values of one attention, (B, nh, T, hs), with room for block_size tokens."""

    def __init__(self, block_size: int) -> None:
        self.block_size, self.length = block_size, 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of new tokens; returns those of all tokens so far."""
        if self.k is None or self.v is None:
            B, nh, _, hs = k.shape
            self.k, self.v = (x.new_empty(B, nh, self.block_size, hs) for x in (k, v))
        past, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, past : self.length] = k
        self.v[:, :, past : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


def cacheable(model: GPT) -> bool:
    """Whether the norms' declarations allow it: in evaluation a token must not depend on others or
    on other samples."""
    return all(
        set(norm.evaluation_axes) <= {"C"} and not norm.batch_stats for norm in norms_of(model)
    )


@contextmanager
def next_logits(model: GPT) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function that gives the logits (B, vocab_size) after the tokens idx (B, T).

    If idx goes on from the last call, only its new tokens are computed. Beyond block_size all
    positions move with every token: the whole window is computed. So it is for a model that cannot
    be cached, by its declarations or because the first cached logits are not those of the whole
    window; then a warning says so.
    """
    attentions = [cast(Block, block).attn for block in model.h]
    caches: list[KeysAndValues] = []
    last = torch.empty(0)
    caching, checked = cacheable(model), False

    def use(own: list[KeysAndValues]) -> None:
        model.past = own[0].length if own else 0
        for i, attention in enumerate(attentions):
            attention.cache = own[i].extend if own else None

    def whole(idx: Tensor) -> Tensor:
        use([])
        return model(idx[:, -model.block_size :])[0][:, -1]

    def logits_after(idx: Tensor) -> Tensor:
        nonlocal caches, caching, checked, last
        T, before, last = idx.shape[1], last, idx
        if not caching or model.block_size < T:
            return whole(idx)
        goes_on = before.shape[-1] < T and torch.equal(idx[:, : before.shape[-1]], before)
        if not (caches and goes_on):
            caches = [KeysAndValues(model.block_size) for _ in attentions]
        use(caches)
        logits = model(idx[:, model.past :])[0][:, -1]
        if model.past and not checked:
            checked, right = True, whole(idx)  # a user's norm may depend on the position
            caching = bool((logits - right).abs().max() <= 1e-3 * right.abs().max() + 1e-6)
            if not caching:
                warn("a norm depends on other tokens or positions: generation without a cache")
            return right
        return logits

    try:
        yield logits_after
    finally:
        use([])
