"""The schema: every key of `configs/train.yaml` and `configs/sample.yaml`, its type and its range.

Hydra merges yaml files and overrides into these dataclasses, and thereby refuses wrong names and
types. `__post_init__` refuses invalid values. A `Config` never changes after it is made.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt.common.errors import ConfigError, DataError, nearest
from gpt.common.files import flatten, write_atomically
from gpt.common.places import CONFIGS, home
from gpt.formula import calculate

ATTN_SLOTS = ("in", "q", "k", "v", "mid", "out", "after")
MLP_SLOTS = ("in", "mid", "out", "after")
INIT = ("from", "swap_norm")
WEIGHTS = ("q", "k", "v", "o", "fc1", "fc2")
TOKENIZERS = ("bpe", "bytes", "gpt2")
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)  # what a damaged yaml file raises


def check(ok: bool, key: str, got: Any, expected: str) -> None:
    """Raise the one-line error for `key` unless `ok`."""
    if not ok:
        raise ConfigError(f"{key}={got}: expected {expected}")


def check_choice(key: str, got: str, options: tuple[str, ...]) -> None:
    """Raise the one-line error, with the nearest match, unless `got` is one of `options`."""
    if got not in options:
        raise ConfigError(f"{key}={got}: expected {' | '.join(options)}{nearest(got, options)}")


def check_positive(prefix: str, values: dict[str, int]) -> None:
    for key, value in values.items():
        check(value >= 1, f"{prefix}.{key}", value, "an integer >= 1")


@dataclass
class ModelConfig:
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    block_size: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for key, most in (
            ("n_layer", 10_000), ("n_head", 10_000), ("n_embd", 1 << 20), ("block_size", 1 << 24),
        ):  # fmt: skip
            value = getattr(self, key)
            check(1 <= value <= most, f"model.{key}", value, f"an integer from 1 to {most:,}")
        check(
            self.n_embd % self.n_head == 0,
            "model.n_embd",
            self.n_embd,
            f"a multiple of model.n_head={self.n_head}",
        )
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "a number in [0, 1)")


@dataclass
class PlacementConfig:
    """Which slots of y = after(α·x + out(f(s·in(x)))) hold a norm in each block; other settings.

    A slot is false (empty), true (the run's norm), the name of another norm, or a formula in l and
    L that gives one of these for each block, see `gpt/formula.py`. `embd_norm` and `final_norm` are
    slots too, with l = 1. Slots inside f: `q`, `k`, `v` (attention's, over all C features at once)
    and `mid` (before the output projection).

    alpha, scale  α and s, numbers or formulas
    parallel      x + attention(in(x)) + mlp(in(x)), with attention's `in` for both
    init          factors on the initial weights `q k v o fc1 fc2`, numbers or formulas
    xavier        use Xavier's standard deviation for the initial weights, not GPT-2's 0.02
    """

    name: str = MISSING
    attn: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(ATTN_SLOTS, False))
    mlp: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(MLP_SLOTS, False))
    embd_norm: Any = False
    final_norm: Any = False
    alpha: Any = 1.0
    scale: Any = 1.0
    parallel: bool = False
    init: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(WEIGHTS, 1.0))
    xavier: bool = False

    def __post_init__(self) -> None:
        for group, known in (("attn", ATTN_SLOTS), ("mlp", MLP_SLOTS), ("init", WEIGHTS)):
            for key in getattr(self, group):
                check_choice(f"placement.{group}", key, known)
        if self.parallel and (self.mlp.get("in") or self.mlp.get("after")):
            raise ConfigError(
                "placement.parallel=true: the MLP shares attention's `in` and `after`; "
                "set placement.mlp.in=false placement.mlp.after=false"
            )

    def check_formulas(self, L: int) -> None:
        """ConfigError if a slot or a number has an invalid value in any of the L blocks."""
        slots = [f"{group}.{key}" for group in ("attn", "mlp") for key in getattr(self, group)]
        numbers = ["alpha", "scale", *(f"init.{key}" for key in self.init)]
        for l in range(1, L + 1):  # noqa: E741
            for key in ("embd_norm", "final_norm", *slots):
                self.value(key, l, L, bool, str)
            for key in numbers:
                self.value(key, l, L, float)

    def value(self, key: str, l: int, L: int, *types: type) -> Any:  # noqa: E741
        """The value of `alpha` or `attn.in` in block `l` of `L`, which must be one of `types`."""
        group, _, name = key.rpartition(".")
        formula = getattr(self, group)[name] if group else getattr(self, key)
        expected = "a finite number" if types == (float,) else "true, false or a norm's name"
        expected += ", or a formula in l and L"
        try:
            value = calculate(formula, l, L)
        except ValueError as error:
            raise ConfigError(
                f"placement.{key}={formula}: expected {expected} ({error})"
            ) from error
        ok = isinstance(value, types) and (not isinstance(value, float) or math.isfinite(value))
        check(ok, f"placement.{key}", formula, expected)
        return value


@dataclass
class TrainConfig:
    batch_size: int = 16
    grad_accum: int = 1
    steps: int = 750
    eval_every: int = 125
    eval_tokens: int = 65536
    stats_every: int = 50
    checkpoint_every: int = 125
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        check_positive("train", {k: v for k, v in asdict(self).items() if k != "stats_every"})
        for key in ("batch_size", "grad_accum"):
            value = getattr(self, key)
            check(value <= 1 << 20, f"train.{key}", value, f"at most {1 << 20:,}")
        check(self.stats_every >= 0, "train.stats_every", self.stats_every, "an integer >= 0")


@dataclass
class OptimConfig:
    lr: float = 3e-3
    min_lr: float = 3e-4
    warmup_steps: int = 40
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        for key in ("lr", "min_lr", "weight_decay", "grad_clip"):
            value = getattr(self, key)
            check(0 <= value < math.inf, f"optim.{key}", value, "a finite number >= 0")
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            check(0 <= value < 1, f"optim.{key}", value, "a number in [0, 1)")
        most = f"at most optim.lr={self.lr}, such as optim.min_lr={self.lr / 10:g}"
        check(self.min_lr <= self.lr, "optim.min_lr", self.min_lr, most)
        check(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "an integer >= 0")


@dataclass
class DataConfig:
    name: str = MISSING
    path: str | None = None
    subset: str | None = None
    column: str = "text"
    streaming: bool = False
    max_documents: int | None = None

    def __post_init__(self) -> None:
        used = {"text": ["path"], "hf": [f.name for f in fields(self)]}.get(self.name, [])
        for f in fields(self):
            if f.name not in ("name", *used) and getattr(self, f.name) != f.default:
                raise ConfigError(
                    f"data.{f.name}={getattr(self, f.name)}: data={self.name} does not use it; add "
                    + ("data=text or data=hf" if f.name == "path" else "data=hf")
                )
        if self.name in ("text", "hf") and not self.path:
            raise ConfigError(f"data.path: not given; data={self.name} needs data.path=PATH")
        if self.path:
            self.path = ",".join(map(home, self.path.split(",")))
        if self.max_documents is not None:
            check_positive("data", {"max_documents": self.max_documents})


@dataclass
class WandbConfig:
    mode: str = "auto"
    project: str = "gpt-norms"

    def __post_init__(self) -> None:
        check_choice("wandb.mode", self.mode, ("auto", "online", "offline", "disabled"))


@dataclass
class DistributedConfig:
    timeout: float = 5.0

    def __post_init__(self) -> None:
        check(0 < self.timeout < math.inf, "distributed.timeout", self.timeout, "minutes > 0")


@dataclass
class Config:
    """One training run.

    norm  the name of a registered norm and its own options
    init  `from`: a run directory whose trained weights this run starts from; `swap_norm`: the norm
          that replaces that run's norm
    """

    seed: int = MISSING
    device: str = MISSING
    dtype: str = MISSING
    compile: bool = MISSING
    tokenizer: str = MISSING
    run_dir: str | None = MISSING
    strict_causal: bool = MISSING
    norm: dict[str, Any] = MISSING
    init: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(INIT))
    placement: PlacementConfig = MISSING
    model: ModelConfig = MISSING
    train: TrainConfig = MISSING
    optim: OptimConfig = MISSING
    data: DataConfig = MISSING
    wandb: WandbConfig = MISSING
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        check_choice("tokenizer", self.tokenizer, TOKENIZERS)
        check_device(self.device)
        self.placement.check_formulas(self.model.n_layer)
        name = self.norm.get("name")
        check(isinstance(name, str), "norm.name", name, "a norm's name")
        for key, value in self.init.items():
            check_choice("init", key, INIT)
            check(value is None or isinstance(value, str), f"init.{key}", value, "text")
        if self.init["swap_norm"] and not self.init["from"]:
            raise ConfigError("init.swap_norm needs a trained run; add init.from=RUN_DIR")
        if self.run_dir:
            self.run_dir = home(self.run_dir)
        for group, key in ((self.init, "from"), (self.norm, "module")):
            if group.get(key):
                group[key] = home(group[key])

    def identity(self) -> dict[str, Any]:
        """The configuration without what cannot change a result."""
        without = ("run_dir", "wandb", "distributed")
        return {k: v for k, v in asdict(self).items() if k not in without}

    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def run_name(self) -> str:
        """`layer-pre-bs16-s1337-3f9a12bc`: readable, and different for each configuration."""
        norm, placement = self.norm["name"], self.placement.name
        return f"{norm}-{placement}-bs{self.train.batch_size}-s{self.seed}-{self.hash()[:8]}"


@dataclass
class SampleConfig:
    run_dir: str = MISSING
    prompt: str = MISSING
    max_new_tokens: int = MISSING
    temperature: float = MISSING
    top_k: int = MISSING
    seed: int = MISSING
    step: int | None = MISSING
    device: str = MISSING
    fold: bool = MISSING
    norm_module: str | None = MISSING
    batch_stats: bool = MISSING

    def __post_init__(self) -> None:
        check(not (self.fold and self.batch_stats), "fold", self.fold, "false with batch_stats")
        check(self.max_new_tokens >= 0, "max_new_tokens", self.max_new_tokens, "an integer >= 0")
        check(0 <= self.temperature < math.inf, "temperature", self.temperature, "a number >= 0")
        check(self.top_k >= 0, "top_k", self.top_k, "an integer >= 0")
        check_device(self.device)
        self.run_dir = home(self.run_dir)
        self.norm_module = self.norm_module and home(self.norm_module)


def check_device(device: str) -> None:
    ok = re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device) is not None
    check(ok, "device", device, "auto | cpu | cuda | cuda:N | mps")


def register_schemas() -> None:
    """Make the dataclasses known to Hydra under the names that the yaml files extend."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(name="sample_schema", node=SampleConfig)


def compose(*overrides: str) -> Config:
    """The configuration of `python scripts/train.py OVERRIDES`."""
    register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg: Config = typed(hydra.compose("train", list(overrides)))
    return cfg


def typed(raw: Any) -> Any:
    """Hydra's configuration as the checked dataclass that its schema names."""
    missing = sorted(OmegaConf.missing_keys(raw))
    if missing:
        raise ConfigError(f"{missing[0]}: not given; add {missing[0]}=VALUE to the command")
    cfg: Any = OmegaConf.to_object(raw)
    refuse_additions(raw, cfg)
    for key, value in flatten(asdict(cfg), ".").items():
        if isinstance(value, str) and not is_unicode(value):
            raise ConfigError(f"{key}={value!a}: not UTF-8; give it a name that is")
    return cfg


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode it; bytes of a file name that are not UTF-8 become surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def refuse_additions(raw: Any, cfg: Any, prefix: str = "") -> None:
    """Refuse keys that Hydra's `+key=value` added to the schema: nothing would read them."""
    known = [field.name for field in fields(cfg)]
    for key in map(str, raw):
        if key not in known:
            raise ConfigError(f"{prefix}{key}: no such key{nearest(key, known)}")
        if is_dataclass(getattr(cfg, key)):
            refuse_additions(raw[key], getattr(cfg, key), f"{prefix}{key}.")


def save_config(cfg: Config, path: Path) -> None:
    def literally(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: literally(entry) for key, entry in value.items()}
        return no_interpolation(value) if isinstance(value, str) else value

    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(literally(asdict(cfg)))))


