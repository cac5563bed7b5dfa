"""L2 norm: projects each token onto the unit sphere."""

from __future__ import annotations

from torch import Tensor

from gpt.norms.base import Norm, check_at_least, wide
from gpt.norms.registry import register


@register("l2")
class L2Norm(Norm):
    """y = x/max(‖x‖, ε) over C, no parameters.  (B, T, C) → (B, T, C)

    n_embd  C, not used
    eps     ε > 0; a row of zeros stays a row of zeros

    Use it to see a norm without γ. Its features are √C times smaller than LayerNorm's, so the next
    weights must compensate.
    Loshchilov, Hsieh, Sun, Ginsburg 2024 (nGPT), arXiv:2410.01131.
    """

    axes = ("C",)
    invariances = ("scale",)

    def __init__(self, n_embd: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        check_at_least(1e-30, eps=eps)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = wide(x)
        return (x32 / x32.norm(dim=-1, keepdim=True).clamp_min(self.eps)).to(x.dtype)
