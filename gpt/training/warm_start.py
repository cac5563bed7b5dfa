"""Start from a trained model, with its norms or with new ones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gpt.common.errors import ConfigError
from gpt.common.files import flatten, read_json
from gpt.config import Config, load_config
from gpt.data.tokenizer import fingerprint, load_tokenizer
from gpt.model import GPT
from gpt.norms.base import changes, norms_of
from gpt.norms.registry import name_of
from gpt.training.checkpoint import load_model, newest


@torch.no_grad()
def transplant(model: GPT, cfg: Config, tokens: str) -> str:
    """Give `model` the newest weights of the run `cfg.init["from"]`. Returns a line about them.

    tokens  the fingerprint of this run's tokenizer

    Raises ConfigError unless both runs have the same model sizes, placement and tokenizer, and the
    same norm if `init.swap_norm` is not set. A swapped norm takes over parameters of the same name
    and shape (γ, β): their distance from the new norm's initial value is the distance they had from
    the old norm's. All else in it, such as running statistics, starts afresh.
    """
    source = Path(cfg.init["from"])
    trained = load_model(source)
    there = load_config(source / "config.yaml")
    for group in ("model", "placement", *(() if cfg.init["swap_norm"] else ("norm",))):
        a, b = (flatten(as_dict(getattr(c, group)), ".") for c in (there, cfg))
        keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        if keys:
            told = ["name"] if "name" in keys else keys  # the other keys follow from the name
            theirs = " ".join(f"{group}.{key}={a.get(key)}" for key in told)
            hint = f", or init.swap_norm={b['name']} instead" if group == "norm" else ""
            raise ConfigError(f"init.from={source}: it has {theirs}; set that here too{hint}")
    if fingerprint(load_tokenizer(source / "tokenizer.json")) != tokens:
        raise ConfigError(
            f"init.from={source}: it uses a different tokenizer; use the same data and tokenizer"
        )
    old, new = trained.state_dict(), model.state_dict()
    modules = dict(trained.named_modules())
    swapped = {s: m for s, m in model.named_modules() if type(m) is not type(modules.get(s))}
    fresh = {f"{s}.{name}" for s, m in swapped.items() for name, _ in m.named_buffers()}
    kept = {k: v for k, v in old.items() if k in new and new[k].shape == v.shape and k not in fresh}
    for site, norm in swapped.items():
        ends, starts = dict(modules[site].named_parameters()), modules[site].started
        same = {name: name for name, _ in norm.named_parameters()}
        for own, other in {**same, **norm.takes_over}.items():
            if other in ends and ends[other].shape == norm.started[own].shape:
                kept[f"{site}.{own}"] = ends[other] + (norm.started[own] - starts[other])
    model.load_state_dict(kept, strict=False)
    added = sorted({k.rpartition(".")[2] for k in new.keys() - kept.keys()})
    left = sorted({k.rpartition(".")[2] for k in old.keys() - kept.keys()})
    line = f"starting from {source}: {len(old.keys() & kept.keys())} tensors of it"
    if added:
        line += f", new {', '.join(added)}"
    if left:
        line += f", without its {', '.join(left)}"
    again = sorted({name_of(n) for n in norms_of(model) if changes(n)})
    if again:
        line += f"; the schedule of {', '.join(again)} starts again"
    return line


def source_sha256(cfg: Config) -> str | None:
    """SHA-256 of the weights that `transplant` takes; None if there are none, or none any more."""
    folder = newest(Path(cfg.init["from"])) if cfg.init["from"] else None
    return read_json(folder / "manifest.json")["model.safetensors"] if folder else None


def as_dict(group: Any) -> dict[str, Any]:
    """A group of the configuration, without settings that a trained model does not depend on."""
    values = group if isinstance(group, dict) else asdict(group)
    return {k: v for k, v in values.items() if k not in ("dropout", "init", "xavier", "module")}
