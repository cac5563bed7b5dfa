"""Changes to a command's arguments, before and after Hydra reads them."""

from __future__ import annotations

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from gpt.common.errors import ConfigError
from gpt.common.places import CONFIGS, home
from gpt.config import check_choice, no_interpolation

PATHS = ("run_dir", "data.path", "init.from", "norm.module", "hydra.sweep.dir")


def training_arguments(argv: list[str]) -> list[str]:
    """Prepare train.py's arguments for Hydra: quote paths, put `-m` first (argparse needs that),
    and put `++` before norm options that Hydra does not know."""
    args = [literal(at_home(arg), "norm.module") for arg in argv]
    multirun = {"-m", "--multirun"} & set(args)
    of_another = "norm=module" in args or any(a.startswith("init.swap_norm=") for a in args)
    added = ("norm.",) if of_another else ("norm.module=",)
    args = [f"++{arg}" if arg.startswith(added) else arg for arg in args if arg not in multirun]
    if not multirun:
        args = [literal(arg, "data.path", "run_dir", "init.from") for arg in args]
    return [*multirun, *args]


def at_home(arg: str) -> str:
    """Expand ~ in a path or a list of paths: Hydra's grammar does not allow it."""
    key, _, value = arg.partition("=")
    if key not in PATHS:
        return arg
    quote = value[:1] if value[:1] in ("'", '"') else ""
    return f"{key}={quote}{','.join(map(home, value.removeprefix(quote).split(',')))}"


def literal(arg: str, *keys: str) -> str:
    """Quote `key=any text`, if the key is one of `keys`, so that Hydra reads the text literally.

    Hydra's grammar would trim `prompt=def ` and reject `prompt=f(x, y)`. A value that is already
    quoted for Hydra stays unchanged, and so does `null`, except in a prompt.
    """
    key, _, value = arg.partition("=")
    if key not in keys:
        return arg
    if key != "prompt" and (value in ("", "null") or (value[0] == value[-1] and value[0] in "'\"")):
        return arg
    return f"{key}={QuotedString(no_interpolation(value), Quote.single).with_quotes()}"


def refuse_another_name(raw: DictConfig, choice: str) -> None:
    """ConfigError if `norm=layer` comes with another norm's name, since its options are layer's."""
    name = OmegaConf.select(raw, "norm.name", throw_on_missing=False)
    if choice != "module" and isinstance(name, str) and name != choice:
        own = "norm=module norm.module=FILE norm.name"
        raise ConfigError(
            f"norm={choice} norm.name={name}: the options are those of {choice}; expected "
            f"norm={name}, or for a norm of your own {own}={name}; for several, "
            f"-m {own}={name},{choice}"
        )


def swap_norm(raw: DictConfig, overrides: list[str]) -> None:
    """Replace `norm` by the configuration of the norm that `init.swap_norm` names."""
    name = raw.init.swap_norm
    options = sorted(path.stem for path in (CONFIGS / "norm").glob("*.yaml"))
    keys = [override.lstrip("+").split("=")[0] for override in overrides]
    if "norm.module" in keys and name not in options:
        raise ConfigError(
            f"init.swap_norm={name}: for a norm of your own expected "
            f"init.swap_norm=module norm.module={raw.norm.module} norm.name={name}"
        )
    check_choice("init.swap_norm", str(name), tuple(options))
    if "norm" in keys:
        raise ConfigError(f"init.swap_norm={name} already chooses the norm: leave out norm=…")
    given = {k: raw.norm[k[5:]] for k in keys if k.startswith("norm.")}
    raw.norm = OmegaConf.load(CONFIGS / "norm" / f"{name}.yaml")
    for key, value in given.items():
        OmegaConf.update(raw, key, value, force_add=True)