def no_interpolation(text: str) -> str:
    """`text`, escaped so that OmegaConf reads each ${ literally."""
    return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text)


def read_yaml(path: Path) -> Any:
    """A small YAML file of plain values."""
    content, loader = path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if len(content) > 1 << 20:
        raise ValueError("longer than 1 MiB")
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(content, loader)):
        raise ValueError("it has an alias")
    values = yaml.load(content, loader)
    if not isinstance(values, dict):
        raise ValueError("not a mapping")
    for key, value in flatten(values, ".").items():
        if isinstance(value, str) and re.search(r"(?<!\\)(\\\\)*\$\{", value):
            raise ValueError(f"{key} has an interpolation")
    return values


def load_config(path: Path) -> Config:
    """The `Config` of a run directory's `config.yaml`. It may come from anyone: aliases, which can
    expand without bound, and interpolations, which can read the environment, are refused."""
    try:
        raw = OmegaConf.create(read_yaml(path))
        if OmegaConf.select(raw, "placement.head") is not None:  # now placement.final_norm
            raise DataError(f"{path}: from an earlier version of gpt-norms; train it again")
        return typed(OmegaConf.merge(OmegaConf.structured(Config), raw))
    except (ConfigError, OmegaConfBaseException, *UNREADABLE) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: damaged ({reason}); restore it or use another run_dir") from error
