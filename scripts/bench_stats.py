"""Measures the cost of statistics: python scripts/bench_stats.py [OVERRIDES]

Steps of the default run with and without statistics alternate (A B A B …). The script prints the
median times, their ratio and the share of training time at train.stats_every. No run is written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from gpt.cli.errors import run
from gpt.common.places import CONFIGS
from gpt.config import register_schemas, typed
from gpt.data.batches import TrainBatches
from gpt.data.tokens import prepare
from gpt.norms.registry import load_module
from gpt.probes.stats import to_numbers
from gpt.training.checkpoint import TrainState
from gpt.training.screen import Screen
from gpt.training.step import update
from gpt.training.trainer import Run, set_up

STEPS = 20


def prepared(overrides: list[str]) -> tuple[Run, TrainState, TrainBatches]:
    """The default run with `overrides`, set up before its first step, without a directory."""
    register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = typed(compose("train", overrides))
    if cfg.norm.get("module"):
        load_module(cfg.norm["module"])
    t, data = cfg.train, prepare(cfg)
    run, state = set_up(cfg, Path(), data, Screen(t.steps, quiet=True))
    ids, block_size = data.train.ids, cfg.model.block_size
    return run, state, TrainBatches(ids, t.batch_size, t.grad_accum, block_size, cfg.seed)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("override", nargs="*", help="an override, as for scripts/train.py")
    run, state, batches = prepared(parser.parse_args().override)
    cfg, every = run.cfg, run.cfg.train.stats_every

    def seconds(collecting: bool) -> float:
        state.step = 0  # every step is step 1, since a run may have fewer steps than STEPS
        start = time.perf_counter()
        row, record = update(cfg, state, state.model, batches, run.device, collecting)
        if collecting:
            to_numbers(record)
        row.loss.item()  # waits for the device
        return time.perf_counter() - start

    seconds(True), seconds(False)
    pairs = [(seconds(False), seconds(True)) for _ in range(STEPS)]
    plain, counted = (statistics.median(times) for times in zip(*pairs, strict=True))
    share = (counted - plain) / (plain * every) if every else 0.0
    print(f"a step: {1e3 * plain:.1f} ms, with statistics {1e3 * counted:.1f} ms")
    print(
        f"ratio {counted / plain:.2f}; {100 * share:.2f}% of the training at stats_every={every} "
        f"on {run.device}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    run(main)
