"""Train a GPT with any norm at any place: python scripts/train.py norm=layer placement=pre

Several runs, with a table at the end: python scripts/train.py -m norm=layer,rms seed=1,2
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from gpt.cli.arguments import refuse_another_name, swap_norm, training_arguments
from gpt.cli.errors import one_line_errors, run
from gpt.cli.sweep import run_sweep, sweep_dir
from gpt.common.errors import ConfigError
from gpt.common.places import CONFIGS
from gpt.config import register_schemas, typed

register_schemas()


@hydra.main(config_path=str(CONFIGS), config_name="train", version_base="1.3")
@one_line_errors
def main(raw: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    if raw.init.get("swap_norm"):
        swap_norm(raw, hydra_config.overrides.task)
    else:
        refuse_another_name(raw, hydra_config.runtime.choices["norm"])
    cfg = typed(raw)
    # Imported after the configuration is checked, because torch takes seconds.
    from gpt.training.trainer import train

    if cfg.norm.get("module"):
        from gpt.norms.registry import load_module

        load_module(cfg.norm["module"])
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    sweep = hydra_config.runtime.choices.get("sweep")
    if sweep and not sweeping:
        raise ConfigError(f"sweep={sweep}: add -m to run it, or leave it out for one run")
    if sweeping:  # on a terminal the sweep's own table shows the progress
        train(cfg, root=Path(hydra_config.sweep.dir), quiet=sys.stdout.isatty())
    else:
        train(cfg)


if __name__ == "__main__":
    sys.argv[1:] = training_arguments(sys.argv[1:])
    folder = sweep_dir(sys.argv[1:])
    if folder is None:
        run(main)
    else:
        run_sweep(main, folder)
