"""Tiny configurations for tests, composed once; and functions that read what a run left behind."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import gpt.norms  # noqa: F401
from gpt.config import Config, register_schemas, typed
from gpt.norms.registry import NORMS
from tests.tools.programs import REPO

BUILDABLE = [n for n in NORMS if n != "cuda_layer"]  # tests/gpu and test_kernels test that one
TINY = {
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 32,
    "model.block_size": 32,
    "train.batch_size": 4,
    "train.steps": 6,
    "train.eval_every": 3,
    "train.eval_tokens": 512,
    "train.stats_every": 3,
    "train.checkpoint_every": 2,
    "optim.warmup_steps": 2,
    "tokenizer": "bytes",
    "wandb.mode": "disabled",
    "device": "cpu",
}

register_schemas()


def mostly_long(cases: Iterable[Any], *short: Any) -> list[Any]:
    """Mark cases: `pytest` runs those in `short`, `pytest -m long` runs the rest."""
    return [
        case if case in short else pytest.param(*as_tuple(case), marks=pytest.mark.long)
        for case in cases
    ]


def as_tuple(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)


def overrides(*extra: str, **values: Any) -> list[str]:
    """TINY, changed by `values` and then by `extra`."""
    merged = {**TINY, **values}
    merged.update(arg.split("=", 1) for arg in extra)
    return [f"{key}={value}" for key, value in merged.items()]


def tiny(corpus: Path, *more: str) -> list[str]:
    """TINY on the text `corpus`."""
    return overrides("data=text", f"data.path={corpus}", *more)


def make_config(*extra: str) -> Config:
    """The configuration that `python scripts/train.py` would see."""
    groups = {path.name for path in (REPO / "configs").iterdir()}
    hydra = [a for a in extra if a.partition("=")[0] in groups or a[0] in "+~" or "'" in a]
    values = OmegaConf.from_dotlist([arg for arg in extra if arg not in hydra])
    cfg: Config = typed(OmegaConf.merge(composed(*hydra), values))
    return cfg


@cache  # Hydra takes 0.2 s: it composes each choice of groups once, and values are merged in
def composed(*extra: str) -> DictConfig:
    with initialize_config_dir(str(REPO / "configs"), version_base="1.3"):
        return compose("train", overrides(*extra))


def read_rows(run_dir: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def curve(run_dir: Path) -> list[tuple[Any, ...]]:
    """What two runs must share to the bit: every logged number except the speed."""
    return [
        tuple((k, v) for k, v in row.items() if k != "tokens_per_s") for row in read_rows(run_dir)
    ]
