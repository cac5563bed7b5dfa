"""Start from a trained model, with the same norms or others."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from gpt.checkpoint import load_model
from gpt.config import Config, load_config
from gpt.errors import ConfigError
from gpt.model import GPT
from gpt.tokenizer import fingerprint, load_tokenizer


@torch.no_grad()
def transplant(model: GPT, cfg: Config, tokens: str) -> str:
    """Give `model` the newest weights of the run `cfg.init["from"]`; a line that says which.

    tokens  the fingerprint of this run's tokenizer

    The model's sizes, its placement and its tokens must be that run's, and without
    `init.swap_norm` its norm as well, else ConfigError. Of norms that are swapped, parameters and
    buffers of the same name and shape (γ, β) are kept and the others start afresh.
    """
    source = Path(cfg.init["from"])
    trained = load_model(source)
    there = load_config(source / "config.yaml")
    for key in ("model", "placement", *(() if cfg.init["swap_norm"] else ("norm",))):
        a, b = (
            c if isinstance(c, dict) else asdict(c)
            for c in (getattr(there, key), getattr(cfg, key))
        )
        differing = [f"{key}.{k}={a.get(k)}" for k in {**a, **b} if a.get(k) != b.get(k)]
        if differing:
            hint = f" or init.swap_norm={cfg.norm['name']}" if key == "norm" else ""
            raise ConfigError(f"init.from={source}: it has {differing[0]}; say so here too{hint}")
    if fingerprint(load_tokenizer(source / "tokenizer.json")) != tokens:
        raise ConfigError(
            f"init.from={source}: its tokens are others; use the same data and tokenizer"
        )
    old, new = trained.state_dict(), model.state_dict()
    kept = {k: v for k, v in old.items() if k in new and new[k].shape == v.shape}
    model.load_state_dict(kept, strict=False)
    fresh = sorted({k.rpartition(".")[2] for k in new.keys() - kept.keys()})
    left = sorted({k.rpartition(".")[2] for k in old.keys() - kept.keys()})
    line = f"starting from {source}: {len(kept)} tensors of it"
    line += f", new {', '.join(fresh)}" * bool(fresh)
    return line + f", without its {', '.join(left)}" * bool(left)
