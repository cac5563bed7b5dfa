"""After kill -9 at any moment the same command gives the same loss curve, to the bit.

Real processes are killed for real, and a negative control shows that the comparison can fail.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.common.errors import ConfigError, Locked
from gpt.config import Config
from gpt.training import checkpoint, step, trainer
from gpt.training.run_dir import locked
from gpt.training.trainer import train
from tests.tools.configs import curve, mostly_long, overrides, read_rows
from tests.tools.programs import REPO, Process, run_program, start

STEPS = 60


def command(corpus: Path, run_dir: Path, *extra: str) -> list[str]:
    """A run with dropout, accumulation and BatchNorm: everything that has state to lose."""
    return overrides(
        "data=text", f"data.path={corpus}", f"run_dir={run_dir}", "norm=batch",
        "model.dropout=0.2", "train.grad_accum=2", f"train.steps={STEPS}", "train.eval_every=20",
        "train.stats_every=7", "train.checkpoint_every=5", *extra,
    )  # fmt: skip


def wait_for_step(process: Process, run_dir: Path, step: int) -> None:
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"lr"') >= step):
        assert process.poll() is None, process.wait()
        time.sleep(0.002)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = run_program(*command(corpus, run_dir))
    assert result.returncode == 0, result.stderr
    return run_dir


def test_killed_again_and_again_a_run_ends_with_the_same_bits(
    corpus: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    run_dir, rng = tmp_path / "run", random.Random(0)
    for at in (3, 21, 44):
        process = start(*command(corpus, run_dir))
        wait_for_step(process, run_dir, at)
        time.sleep(rng.random() * 0.02)  # in a step, an evaluation or a checkpoint's write
        process.kill()
        assert process.wait().returncode == -signal.SIGKILL
    result = run_program(*command(corpus, run_dir))
    assert result.returncode == 0, result.stderr
    assert "resuming" in result.stdout
    assert curve(run_dir) == curve(uninterrupted)
    assert read_rows(run_dir, "stats") == read_rows(uninterrupted, "stats")
    for name in ("model", "optimizer"):
        file = f"checkpoints/step_{STEPS}/{name}.safetensors"
        assert (run_dir / file).read_bytes() == (uninterrupted / file).read_bytes()
    differing = ("tokens_per_s", "peak_memory")
    summaries = [json.loads((d / "summary.json").read_text()) for d in (run_dir, uninterrupted)]
    for summary in summaries:
        for key in differing:
            summary.pop(key)
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("lost", ["dropout", "optimizer", "buffers"])
def test_a_resume_that_loses_any_state_gives_another_curve(
    lost: str, corpus: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the comparison above does depend on the restored state."""
    from tests.tools.configs import make_config

    run_dir = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    rewind(run_dir)
    if lost == "dropout":
        stream_seed = step.stream_seed
        moved = lambda seed, name: stream_seed(seed + name.startswith("dropout"), name)  # noqa: E731
        monkeypatch.setattr(step, "stream_seed", moved)
    elif lost == "optimizer":
        monkeypatch.setattr(checkpoint, "load_optimizer", lambda *args: None)
    else:
        load_file = checkpoint.load_file
        fresh = {"running_mean": 0.0, "running_var": 1.0}

        def forgetful(path: Path) -> dict[str, torch.Tensor]:
            return {
                k: v.fill_(fresh[k.split(".")[-1]]) if k.split(".")[-1] in fresh else v
                for k, v in load_file(path).items()
            }

        monkeypatch.setattr(checkpoint, "load_file", forgetful)
    train(make_config(*command(corpus, run_dir)))
    assert curve(run_dir) != curve(uninterrupted)


