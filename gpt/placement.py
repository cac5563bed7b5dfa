"""Builds the model of a configuration: chooses the norm at each site and each block's plan."""

from __future__ import annotations

import torch
from torch import nn

from gpt import norms  # noqa: F401  (registers them)
from gpt.common.errors import ConfigError
from gpt.common.seeds import stream_seed
from gpt.config import Config, PlacementConfig
from gpt.model import GPT, BlockPlan
from gpt.norms.base import norms_of
from gpt.norms.registry import build_norm, name_of, sizes


def slot(placement: PlacementConfig, site: str, n_layer: int) -> bool | str:
    """The slot at `site`, for n_layer blocks: `h.3.attn.in` is placement.attn.in in block 4."""
    if site in ("embd_norm", "final_norm"):
        return placement.value(site, 1, n_layer, bool, str)
    _, i, part, name = site.split(".")
    return placement.value(f"{part}.{name}", int(i) + 1, n_layer, bool, str)


def block_plan(placement: PlacementConfig, l: int, L: int) -> BlockPlan:  # noqa: E741
    """The plan of block `l` of `L`, counted from 1."""

    def number(key: str) -> float:
        return float(placement.value(key, l, L, float))

    gain = {weight: number(f"init.{weight}") for weight in placement.init}
    std = None if placement.xavier else 0.02
    return BlockPlan(number("alpha"), number("scale"), placement.parallel, std, gain)


def build_model(cfg: Config, vocab_size: int) -> GPT:
    """The model that `cfg` describes, with its initial weights."""
    L = cfg.model.n_layer

    def make_norm(site: str, width: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # a user's norm may draw initial weights
            torch.default_generator.manual_seed(stream_seed(cfg.seed, f"init/{site}"))
            return norm_at(site, width)

    def norm_at(site: str, width: int) -> nn.Module:
        name = slot(cfg.placement, site, L)
        if name is False:
            return nn.Identity()
        if name is True or name == cfg.norm["name"]:
            return build_norm(n_embd=width, **cfg.norm)
        try:
            return build_norm(name, width, **sizes(name, cfg.model.block_size))
        except ConfigError as error:
            raise ConfigError(f"placement of {site}: {error}") from error

    plans = [block_plan(cfg.placement, l, L) for l in range(1, L + 1)]  # noqa: E741
    return GPT(cfg.model, vocab_size, make_norm, plans, cfg.seed)


def refuse_single_values(model: GPT, cfg: Config) -> None:
    """ConfigError if a norm would take the variance of one value, which is 0."""
    sizes = {"B": cfg.train.batch_size, "T": cfg.model.block_size}
    keys = {"B": "train.batch_size", "T": "model.block_size"}
    for norm in norms_of(model):
        over = [axis for axis in norm.axes if axis in sizes]
        if over and all(sizes[axis] == 1 for axis in over):
            larger = " or ".join(keys[axis] for axis in over)
            raise ConfigError(
                f"norm={name_of(norm)}: one value per feature has variance 0; raise {larger}"
            )
