"""Train a GPT with any norm at any place: python scripts/train.py norm=layer placement=pre

Several at once, a table at the end: python scripts/train.py -m norm=layer,rms seed=1,2
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from gpt import cli
from gpt.config import check_choice, register_schemas, typed
from gpt.errors import ConfigError
from gpt.sweep import count_cells, live_table, refuse_sweep, show_results, sweep_dir

register_schemas()


@hydra.main(config_path=str(cli.CONFIGS), config_name="train", version_base="1.3")
@cli.one_line_errors
def main(raw: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    if raw.init.get("swap_norm"):
        swap_norm(raw, hydra_config.overrides.task)
    else:
        refuse_another_name(raw, hydra_config.runtime.choices["norm"])
    cfg = typed(raw)
    from gpt.trainer import train  # after the configuration is checked: torch takes seconds

    if cfg.norm.get("module"):
        from gpt.norms.registry import load_module

        load_module(cfg.norm["module"])
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    sweep = hydra_config.runtime.choices.get("sweep")
    if sweep and not sweeping:
        raise ConfigError(f"sweep={sweep}: add -m to run its cells, or leave it out for one run")
    if sweeping:  # on a terminal the sweep's own table shows how far its cells are
        train(cfg, root=Path(hydra_config.sweep.dir), quiet=sys.stdout.isatty())
    else:
        train(cfg)


def refuse_another_name(raw: DictConfig, choice: str) -> None:
    """ConfigError if `norm=layer` comes with the name of another norm: its options are layer's."""
    name = OmegaConf.select(raw, "norm.name", throw_on_missing=False)
    if choice != "module" and isinstance(name, str) and name != choice:
        own = "norm=module norm.module=FILE norm.name"
        raise ConfigError(
            f"norm={choice} norm.name={name}: the options are those of {choice}; expected "
            f"norm={name}, or for a norm of your own {own}={name}; for several, "
            f"-m {own}={name},{choice}"
        )


def swap_norm(raw: DictConfig, overrides: list[str]) -> None:
    """Put the configuration of the norm `init.swap_norm` in the place of `norm`'s."""
    name = raw.init.swap_norm
    options = sorted(path.stem for path in (cli.CONFIGS / "norm").glob("*.yaml"))
    keys = [override.lstrip("+").split("=")[0] for override in overrides]
    if "norm.module" in keys and name not in options:
        raise ConfigError(
            f"init.swap_norm={name}: for a norm of your own expected "
            f"init.swap_norm=module norm.module={raw.norm.module} norm.name={name}"
        )
    check_choice("init.swap_norm", name, tuple(options))
    if "norm" in keys:
        raise ConfigError(f"init.swap_norm={name} says which norm: leave out norm=… beside it")
    given = {k: raw.norm[k[5:]] for k in keys if k.startswith("norm.")}
    raw.norm = OmegaConf.load(cli.CONFIGS / "norm" / f"{name}.yaml")
    for key, value in given.items():
        OmegaConf.update(raw, key, value, force_add=True)


if __name__ == "__main__":
    args = [cli.literal(arg, "norm.module") for arg in sys.argv[1:]]
    multirun = {"-m", "--multirun"} & set(args)
    # Of these norms Hydra does not know the options: they may be added to what the yaml has.
    of_another = "norm=module" in args or any(a.startswith("init.swap_norm=") for a in args)
    added = ("norm.",) if of_another else ("norm.module=",)
    args = [f"++{arg}" if arg.startswith(added) else arg for arg in args if arg not in multirun]
    sys.argv[1:] = [*multirun, *args]  # argparse wants the flag first
    folder = sweep_dir(sys.argv[1:])
    if folder is None:
        sys.argv[1:] = [
            cli.literal(arg, "data.path", "run_dir", "init.from") for arg in sys.argv[1:]
        ]
        cli.run(main)
    else:
        cli.run(partial(refuse_sweep, sys.argv[1:]))
        total = count_cells(sys.argv[1:])
        shared = any(arg.startswith("hydra.sweep.dir=") for arg in sys.argv)  # with other commands
        sys.argv.append(f"hydra.sweep.dir={folder}")
        try:
            with live_table(folder, total):
                cli.run(main)
        finally:
            cli.run(partial(show_results, folder, None if shared else total))
