"""ScaleNorm: each token on a sphere, one learned radius for all features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt.norms.base import Norm, check_at_least, wide
from gpt.norms.registry import register


@register("scale")
class ScaleNorm(Norm):
    """y = g x/max(‖x‖, ε) over C, one number g, √C at first.  (B, T, C) → (B, T, C)

    RMSNorm with one γ for all features: g = γ √C.

    n_embd  C
    eps     ε > 0, so that a row of zeros stays one

    Use it where parameters must be few, or a token's length in all must be one number.
    Nguyen, Salazar 2019, arXiv:1910.05895.
    """

    axes = ("C",)
    invariances = ("scale",)

    def __init__(self, n_embd: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        check_at_least(1e-30, eps=eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.tensor([n_embd**0.5]))  # g

    def forward(self, x: Tensor) -> Tensor:
        x32 = wide(x)
        length = x32.norm(dim=-1, keepdim=True).clamp_min(self.eps)
        return (self.weight * x32 / length).to(x.dtype)
