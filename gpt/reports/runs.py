"""Finished runs, read from their directories, and the labels that tell them apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from gpt.common.errors import DataError, UserError
from gpt.common.files import changed, flatten, read_json, read_jsonl
from gpt.common.terminal import show
from gpt.config import UNREADABLE, read_yaml
from gpt.probes.verdict import marked

# Settings that no label shows: where a run ran, and how often it was evaluated or saved.
UNSEEN = {"wandb.mode", "wandb.project", "distributed.timeout", "device", "train.eval_every",
          "train.stats_every", "train.checkpoint_every", "train.keep_checkpoints"}  # fmt: skip
# Settings that every label shows anyway, and the run's own directory.
LABELLED = {"norm.name", "placement.name", "train.batch_size", "seed", "run_dir"}
# Inputs of a run besides its configuration, and what a label calls them if they differ.
SOURCES = {"corpus_sha256": "text", "init_sha256": "init.weights", "norm_sha256": "norm.code"}


@dataclass(frozen=True)
class FinishedRun:
    """What a run's directory tells; each of its files is read once.

    summary  `summary.json`
    config   `config.yaml`, with dotted keys; empty if the file is gone
    changed  the files that are not as the finished run left them
    """

    dir: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    changed: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        return self.summary["seed"]

    @property
    def diverged(self) -> bool:
        return "diverged_at" in self.summary

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`."""
        return read_jsonl(self.dir / "metrics.jsonl")

    @cached_property
    def stats(self) -> list[dict[str, Any]]:
        """The rows of `stats.jsonl`."""
        return read_jsonl(self.dir / "stats.jsonl")

    def curve(self, unit: str) -> tuple[list[int], list[float]]:
        """The steps of its evaluations and the validation losses there, while they were finite."""
        points = [(row["step"], row[unit]) for row in self.metrics if row.get(unit) is not None]
        return [step for step, _ in points], [loss for _, loss in points]


def load_runs(*folders: Path) -> list[FinishedRun]:
    """All finished runs below `folders`. The lowest validation loss comes first, in bits a byte,
    because that compares across tokenizers.

    A run whose evaluation sees the future has no valid loss: it comes after all others. Runs that
    diverged come last.
    """
    paths = {path.resolve(): path for path in below(folders, "summary.json")}
    runs = []
    for path in sorted(paths.values()):
        summary = read_json(path)
        if "norm" not in summary:
            raise DataError(f"{path}: not a run's summary; remove the run")
        runs.append(
            FinishedRun(path.parent, summary, read_config(path.parent), changes(path.parent))
        )

    def rank(run: FinishedRun) -> tuple[bool, bool, float]:
        sees = bool(run.summary.get("sees_in_evaluation"))
        return run.diverged, sees, run.summary.get("val_bpb") or math.inf

    return sorted(runs, key=rank)


def below(folders: Iterable[Path], name: str) -> list[Path]:
    """All files of that name, also in folders that are links."""
    pattern = f"**/{name}"
    return [f / path for f in folders for path in glob(pattern, root_dir=f, recursive=True)]


