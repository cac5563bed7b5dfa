"""RMSNorm: divides each token by the root mean square of its features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gpt.norms.base import Norm, check_at_least, wide
from gpt.norms.registry import register


def rms_norm(x: Tensor, weight: Tensor, eps: float, n_seen: int | None = None) -> Tensor:
    """γ x/√(mean x² + ε), the mean over the first `n_seen` features or all, in fp32 or wider."""
    x32 = wide(x)
    seen = x32[..., :n_seen]
    length = torch.linalg.vector_norm(seen, dim=-1, keepdim=True)  # one kernel; x² would be three
    return (x32 * torch.rsqrt(length.square() / seen.shape[-1] + eps) * weight).to(x.dtype)


@register("rms")
class RMSNorm(Norm):
    """y = γ x/√(mean x² + ε) over C, in fp32 or wider.  (B, T, C) → (B, T, C)

    It subtracts no mean and has no β, hence half of LayerNorm's parameters.

    n_embd   C
    eps      ε ≥ 0
    partial  in (0, 1]; the mean runs over the first ⌈partial·C⌉ features (pRMSNorm)

    Use it in place of LayerNorm: it has fewer operations and is rarely worse. It is not faster
    here, because torch fuses LayerNorm on the CPU. Do not use it if a feature's offset matters.
    Zhang, Sennrich 2019, arXiv:1910.07467.
    """

    axes = ("C",)
    invariances = ("scale",)

    def __init__(self, n_embd: int, *, eps: float = 1e-5, partial: float = 1.0) -> None:
        super().__init__()
        check_at_least(0, eps=eps)
        if not 0 < partial <= 1:
            raise ValueError(f"norm.partial={partial}: expected a number in (0, 1]")
        self.eps, self.n_seen = eps, math.ceil(round(partial * n_embd, 6))
        self.weight = nn.Parameter(torch.ones(n_embd))  # γ

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.n_seen)
