"""GPT-2 with a norm, or none, at every place where a norm can stand.

The shape of the model is nanoGPT's: learned positions, fused qkv, tanh-GELU, tied head. What is
new is one equation, `Sublayer`. Sizes: B batch, T time, C = n_embd, nh = n_head, hs = C / nh.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.seeds import stream_seed

# The norm at a site such as `h.3.attn.in` or `head`; nn.Identity where the slot is empty.
MakeNorm = Callable[[str], nn.Module]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 × (B, nh, T, hs)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(y, self.dropout, self.training)


class Sublayer(nn.ModuleDict):
    """y = after(α·x + out(f(in(x)))), f being attention or the MLP: the placement equation."""

    def __init__(self, site: str, f: nn.Module, make_norm: MakeNorm, alpha: float) -> None:
        norms = {slot: make_norm(f"{site}.{slot}") for slot in ("in", "out", "after")}
        super().__init__({"f": f, **norms})
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        branch = self["out"](self["f"](self["in"](x)))
        return self["after"](torch.add(branch, x, alpha=self.alpha))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, site: str, make_norm: MakeNorm, alpha: float) -> None:
        super().__init__()
        self.attn = Sublayer(f"{site}.attn", CausalSelfAttention(config), make_norm, alpha)
        self.mlp = Sublayer(f"{site}.mlp", MLP(config), make_norm, alpha)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))


class GPT(nn.Module):
    """Token ids (B, T) → logits (B, T, vocab_size), and the mean loss in nats given targets (B, T).

    make_norm  the norm at a site, see `MakeNorm`
    alpha      α of the placement equation
    seed       of the initial weights: each parameter has a stream of its own, so that models that
               differ in their norms share all other weights
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        make_norm: MakeNorm,
        alpha: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(
            Block(config, f"h.{i}", make_norm, alpha) for i in range(config.n_layer)
        )
        self.head = make_norm("head")  # the norm before the output head, whose weight is wte's
        self.init_weights(seed)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        T = idx.shape[1]
        x = self.drop(self.wte(idx) + self.wpe.weight[:T])  # (B, T, C)
        for block in self.h:
            x = block(x)
        logits = F.linear(self.head(x), self.wte.weight)  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def streams(self) -> dict[str, nn.Module]:
        """The modules whose output is the residual stream, by depth."""
        return {"embd": self.drop, **{f"h.{i}": block for i, block in enumerate(self.h)}}

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's: N(0, 0.02²), on residual projections N(0, 0.02²/2L), biases 0."""
        residual_std = 0.02 / math.sqrt(2 * len(self.h))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                generator = torch.Generator().manual_seed(stream_seed(seed, f"init/{name}"))
                std = residual_std if name.endswith("c_proj") else 0.02
                module.weight.normal_(0.0, std, generator=generator)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
