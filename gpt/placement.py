"""From a configuration to a model: which norm stands at which site."""

from __future__ import annotations

from torch import nn

from gpt import norms  # noqa: F401  (registers them)
from gpt.config import Config, PlacementConfig
from gpt.errors import ConfigError
from gpt.model import GPT
from gpt.norms.registry import build_norm


def slot(placement: PlacementConfig, site: str) -> bool | str:
    """What the placement puts at `site`: `h.3.attn.in` → placement.attn.in, `head` → head."""
    if site == "head":
        return placement.head
    _, _, part, name = site.split(".")
    return getattr(placement, part).get(name, False)


def build_model(cfg: Config, vocab_size: int) -> GPT:
    """The model that `cfg` describes, with its initial weights."""

    def make_norm(site: str) -> nn.Module:
        match slot(cfg.placement, site):
            case False:
                return nn.Identity()
            case True:
                return build_norm(n_embd=cfg.model.n_embd, **cfg.norm)
            case name:
                try:
                    return build_norm(name, cfg.model.n_embd)
                except ConfigError as error:
                    raise ConfigError(f"placement of {site}: {error}") from error

    return GPT(cfg.model, vocab_size, make_norm, cfg.placement.alpha, cfg.seed)
