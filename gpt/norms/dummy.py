"""DummyLayerNorm: nothing, with LayerNorm's signature."""

from __future__ import annotations

from torch import Tensor, nn

from gpt.norms.registry import register


@register("dummy")
class DummyLayerNorm(nn.Module):
    """y = x.  (B, T, C) → (B, T, C), no parameters; `n_embd` and `eps` are taken and not used.

    The placeholder of Raschka, Build a Large Language Model (From Scratch), 2024, chapter 4: it
    shows what training is like without a norm.
    """

    axes = ()
    causal_in_training = True
    batch_independent = True

    def __init__(self, n_embd: int, *, eps: float = 1e-5) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x
