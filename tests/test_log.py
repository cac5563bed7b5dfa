"""The run's files, and wandb as a mirror that may fail without consequence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt.common.files import sha256
from gpt.config import Config
from gpt.training.log import RunLog, Wandb, read_jsonl, to_json, write_atomically
from tests.tools.configs import curve, mostly_long, overrides
from tests.tools.programs import REPO, run_program, start
from tests.tools.wandb_server import Run, wandb_server


def test_rows_after_the_checkpoint_are_dropped_on_resume(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    rows = [{"step": i, "loss": 0.1 * i} for i in range(6)]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows[:4]))
    counted = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    path.write_text(text + '{"step": 6, "lo')  # killed while writing
    RunLog(tmp_path, config(), {"metrics.jsonl": counted}).close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == rows[:4]


def test_a_row_is_in_its_file_as_soon_as_it_is_logged(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    log = RunLog(tmp_path, config(), {})
    log.metrics(1, loss=2.0)
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    log.close()


def test_json_is_strict_and_keeps_every_bit() -> None:
    assert to_json({"a": float("nan"), "b": {"c": float("inf")}}) == '{"a": null, "b": {"c": null}}'
    value = 0.1 + 0.2
    assert json.loads(to_json({"x": value}))["x"] == value


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "old"


class Failing:
    """A wandb run whose service has died."""

    def log(self, row: dict[str, Any], step: int) -> None:
        raise ConnectionResetError("the service is gone\nand a traceback")


def test_a_failing_wandb_is_said_once_and_then_left_alone(
    config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = Wandb(tmp_path, config())
    mirror.run = Failing()
    mirror.log(1, {})
    mirror.log(2, {})
    mirror.finish()
    assert capsys.readouterr().err == (
        "warning: wandb failed; the run goes on without it: the service is gone\n"
    )


def wandb_run(corpus: Path, run_dir: Path, *extra: str, **env: str) -> subprocess.CompletedProcess:
    args = overrides("data=text", f"data.path={corpus}", f"run_dir={run_dir}", *extra)
    clean = {"WANDB_API_KEY": "", "HOME": str(run_dir.parent), "NETRC": str(run_dir / "none")}
    return run_program(*args, **{**clean, **env})


def test_a_warning_of_each_step_is_not_told_each_time(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    log = RunLog(tmp_path, config("wandb.mode=offline"), {})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for step in range(9):
            warnings.warn("of a step", stacklevel=1)
            log.metrics(step, loss=1.0)
    log.close()
    times = [str(w.message) for w in told].count("of a step")
    assert times <= 2  # wandb itself resets Python's count once


def test_without_a_login_wandb_is_offline_asks_nothing_and_changes_nothing(
    corpus: Path, tmp_path: Path
) -> None:
    with_wandb = wandb_run(corpus, tmp_path / "a", "wandb.mode=auto", WANDB_API_KEY="")
    assert with_wandb.returncode == 0, with_wandb.stderr
    assert list((tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb"))
    wandb_run(corpus, tmp_path / "b", "wandb.mode=disabled")
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert not (tmp_path / "b" / "wandb").exists()


def test_what_wandb_is_told(config: Callable[..., Config], tmp_path: Path) -> None:
    """The configuration without paths, tags, histograms and the sample, in its offline file."""
    cfg = config("wandb.mode=offline", "norm=batch", "run_dir=null")
    cfg.norm["module"] = "/home/me/mine.py"
    run_dir = tmp_path / "a-sweep" / "cell"
    run_dir.mkdir(parents=True)
    log = RunLog(run_dir, cfg, {})
    told = log.wandb.run
    assert told.group == "a-sweep"
    assert told.job_type == "train"
    assert set(told.tags) == {"batch", "pre", "text"}
    for path in ("corpus.txt", "mine.py"):
        assert path not in str(dict(told.config))
    assert told.config["norm"]["momentum"] == 0.1
    table = {"sites": {"final_norm": {"before": {"rms": 2.0}, "histogram": [0.5] * 2 + [0.0] * 30}}}
    log.stats(1, table)
    log.metrics(2, loss=1.0)
    assert told.summary["sites/final_norm/before/rms"] == 2.0
    log.sample(1, "to norm or not to norm")
    log.close()
    sys.modules["wandb"].teardown()  # else its service is inherited by programs that tests start
    assert (run_dir / "sample.txt").read_text() == "to norm or not to norm"
    (file,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"histogram" in content
    assert b"table" in content


@pytest.mark.parametrize("sent", [False, True])
def test_what_an_offline_run_told_before_it_was_killed_is_told_again_unless_it_was_sent(
    sent: bool, config: Callable[..., Config], tmp_path: Path
) -> None:
    left = tmp_path / "wandb" / "offline-run-before"
    left.mkdir(parents=True)
    (left / "run.wandb").touch()
    if sent:
        (left / "run.wandb.synced").touch()  # as `wandb sync` leaves it
    rows = [{"step": i, "loss": 2.0} for i in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "metrics.jsonl"
    counted = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    log = RunLog(tmp_path, config("wandb.mode=offline"), {"metrics.jsonl": counted})
    told = dict(log.wandb.run.summary)
    log.close()
    sys.modules["wandb"].teardown()
    assert ("loss" in told) == (not sent)
    assert left.exists() == sent


@pytest.mark.long
def test_an_unreachable_wandb_warns_once_and_the_run_succeeds(corpus: Path, tmp_path: Path) -> None:
    result = wandb_run(
        corpus,
        tmp_path / "a",
        "wandb.mode=online",
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_API_KEY="0" * 40,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("warning: wandb failed") == 1
    assert (tmp_path / "a" / "DONE").exists()


def test_a_killed_wandb_service_does_not_stop_the_run(corpus: Path, tmp_path: Path) -> None:
    args = overrides("data=text", f"data.path={corpus}", f"run_dir={tmp_path}/a", "train.steps=200",
                     "train.eval_every=100", "wandb.mode=offline")  # fmt: skip
    process = start(*args)
    while not any(row["step"] >= 20 for row in read_jsonl(tmp_path / "a" / "metrics.jsonl")):
        assert process.poll() is None, process.wait()
        time.sleep(0.02)
    children = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.splitlines()
    services = [int(line.split()[0]) for line in children if "wandb-core" in line]
    assert services
    for pid in services:
        os.kill(pid, signal.SIGKILL)
    ended = process.wait()
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("warning: wandb failed") == 1
    assert ended.stderr.count("\n") == 1
    assert read_jsonl(tmp_path / "a" / "metrics.jsonl")[-1]["step"] == 200


KEY = "0" * 40


def history_is_the_metrics(run: Run, run_dir: Path) -> None:
    """The history has each step once, in order, with the losses of `metrics.jsonl`."""
    steps = [row["_step"] for row in run.history]
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert steps == sorted({row["step"] for row in rows})
    told = {row["_step"]: row["loss"] for row in run.history if "loss" in row}
    assert told == {row["step"]: row["loss"] for row in rows if "loss" in row}


def sync(offline: Path, env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "wandb", "sync", str(offline)]
    folder = offline.parent  # wandb writes logs to the current folder
    result = subprocess.run(
        command, env=os.environ | env, cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("mode", "number"),
    mostly_long(
        [("online", signal.SIGKILL), ("online", signal.SIGTERM), ("offline", signal.SIGKILL)],
        ("online", signal.SIGKILL),
    ),
)
def test_a_run_that_was_stopped_is_whole_on_the_server_when_it_ends(
    mode: str, number: int, corpus: Path, tmp_path: Path
) -> None:
    """Under one id: the server gets what a kill kept from it, and gets nothing twice."""
    run_dir = tmp_path / "a"
    args = overrides("data=text", f"data.path={corpus}", f"run_dir={run_dir}", "train.steps=100",
                     "train.checkpoint_every=20", "train.eval_every=50", "train.stats_every=25",
                     f"wandb.mode={mode}")  # fmt: skip
    with wandb_server() as server:
        env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "HOME": str(tmp_path)}
        process = start(*args, **env)
        while not any(row["step"] >= 30 for row in read_jsonl(run_dir / "metrics.jsonl")):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill(number)
        assert process.wait().returncode != 0
        assert not (run_dir / "DONE").exists()
        result = run_program(*args, **env)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        for offline in (run_dir / "wandb").glob("offline-run-*"):
            sync(offline, env)
        (run,) = server.runs.values()
    assert run.finished
    history_is_the_metrics(run, run_dir)
    assert len([row for row in run.history if "sites/final_norm/after/rms" in row]) == 5
    assert run.history[-1]["sites/final_norm/histogram"]["_type"] == "histogram"


def test_wandb_sync_takes_an_offline_run_and_tells_nothing_of_the_machine(
    corpus: Path, tmp_path: Path
) -> None:
    result = wandb_run(corpus, tmp_path / "a", "wandb.mode=offline", "norm=batch")
    assert result.returncode == 0, result.stderr
    (offline,) = (tmp_path / "a" / "wandb").glob("offline-run-*")
    with wandb_server() as server:
        sync(offline, {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "HOME": str(tmp_path)})
        (run,) = server.runs.values()
    history_is_the_metrics(run, tmp_path / "a")
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    for key in ("val_loss", "val_bpb", "norm", "placement", "batch_size", "leaky", "seed"):
        assert run.summary[key] == summary[key], key
    assert run.told["jobType"] == "train"
    assert set(run.told["tags"]) == {"batch", "pre", "text"}
    (table,) = (content for name, content in run.files.items() if "table" in name)
    assert json.loads(table)["columns"] == ["step", "sample"]
    assert "requirements.txt" not in run.files
    everything = f"{run.told} {run.files}"
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, cwd=REPO, capture_output=True, text=True).stdout.strip()
    for secret in (os.uname().nodename + "'", str(tmp_path), str(REPO), KEY, commit or "no commit"):
        assert secret not in everything, everything[everything.index(secret) - 200 :][:400]
