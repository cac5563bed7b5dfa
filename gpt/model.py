"""GPT-2 with an optional norm at every place where a norm can stand.

The architecture is nanoGPT's (learned positions, fused qkv, tied head), with GPT-2's tanh-GELU and
biases. One equation is new: `Sublayer`. Sizes: B batch, T time, C = n_embd, nh = n_head,
hs = C / nh.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.common.seeds import stream_seed
from gpt.config import ModelConfig

# (site, width) → the norm that stands at a site such as `h.3.attn.in` or `final_norm`; nn.Identity
# for an empty slot.
MakeNorm = Callable[[str, int], nn.Module]


@dataclass(frozen=True)
class BlockPlan:
    """A placement's settings for one block, apart from its norms.

    alpha     α, the weight of the residual stream
    scale     s, the factor on the output of `in`
    parallel  whether attention and MLP run side by side on the same normalised input
    std       of the initial weights: 0.02 (GPT-2), or None for Xavier's √(2 / (fan_in + fan_out))
    gain      factors on these: `q`, `k`, `v`, `o` (attention's output), `fc1`, `fc2` (the MLP's)
    """

    alpha: float = 1.0
    scale: float = 1.0
    parallel: bool = False
    std: float | None = 0.02
    gain: Mapping[str, float] = field(default_factory=dict)


def add_norm(
    norm: nn.Module, x: Tensor, branch: Tensor | None, stays: bool = False
) -> tuple[Tensor, Tensor]:
    """(norm(x + branch), x + branch). A norm that `adds` computes both in one pass over memory.

    stays  whether the norm's output is the residual stream, which keeps its dtype under autocast
    """
    if branch is None:
        return norm(x), x
    if getattr(norm, "adds", False):
        return norm(x, branch, stays)
    x = x + branch
    return norm(x), x


class Sublayer(nn.ModuleDict, ABC):
    """y = after(α·x + out(f(s·in(x)))), with f attention or the MLP: the placement equation.

        x_in = self["in"](x)
        branch = self["out"](self.f(s * x_in))
        x = self["after"](alpha * x + branch)

    `forward` computes these three lines. If `after` is empty it returns the stream as two summands,
    (x, branch), so that the next norm can add and normalise in one pass, see `add_norm`.
    """

    # The places of norms, some of them inside f, and each norm's width in units of C.
    slots: ClassVar[dict[str, int]]

    def __init__(
        self, config: ModelConfig, site: str, make_norm: MakeNorm, plan: BlockPlan
    ) -> None:
        C = config.n_embd
        super().__init__({s: make_norm(f"{site}.{s}", n * C) for s, n in self.slots.items()})
        self.plan, self.dropout = plan, config.dropout

    @abstractmethod
    def f(self, x: Tensor) -> Tensor:
        """Attention or the MLP."""

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x_in, x = add_norm(self["in"], x, branch)
        return self.merge(x, self.branch(x_in))

    def branch(self, x_in: Tensor) -> Tensor:
        """out(f(s·in(x))), given in(x)."""
        return self["out"](self.f(x_in if self.plan.scale == 1 else self.plan.scale * x_in))

    def merge(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor | None]:
        """after(α·x + branch)."""
        x = x if self.plan.alpha == 1 else self.plan.alpha * x
        if isinstance(self["after"], nn.Identity):
            return x, branch
        return add_norm(self["after"], x, branch, stays=True)[0], None


class CausalSelfAttention(Sublayer):
    slots: ClassVar = {"in": 1, "q": 1, "k": 1, "v": 1, "mid": 1, "out": 1, "after": 1}
    # While generating: takes new keys and values, and returns those of all tokens so far.
    cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def __init__(
        self, config: ModelConfig, site: str, make_norm: MakeNorm, plan: BlockPlan
    ) -> None:
        super().__init__(config, site, make_norm, plan)
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def f(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # 3 × (B, T, C)
        q, k, v = (
            norm(t).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
            for norm, t in ((self["q"], q), (self["k"], k), (self["v"], v))
        )
        if self.cache is not None:
            k, v = self.cache(k, v)
        dropout, causal = self.dropout if self.training else 0.0, k.shape[2] == T
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
        y = self.c_proj(self["mid"](y.transpose(1, 2).reshape(B, T, C)))
        return F.dropout(y, self.dropout, self.training)


class MLP(Sublayer):
    slots: ClassVar = {"in": 1, "mid": 4, "out": 1, "after": 1}

    def __init__(
        self, config: ModelConfig, site: str, make_norm: MakeNorm, plan: BlockPlan
    ) -> None:
        super().__init__(config, site, make_norm, plan)
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def f(self, x: Tensor) -> Tensor:
        y = self["mid"](F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class Block(nn.Module):
    def __init__(
        self, config: ModelConfig, site: str, make_norm: MakeNorm, plan: BlockPlan
    ) -> None:
        super().__init__()
        self.parallel = plan.parallel
        self.attn = CausalSelfAttention(config, f"{site}.attn", make_norm, plan)
        self.mlp = MLP(config, f"{site}.mlp", make_norm, plan)

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.parallel:
            return self.mlp(*self.attn(x, branch))
        x_in, x = add_norm(self.attn["in"], x, branch)
        return self.attn.merge(x, self.attn.branch(x_in) + self.mlp.branch(x_in))


class GPT(nn.Module):
    """Token ids (B, T) → logits (B, T, vocab_size), and the mean loss in nats given targets (B, T).

    make_norm  the norm at a site, see `MakeNorm`
    plans      one for each block
    seed       of the initial weights. Each parameter has its own random stream, so that models that
               differ only in their norms share all other weights
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        make_norm: MakeNorm,
        plans: Sequence[BlockPlan],
        seed: int,
    ) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.past = 0  # while generating: the number of tokens before idx that are cached
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.embd_norm = make_norm("embd_norm", config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(
            Block(config, f"h.{i}", make_norm, plan) for i, plan in enumerate(plans)
        )
        self.final_norm = make_norm("final_norm", config.n_embd)  # ln_f in GPT-2
        self.init_weights(plans, seed)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        positions = self.wpe.weight[self.past : self.past + idx.shape[1]]
        x = self.drop(self.embd_norm(self.wte(idx) + positions))  # (B, T, C)
        branch = None
        for block in self.h:
            x, branch = block(x, branch)
        x, _ = add_norm(self.final_norm, x, branch)
        logits = F.linear(x, self.wte.weight)  # (B, T, vocab_size): the head is tied
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def init_weights(self, plans: Sequence[BlockPlan], seed: int) -> None:
        """Embeddings: N(0, 0.02²). Biases: 0. Other weights: as their block's plan says."""

        def init(name: str, module: nn.Linear | nn.Embedding, std: float) -> None:
            generator = torch.Generator().manual_seed(stream_seed(seed, f"init/{name}"))
            module.weight.normal_(0.0, std, generator=generator)

        init("wte", self.wte, 0.02)
        init("wpe", self.wpe, 0.02)
        for i, plan in enumerate(plans):
            for name, parts in (
                ("attn.c_attn", ("q", "k", "v")),
                ("attn.c_proj", ("o",)),
                ("mlp.c_fc", ("fc1",)),
                ("mlp.c_proj", ("fc2",)),
            ):
                linear = self.get_submodule(f"h.{i}.{name}")
                assert isinstance(linear, nn.Linear)
                fans = linear.in_features + linear.out_features // len(parts)
                init(f"h.{i}.{name}", linear, plan.std or math.sqrt(2 / fans))
                for part, weight in zip(parts, linear.weight.chunk(len(parts)), strict=True):
                    weight.mul_(plan.gain.get(part, 1.0))
                linear.bias.zero_()
