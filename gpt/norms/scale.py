"""ScaleNorm: projects each token onto a sphere with one learned radius."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt.norms.base import Norm, check_at_least, wide
from gpt.norms.registry import register


@register("scale")
class ScaleNorm(Norm):
    """y = g x/max(‖x‖, ε) over C, a learned scalar g, initially √C.  (B, T, C) → (B, T, C)

    RMSNorm with one γ for all features: g = γ √C.

    n_embd  C
    eps     ε > 0; a row of zeros stays a row of zeros

    Use it if parameters must be few, or if all tokens must have the same length.
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
