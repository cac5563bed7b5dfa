"""Dynamic erf: Dynamic Tanh with the error function and a learned shift."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt.norms.base import Norm
from gpt.norms.registry import register


@register("derf")
class DynamicErf(Norm):
    """y = γ erf(α x + s) + β, scalars α and s, γ and β per feature.  (B, T, C) → (B, T, C)

    n_embd  C
    alpha   initial α
    shift   initial s

    Use it like `dyt`; its authors report better results than with `dyt`.
    Chen, Lu, Zhu, Sun, Liu 2025, arXiv:2512.10938.
    """

    axes = ()

    def __init__(self, n_embd: int, *, alpha: float = 0.5, shift: float = 0.0) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([alpha]))
        self.shift = nn.Parameter(torch.tensor([shift]))
        self.weight = nn.Parameter(torch.ones(n_embd))  # γ
        self.bias = nn.Parameter(torch.zeros(n_embd))  # β

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * torch.erf(self.alpha * x + self.shift) + self.bias).to(x.dtype)

    @torch.no_grad()
    def statistics(self, x: Tensor) -> dict[str, Tensor]:
        """The share of x with |erf(α x + s)| > 0.95."""
        flat = (torch.erf(self.alpha * x + self.shift).abs() > 0.95).float().mean()
        return {"saturation": flat}