def test_the_same_rewound_run_with_nothing_lost_gives_the_same_curve(
    corpus: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    from tests.tools.configs import make_config

    run_dir = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    rewind(run_dir)
    train(make_config(*command(corpus, run_dir)))
    assert curve(run_dir) == curve(uninterrupted)


def rewind(run_dir: Path) -> None:
    """Go back to the checkpoint before the last one."""
    (run_dir / "DONE").unlink()
    shutil.rmtree(run_dir / "checkpoints" / f"step_{STEPS}")


@pytest.mark.parametrize("number", mostly_long([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_a_signal_finishes_the_step_writes_a_checkpoint_and_exits_128_plus_n(
    number: signal.Signals, corpus: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(*command(corpus, run_dir))
    wait_for_step(process, run_dir, 12)
    process.kill(number)
    stopped = process.wait()
    assert stopped.returncode == 128 + number, stopped.stderr
    assert "the same command resumes" in stopped.stdout
    step = int(checkpoint.checkpoints(run_dir)[0].name.removeprefix("step_"))
    assert step == read_rows(run_dir)[-1]["step"] >= 12
    run_program(*command(corpus, run_dir))
    assert curve(run_dir) == curve(uninterrupted)


def test_a_signal_in_the_last_evaluation_stops_as_well(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a sweep would go on with its next cell after Ctrl-C."""
    evaluate, calls = trainer.evaluate, iter(range(9))

    def interrupted(*args: Any) -> dict[str, float]:
        if next(calls) == 1:  # the first is before training
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args)

    monkeypatch.setattr(trainer, "evaluate", interrupted)
    cfg = config("train.eval_every=100")
    with pytest.raises(SystemExit) as stopped:
        train(cfg)
    assert stopped.value.code == 128 + signal.SIGINT
    assert not (tmp_path / "run" / "DONE").exists()
    assert train(cfg)["steps"] == cfg.train.steps


def test_a_finished_run_says_so_and_exits_0(corpus: Path, uninterrupted: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*.jsonl")}
    result = run_program(*command(corpus, uninterrupted))
    assert result.returncode == 0
    assert "has already finished" in result.stdout
    assert before == {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*.jsonl")}


def test_another_configuration_is_refused_and_named(corpus: Path, uninterrupted: Path) -> None:
    for override, named in (
        ("optim.lr=0.01", "optim.lr=0.003, and now it is 0.01"),
        ("norm=rms", "norm.name=batch, and now it is rms"),
    ):
        result = run_program(*command(corpus, uninterrupted, override))
        assert result.returncode == 78
        assert named in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_second_writer_exits_75_and_names_the_first(corpus: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        result = run_program(*command(corpus, tmp_path / "run"))
    assert result.returncode == 75
    assert f"process {os.getpid()}" in result.stderr


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        pass


def test_the_default_run_directory_follows_from_the_configuration(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    a = train(config("run_dir=null"), root=tmp_path)
    again = train(config("run_dir=null"), root=tmp_path)
    assert a == again
    assert len(list(tmp_path.iterdir())) == 1
    train(config("run_dir=null", "seed=2"), root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_is_full_ends_with_74_and_keeps_the_old_checkpoint(
    corpus: Path, tmp_path: Path
) -> None:
    """A limit on file size simulates the full disk: the second checkpoint exceeds it."""
    run_dir = tmp_path / "run"
    args = command(corpus, run_dir, "train.stats_every=0")
    process = start(*args)
    wait_for_step(process, run_dir, 6)
    process.kill()
    process.wait()
    kept = checkpoint.checkpoints(run_dir)[0]
    size = (kept / "model.safetensors").stat().st_size
    limit = "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limit += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}));"
    limit += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    train = str(REPO / "scripts" / "train.py")
    result = subprocess.run(
        [sys.executable, "-c", limit, train, *args], capture_output=True, text=True
    )
    assert result.returncode == 74, result.stderr
    assert result.stderr.count("\n") == 1
    assert "model.safetensors" in result.stderr
    assert checkpoint.is_valid(kept)


def test_a_config_error_leaves_a_locked_directory_unlocked(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    train(config())
    with pytest.raises(ConfigError):
        train(config("seed=5"))
    try:
        train(config())
    except Locked:
        pytest.fail("the lock was not released")
