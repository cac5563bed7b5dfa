"""The log of a run: JSON lines in its directory, and wandb as a mirror of them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gpt.common.errors import DataError
from gpt.common.files import flatten, naming, read_jsonl, write_atomically
from gpt.common.processes import rank
from gpt.common.terminal import warn
from gpt.config import Config
from gpt.probes.stats import EDGES

# The groups of the configuration that wandb receives.
SENT = ("seed", "device", "dtype", "compile", "tokenizer", "strict_causal", "norm", "placement",
        "model", "train", "optim")  # fmt: skip


def to_json(row: Any) -> str:
    """One line of strict JSON: NaN and infinity, which JSON lacks, become null."""
    return json.dumps(finite(row), ensure_ascii=False, allow_nan=False)


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """Appends to `metrics.jsonl` and `stats.jsonl` of a run, and mirrors them to wandb.

    A resumed run keeps the rows that its checkpoint counts, and drops those after them, which it
    writes again. Only the first process of a run writes.

    rows  the bytes and the SHA-256 of each file at the checkpoint; {} for a new run
    """

    def __init__(self, run_dir: Path, cfg: Config, rows: dict[str, Any]) -> None:
        self.run_dir = run_dir
        self.files: dict[str, RowFile] = {}
        if rank() > 0:
            self.wandb = Wandb(run_dir, cfg)
            return
        paths = {name: run_dir / f"{name}.jsonl" for name in ("metrics", "stats")}
        for path in paths.values():
            keep(path, **rows.get(path.name, {}))
        self.wandb = Wandb(run_dir, cfg)
        self.wandb.catch_up(read_jsonl(paths["metrics"]), read_jsonl(paths["stats"]))
        self.files = {name: RowFile(path) for name, path in paths.items()}

    def metrics(self, step: int, **values: float) -> None:
        self.write("metrics", {"step": step, **values})
        self.wandb.log(step, values)

    def stats(self, step: int, table: dict[str, Any]) -> None:
        """`table` comes from `gpt.probes.stats.to_numbers`."""
        self.write("stats", {"step": step, **table})
        self.wandb.stats(step, table)

    def summary(self, values: dict[str, Any]) -> None:
        write_atomically(self.run_dir / "summary.json", json.dumps(finite(values), indent=2) + "\n")
        self.wandb.summary(values)

    def sample(self, step: int, text: str) -> None:
        if self.files:
            write_atomically(self.run_dir / "sample.txt", text)
        self.wandb.sample(step, text)

    def write(self, name: str, row: dict[str, Any]) -> None:
        if name in self.files:
            self.files[name].write(to_json(row) + "\n")

    def sync(self) -> dict[str, Any]:
        """Flush to the disk, because a checkpoint must not outlive the rows before it. Returns what
        `__init__` takes as `rows`."""
        return {f"{name}.jsonl": file.sync() for name, file in self.files.items()}

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.wandb.finish()


class RowFile:
    """A file that rows are appended to, and the SHA-256 of all that is in it."""

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256(path.read_bytes())
        self.path, self.file = path, path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        content = line.encode()
        self.digest.update(content)
        with naming(self.path):
            while content:  # a disk that is nearly full takes a part
                content = content[self.file.write(content) :]

    def sync(self) -> dict[str, Any]:
        with naming(self.path):
            os.fsync(self.file.fileno())
        return {"bytes": self.file.tell(), "sha256": self.digest.hexdigest()}

    def close(self) -> None:
        self.file.close()


def keep(path: Path, bytes: int = 0, sha256: str | None = None) -> None:
    """Cut the file after `bytes`. Raises DataError if it is shorter, or does not have that hash."""
    content = path.read_bytes()[:bytes] if path.exists() else b""
    if len(content) < bytes or (bytes and hashlib.sha256(content).hexdigest() != sha256):
        raise DataError(
            f"{path}: changed or shortened since the checkpoint was written; restore it, or use "
            "another run_dir"
        )
    write_atomically(path, content.decode())


class Wandb:
    """wandb as a mirror that may fail: the first failure is reported and ends the mirror."""

    def __init__(self, run_dir: Path, cfg: Config) -> None:
        self.run: Any = None
        self.was_synced = False
        disabled = "disabled" in (cfg.wandb.mode, os.environ.get("WANDB_MODE"))
        if rank() == 0 and not disabled:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations in its dependencies
                self.attempt(lambda: self.start(run_dir, cfg))

    def start(self, run_dir: Path, cfg: Config) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        logging.raiseExceptions = False  # its thread's log may be on a full disk
        import wandb

        mode: Any = cfg.wandb.mode
        if mode == "auto":
            logged_in = wandb.login(prompt=False, verify=False)
            mode = os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")
        id_file = run_dir / "wandb_id"  # a resumed run goes on under its own id
        if not id_file.exists():
            write_atomically(id_file, os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:16])
        if mode == "offline":
            self.was_synced = forget_unsynced(run_dir / "wandb")
        # Only settings of the experiment are sent: no paths, no environment.
        config = {k: v for k, v in asdict(cfg).items() if k in SENT}
        config["norm"] = {k: v for k, v in cfg.norm.items() if k != "module"}
        in_sweep = cfg.run_dir is None and run_dir.parent.name != "runs"
        self.run = wandb.init(
            project=cfg.wandb.project,
            dir=str(run_dir),
            id=id_file.read_text(),
            name=cfg.run_name(),
            group=run_dir.parent.name if in_sweep else None,
            job_type="train",
            tags=[cfg.norm["name"], cfg.placement.name, cfg.data.name],
            config=config | {"data": cfg.data.name},
            resume="allow" if mode == "online" else None,
            mode=mode,
            reinit="finish_previous",
            settings=wandb.Settings(
                console="off",
                init_timeout=10,
                finish_timeout=60,
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                x_disable_meta=True,
                x_save_requirements=False,
                host="-",  # not this machine's name
                program="train.py",  # nor a path on it
            ),
        )

    def log(self, step: int, row: dict[str, Any]) -> None:
        """wandb merges rows of one step, and ignores a step that it already has."""
        self.tell(lambda run: run.log(row, step=step))

    def catch_up(self, metrics: list[dict[str, Any]], stats: list[dict[str, Any]]) -> None:
        """Send the rows that a killed run did not get to send."""
        if self.run is None or (self.run.offline and self.was_synced):
            return
        rows: list[Any] = [(row["step"], row, self.log) for row in metrics]
        rows += [(row["step"], row, self.stats) for row in stats]
        for step, row, tell in sorted(rows, key=lambda r: r[0]):
            if step >= self.run.starting_step:
                tell(step, {key: value for key, value in row.items() if key != "step"})

    def stats(self, step: int, table: dict[str, Any]) -> None:
        """Numbers as lines, such as `sites/final_norm/after/rms`; lists as histograms."""

        def call(run: Any) -> None:
            import wandb

            row = flatten(table, "/")
            for key, value in row.items():
                if isinstance(value, list):
                    row[key] = wandb.Histogram(np_histogram=(np.array(value), np.array(EDGES)))
            run.log(row, step=step)

        self.tell(call)

    def sample(self, step: int, text: str) -> None:
        def call(run: Any) -> None:
            import wandb

            table = wandb.Table(columns=["step", "sample"], data=[[step, text]])
            run.log({"sample": table}, step=step)

        self.tell(call)

    def summary(self, values: dict[str, Any]) -> None:
        self.tell(lambda run: run.summary.update(values))

    def finish(self) -> None:
        self.tell(lambda run: run.finish())
        self.run = None

    def tell(self, call: Callable[[Any], Any]) -> None:
        """Pass the wandb run to `call`, unless the mirror has ended."""
        if self.run is not None:
            self.attempt(lambda: call(self.run))

    def attempt(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self.run = None
            with suppress(Exception):  # else it fails again, loudly, at exit
                sys.modules["wandb"].teardown()
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            warn(f"wandb failed; the run goes on without it: {first_line}")


def forget_unsynced(folder: Path) -> bool:
    """Remove what a killed run left for `wandb sync`, since its rows are logged again. Returns
    whether some of it was already sent; that stays."""
    sent = False
    for left in folder.glob("offline-run-*"):
        if any(left.glob("*.synced")):
            sent = True
        else:
            shutil.rmtree(left)
    return sent
