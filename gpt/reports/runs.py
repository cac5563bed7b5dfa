"""Several runs side by side, read from their `summary.json` files."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from gpt.common.errors import DataError
from gpt.common.files import flatten, read_json
from gpt.common.terminal import show
from gpt.probes.verdict import marked

# Keys that tell no run apart: where it ran, and how often it was looked at or saved.
UNSEEN = {"wandb.mode", "wandb.project", "device", "train.eval_every", "train.stats_every",
          "train.checkpoint_every", "train.keep_checkpoints"}  # fmt: skip
# Keys that every label has, or that are the run's own.
LABELLED = {"norm.name", "placement.name", "train.batch_size", "seed", "run_dir"}
# What runs are made of beside their configuration, and its name where it differs between them.
SOURCES = {"corpus_sha256": "text", "init_sha256": "init.weights", "norm_sha256": "norm.code"}


def load_summaries(*folders: Path) -> list[dict[str, Any]]:
    """The summaries of all runs below `folders`, best validation loss first, in bits a byte, by
    which tokenizers compare.

    Last come runs that diverged, and before them those whose evaluation sees the future: their
    validation loss is not a result.
    """
    paths = {path.resolve(): path for folder in folders for path in folder.rglob("summary.json")}
    summaries = [read_json(path) | {"run_dir": str(path.parent)} for path in sorted(paths.values())]
    for s in summaries:
        if "norm" not in s:
            raise DataError(f"{s['run_dir']}/summary.json: not a run's summary; remove the run")

    def rank(s: dict[str, Any]) -> tuple[bool, bool, float]:
        return "diverged_at" in s, bool(s.get("sees_in_evaluation")), s.get("val_bpb") or math.inf

    return sorted(summaries, key=rank)


def unfinished(*folders: Path) -> int:
    """How many runs below `folders` have begun and not ended."""
    paths = {path.resolve() for folder in folders for path in folder.rglob("metrics.jsonl")}
    return sum(not (path.parent / "summary.json").exists() for path in paths)


def print_table(summaries: list[dict[str, Any]]) -> None:
    """One line a run. Leaky losses are marked: they are not comparable, never ranked."""
    labels = [label(traits) for traits in distinguish(summaries)]
    table = Table(title="best validation loss first", title_justify="left", caption_justify="left")
    table.caption = Text(unsaid(summaries))
    table.add_column("run", overflow="fold")
    for column in ("val loss", "bits/byte", "train loss", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for s, name in zip(summaries, map(Text, labels), strict=True):
        speed = f"{s['tokens_per_s']:,.0f}"
        if "diverged_at" in s:
            table.add_row(name, f"diverged at {s['diverged_at']}", "", "", speed)
            continue
        train_loss = marked(f"{s['train_loss']:.4f}", s["sees_in_training"])
        val_loss = marked(f"{s['val_loss']:.4f}", s["sees_in_evaluation"])
        table.add_row(name, val_loss, f"{s['val_bpb']:.4f}", train_loss, speed)
    show(table)


@cache
def read_config(run_dir: str) -> dict[str, Any]:
    """A run's configuration, its keys dotted; empty where there is none. Fast, for many runs."""
    path = Path(run_dir) / "config.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return flatten(yaml.load(path.read_bytes(), loader), ".") if path.exists() else {}
    except (yaml.YAMLError, AttributeError) as error:
        raise DataError(f"{path}: damaged; restore it or remove the run") from error


def distinguish(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What tells each run from the others: what all labels have, and any other key that differs,
    unless most runs have its value (`unsaid`)."""
    configs = [read_config(s["run_dir"]) for s in summaries]
    several = [k for k in SOURCES if len({s.get(k) for s in summaries} - {None}) > 1]
    values = variety(configs)
    plain = usual(values)
    found = []
    for s, config in zip(summaries, configs, strict=True):
        head = ("norm", s["norm"]), ("placement", s["placement"])
        traits = dict([*head, ("train.batch_size", s["batch_size"]), ("seed", s["seed"])])
        for key, value in sorted(config.items()):
            scope = scope_of(config, key)
            if scope in values and value is not None and str(value) != plain.get(scope):
                traits[key] = value
        traits |= {SOURCES[k]: s[k][:8] for k in several if s.get(k)}
        found.append(traits)
    return found


def unsaid(summaries: list[dict[str, Any]]) -> str:
    """A sentence that gives the values that labels omit; "" if labels omit nothing."""
    plain = usual(variety([read_config(s["run_dir"]) for s in summaries]))
    said = [f"{key}={plain[key, name]}" + f" ({name})" * bool(name) for key, name in plain]
    return f"Where a name does not say otherwise: {', '.join(said)}." if said else ""


def scope_of(config: dict[str, Any], key: str) -> tuple[str, str]:
    """The key, and the norm or placement among whose runs its values are compared: a norm's eps
    differs from another norm's."""
    name = key.split(".")[0] + ".name"
    return key, config.get(name, "") if name in LABELLED else ""


def variety(configs: list[dict[str, Any]]) -> dict[tuple[str, str], Counter[str]]:
    """How many runs have which value, of the keys that differ and that no label has anyway. A run
    of which nothing is known counts among those that have none."""
    known = [config for config in configs if config]
    keys = sorted({key for config in known for key in config} - LABELLED - UNSEEN)
    values: dict[tuple[str, str], Counter[str]] = {}
    for config in known:
        for key in keys:
            values.setdefault(scope_of(config, key), Counter())[str(config.get(key))] += 1
    unknown = Counter({"None": len(configs) - len(known)})
    return {scope: counts + unknown for scope, counts in values.items() if len(counts) > 1}


def usual(values: dict[tuple[str, str], Counter[str]]) -> dict[tuple[str, str], str]:
    """The value that more than half of the runs have, if every run has the key. `optim.lr` is
    excluded because each cell uses its own best."""
    found = {}
    for (key, name), counts in values.items():
        value, n = counts.most_common(1)[0]
        if 2 * n > counts.total() and "None" not in counts and key != "optim.lr":
            found[key, name] = value
    return found


def label(traits: dict[str, Any]) -> str:
    """{"norm": "rms", "train.batch_size": 4, "optim.lr": 0.1} → rms-bs4 optim.lr=0.1"""
    short = {"norm": "", "placement": "", "train.batch_size": "bs", "seed": "s"}
    head = "-".join(f"{short[key]}{value}" for key, value in traits.items() if key in short)
    rest = [f"{key}={value}" for key, value in traits.items() if key not in short]
    return " ".join(filter(None, [head, *rest]))
