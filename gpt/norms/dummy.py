"""DummyLayerNorm: the identity, with LayerNorm's signature."""

from __future__ import annotations

from torch import Tensor

from gpt.norms.base import Norm
from gpt.norms.registry import register


@register("dummy")
class DummyLayerNorm(Norm):
    """y = x.  (B, T, C) → (B, T, C), no parameters; `n_embd` and `eps` are accepted and ignored.

    Use it to see how training goes without a norm. Do not use it at a high learning rate.
    A placeholder: Raschka, Build a Large Language Model (From Scratch), 2024, chapter 4.
    """

    axes = ()

    def __init__(self, n_embd: int, *, eps: float = 1e-5) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x
