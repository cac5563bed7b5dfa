"""What a run leaves to read: JSON lines in its directory, always, and wandb as their mirror."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt.config import Config


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line that a kill left unfinished is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary file and rename it: `path` holds its old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def to_json(row: Any) -> str:
    """One line of strict JSON: NaN and infinity, which JSON lacks, become null."""
    return json.dumps(finite(row), ensure_ascii=False, allow_nan=False)


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """Appends to `metrics.jsonl` and `stats.jsonl` of a run, and mirrors them to wandb.

    A resumed run drops the rows after `keep_until`, its checkpoint's step, and writes them again.
    """

    def __init__(self, run_dir: Path, cfg: Config, keep_until: int) -> None:
        self.run_dir = run_dir
        for name in ("metrics.jsonl", "stats.jsonl"):
            rows = [row for row in read_jsonl(run_dir / name) if row["step"] <= keep_until]
            write_atomically(run_dir / name, "".join(to_json(row) + "\n" for row in rows))
        self.files = {
            name: (run_dir / f"{name}.jsonl").open("a", encoding="utf-8")
            for name in ("metrics", "stats")
        }
        self.wandb = Wandb(run_dir, cfg)

    def metrics(self, step: int, **values: float) -> None:
        self.write("metrics", {"step": step, **values})
        self.wandb.log({"step": step, **values})

    def stats(self, step: int, table: dict[str, Any]) -> None:
        """`table` is what `gpt.stats.table` gives; wandb sees it flat, `sites/head/after/rms`."""
        self.write("stats", {"step": step, **table})
        self.wandb.log({"step": step, **flatten(table)})

    def summary(self, values: dict[str, Any]) -> None:
        write_atomically(self.run_dir / "summary.json", json.dumps(finite(values), indent=2) + "\n")
        self.wandb.summary(values)

    def write(self, name: str, row: dict[str, Any]) -> None:
        self.files[name].write(to_json(row) + "\n")
        self.files[name].flush()

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.wandb.finish()


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class Wandb:
    """wandb as a mirror that may fail: the first failure is said once and ends the mirror."""

    def __init__(self, run_dir: Path, cfg: Config) -> None:
        self.run: Any = None
        if cfg.wandb.mode != "disabled" and os.environ.get("WANDB_MODE") != "disabled":
            self.attempt(lambda: self.start(run_dir, cfg))

    def start(self, run_dir: Path, cfg: Config) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode = cfg.wandb.mode
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        # Only what describes the experiment: no paths, no environment.
        config = {k: v for k, v in asdict(cfg).items() if k not in ("run_dir", "wandb", "data")}
        self.run = wandb.init(
            project=cfg.wandb.project,
            dir=str(run_dir),
            id=os.environ.get("WANDB_RUN_ID") or cfg.hash()[:16],
            name=cfg.run_name(),
            config=config | {"data": cfg.data.name},
            resume="allow" if mode == "online" else None,
            mode=mode,  # type: ignore[arg-type]
            reinit="finish_previous",
            settings=wandb.Settings(
                console="off",
                init_timeout=10,
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                x_disable_meta=True,
            ),
        )
        self.run.define_metric("*", step_metric="step")

    def log(self, row: dict[str, Any]) -> None:
        self.attempt(lambda: self.run and self.run.log(row))

    def summary(self, values: dict[str, Any]) -> None:
        self.attempt(lambda: self.run and self.run.summary.update(values))

    def finish(self) -> None:
        self.attempt(lambda: self.run and self.run.finish())
        self.run = None

    def attempt(self, call: Callable[[], Any]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its dependencies' deprecations are not ours
                call()
        except Exception as error:
            self.run = None
            with suppress(Exception):  # so that it does not fail again, loudly, at exit
                sys.modules["wandb"].teardown()
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            print(
                f"warning: wandb failed, the run goes on without it: {first_line}", file=sys.stderr
            )