@contextmanager
def blame_changed(runs: list[FinishedRun]) -> Iterator[None]:
    """Inside, an error that changed files of a run may have caused is told as such."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        altered = [f"{run.dir} ({', '.join(run.changed)})" for run in runs if run.changed]
        if not altered:
            raise
        raise DataError(
            f"{'; '.join(altered)}: changed since the run finished, and cannot be read; restore "
            "it, or remove the run"
        ) from error


def changes(run_dir: Path) -> tuple[str, ...]:
    """The files of a finished run that differ from what its DONE lists."""
    try:
        return tuple(changed(run_dir / "DONE", ("config.yaml", "metrics.jsonl", "summary.json")))
    except UserError:
        return ("DONE",)


def unfinished(*folders: Path) -> int:
    """How many runs below `folders` have started but not finished."""
    paths = {path.resolve() for path in below(folders, "metrics.jsonl")}
    return sum(not (path.parent / "summary.json").exists() for path in paths)


def print_table(runs: list[FinishedRun]) -> None:
    """One line for each run. Losses of leaky runs are marked and never ranked."""
    table = Table(title="best validation loss first", title_justify="left", caption_justify="left")
    table.caption = Text(unsaid(runs))
    table.add_column("run", overflow="fold")
    for column in ("val loss", "bits/byte", "train loss", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for run, traits in zip(runs, distinguish(runs), strict=True):
        name, s = Text(label(traits)), run.summary
        speed = f"{s['tokens_per_s']:,.0f}"
        if run.diverged:
            table.add_row(name, f"diverged at {s['diverged_at']}", "", "", speed)
            continue
        train_loss = marked(f"{s['train_loss']:.4f}", s["sees_in_training"])
        val_loss = marked(f"{s['val_loss']:.4f}", s["sees_in_evaluation"])
        table.add_row(name, val_loss, f"{s['val_bpb']:.4f}", train_loss, speed)
    show(table)


def read_config(run_dir: Path) -> dict[str, Any]:
    """A run's configuration with dotted keys; empty if it has none. It is read without OmegaConf,
    which takes long for many runs."""
    path = run_dir / "config.yaml"
    try:
        return flatten(read_yaml(path), ".") if path.exists() else {}
    except UNREADABLE as error:
        raise DataError(f"{path}: damaged; restore it or remove the run") from error


def distinguish(runs: list[FinishedRun]) -> list[dict[str, Any]]:
    """For each run the settings that its label shows: norm, placement, batch size and seed, and
    any other setting that differs between runs, unless most of them share its value (`unsaid`)."""
    several = [k for k in SOURCES if len({run.summary.get(k) for run in runs} - {None}) > 1]
    values = variety(runs)
    plain = usual(values)
    found = []
    for run in runs:
        s = run.summary
        head = ("norm", s["norm"]), ("placement", s["placement"])
        traits = dict([*head, ("train.batch_size", s["batch_size"]), ("seed", s["seed"])])
        for key, value in sorted(run.config.items()):
            scope = scope_of(run.config, key)
            if scope in values and value is not None and str(value) != plain.get(scope):
                traits[key] = value
        traits |= {SOURCES[k]: s[k][:8] for k in several if s.get(k)}
        found.append(traits)
    return found


def unsaid(runs: list[FinishedRun]) -> str:
    """A sentence that gives the values that labels omit; "" if labels omit nothing."""
    omitted = [
        f"{key}={value} ({name})" if name else f"{key}={value}"
        for (key, name), value in usual(variety(runs)).items()
    ]
    return f"Unless a name says otherwise: {', '.join(omitted)}." if omitted else ""


def scope_of(config: dict[str, Any], key: str) -> tuple[str, str]:
    """The key, and the norm or placement whose runs are compared in it: the eps of one norm is
    another setting than the eps of a second norm."""
    name = key.split(".")[0] + ".name"
    return key, config.get(name, "") if name in LABELLED else ""


def variety(runs: list[FinishedRun]) -> dict[tuple[str, str], Counter[str]]:
    """For each setting that differs between runs, how many runs have which value. A run without a
    configuration counts as "None" everywhere."""
    known = [run.config for run in runs if run.config]
    keys = sorted({key for config in known for key in config} - LABELLED - UNSEEN)
    values: dict[tuple[str, str], Counter[str]] = {}
    for config in known:
        for key in keys:
            values.setdefault(scope_of(config, key), Counter())[str(config.get(key))] += 1
    unknown = Counter({"None": len(runs) - len(known)})
    return {scope: counts + unknown for scope, counts in values.items() if len(counts) > 1}


def usual(values: dict[tuple[str, str], Counter[str]]) -> dict[tuple[str, str], str]:
    """The value that more than half of the runs share, for each setting that every run has.
    `optim.lr` is excluded because each cell uses its own best."""
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
