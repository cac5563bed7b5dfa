"""Sweeps: the folder of the runs, their number, and a live table of their progress."""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from rich.live import Live
from rich.table import Table

from gpt.cli.errors import run
from gpt.common.errors import ConfigError, UserError
from gpt.common.files import read_json, read_jsonl
from gpt.common.places import CONFIGS
from gpt.common.terminal import Terminal, say
from gpt.reports.runs import blame_changed, load_runs, print_table, read_config

SHOWN = 12  # the most lines of the table: running runs, then the last to end


def sweep_dir(argv: list[str]) -> Path | None:
    """The folder of a sweep's runs; None for a single run. It follows from the sweep's name or its
    overrides, so that the same command finds its finished runs again."""
    if not {"-m", "--multirun"} & set(argv):
        return None
    given = dict(arg.split("=", 1) for arg in argv if "=" in arg and not arg.startswith("-"))
    if "hydra.sweep.dir" in given:
        return Path(given["hydra.sweep.dir"].strip("'\""))
    overrides = sorted(f"{k}={v}" for k, v in given.items() if not k.startswith("hydra"))
    named = given.get("sweep", "sweep")
    if len(overrides) == 1 and "sweep" in given:
        return Path("runs") / named
    digest = hashlib.sha256(" ".join(overrides).encode()).hexdigest()
    return Path("runs") / f"{named}-{digest[:8]}"


def refuse_sweep(argv: list[str]) -> None:
    """ConfigError for a setting that only a single run can have."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "each run of a sweep has one process: start without torchrun, or unset WORLD_SIZE"
        )
    for arg in argv:
        if arg.startswith("run_dir="):
            raise ConfigError(f"{arg}: each run of a sweep has its own; use hydra.sweep.dir=DIR")


def count_runs(argv: list[str]) -> int | None:
    """The number of runs that the command line asks for; None if unknown in advance."""
    given = dict(arg.split("=", 1) for arg in argv if "=" in arg and not arg.startswith("-"))
    if "hydra/sweeper" in given:
        return None
    file = CONFIGS / "sweep" / f"{given.get('sweep')}.yaml"
    params = OmegaConf.select(OmegaConf.load(file), "hydra.sweeper.params") if file.exists() else {}
    grid = [f"{key}={value}" for key, value in {**(params or {}), **given}.items()]
    try:
        parsed = OverridesParser.create().parse_overrides(grid)
        swept = [list(o.sweep_string_iterator()) for o in parsed if o.is_sweep_override()]
        return math.prod(map(len, swept))
    except HydraException:  # a glob, which Hydra expands, or a mistake, which Hydra reports
        return None


@dataclass(frozen=True)
class RunProgress:
    """A run's progress, from its files. cost: tokens to train on; done: tokens trained on."""

    name: str
    state: str
    step: str
    cost: float
    done: float
    changed: float


config_of = cache(read_config)  # a run's configuration stays as it is; its losses do not


def read_progress(run_dir: Path) -> RunProgress | None:
    """A run's progress; None if it has not begun or its files are being written."""
    try:
        cfg = config_of(run_dir)
        steps = cfg["train.steps"]
        tokens = cfg["train.batch_size"] * cfg["train.grad_accum"] * cfg["model.block_size"]
        done = (run_dir / "DONE").exists()
        path = run_dir / ("summary.json" if done else "metrics.jsonl")
        changed = path.stat().st_mtime
        if done:
            summary = read_json(path)
            step, loss = summary["steps"], summary.get("val_loss")
            state = f"val loss {loss:.4f}" if loss is not None else "no loss"
            if "diverged_at" in summary:
                state = f"diverged at {summary['diverged_at']}"
        else:
            rows = read_jsonl(path)
            step, state = rows[-1]["step"] if rows else 0, "begun"
    except (OSError, KeyError, UserError):
        return None
    cost = tokens * (step if done else steps)
    return RunProgress(run_dir.name, state, f"{step}/{steps}", cost, tokens * step, changed)


def progress_table(folder: Path, total: int | None, started: float, done_before: float) -> Table:
    """A table of the runs in `folder`, running ones first; the title estimates the time left."""
    runs = [r for path in folder.glob("*/config.yaml") if (r := read_progress(path.parent))]
    total = max(total, len(runs)) if total else None
    begun = [r for r in runs if r.state == "begun"]
    running = [r for r in begun if r.changed >= started]  # not those left by a kill
    ended = sorted((r for r in runs if r.state != "begun"), key=lambda r: -r.changed)
    title = f"{len(ended)} of {total or '?'} done, {len(running)} running"
    if len(begun) > len(running):
        title += f", {len(begun) - len(running)} to resume"
    done = sum(r.done for r in runs)
    if runs and total and len(ended) < total and done > done_before:
        speed = (done - done_before) / (time.time() - started)
        cost = sum(r.cost for r in runs) * total / len(runs)  # assumes that later runs cost as much
        title += f", about {math.ceil(max(0.0, cost - done) / speed / 60)} min left"
    table = Table("run", "step", "result", title=title, title_justify="left")
    for one in [*running, *ended][:SHOWN]:
        table.add_row(one.name, one.step, one.state)
    return table


@contextmanager
def live_table(folder: Path, total: int | None) -> Iterator[None]:
    """Inside, a terminal shows the sweep's progress, whichever processes run its runs."""
    console = Terminal()
    if not console.is_terminal:
        yield
        return
    started = time.time()
    before = sum(r.done for p in folder.glob("*/config.yaml") if (r := read_progress(p.parent)))
    with Live(
        get_renderable=lambda: progress_table(folder, total, started, before),
        refresh_per_second=0.5,
        console=console,
        transient=True,
    ):
        yield


def show_results(folder: Path, total: int | None) -> None:
    """Print the table of a sweep's runs, if any. total: how many its folder should have."""
    runs = load_runs(folder)
    if runs:
        with blame_changed(runs):
            print_table(runs)
        missing = (total or 0) - len(runs)
        if missing > 0:
            say(f"{missing} of {total} have no result; the same command tries again")
        say(f"python scripts/report.py {shlex.quote(str(folder))}   makes a page of these runs")


def run_sweep(app: Callable[[], None], folder: Path) -> None:
    """Run the sweep of the command line and print a table at the end."""
    run(partial(refuse_sweep, sys.argv[1:]))
    total = count_runs(sys.argv[1:])
    shared = any(arg.startswith("hydra.sweep.dir=") for arg in sys.argv)  # by several commands
    sys.argv.append(f"hydra.sweep.dir={folder}")
    try:
        with live_table(folder, total):
            run(app)
    finally:
        run(partial(show_results, folder, None if shared else total))
