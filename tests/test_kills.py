"""Processes are stopped and killed for real: nothing is lost, nobody waits in vain."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from gpt.config import Config
from gpt.training.checkpoint import checkpoints
from gpt.training.trainer import train
from tests.tools.configs import curve, mostly_long, read_rows, tiny
from tests.tools.programs import REPO, run_program, start, torchrun

TRAIN = str(REPO / "scripts" / "train.py")


def test_a_closed_terminal_stops_a_run_with_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = tiny(corpus, f"run_dir={run_dir}", "train.steps=100000")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, TRAIN, *args])

    def read() -> None:
        with suppress(OSError):
            while os.read(terminal, 1 << 16):
                pass

    threading.Thread(target=read, daemon=True).start()
    wait_for_rows(run_dir, 20)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    step = read_rows(run_dir)[-1]["step"]
    assert checkpoints(run_dir)[0].name == f"step_{step}"


@pytest.mark.long
def test_a_hangup_is_ignored_under_nohup(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = tiny(corpus, f"run_dir={run_dir}", "train.steps=300")
    null = subprocess.DEVNULL
    process = subprocess.Popen(["nohup", sys.executable, TRAIN, *args], stdout=null, stderr=null)
    wait_for_rows(run_dir, 20)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0
    assert (run_dir / "DONE").exists()


@pytest.mark.parametrize("number", mostly_long([signal.SIGUSR1, signal.SIGHUP], signal.SIGUSR1))
def test_these_signals_stop_a_run_as_sigterm_does(
    number: signal.Signals, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(*tiny(corpus, f"run_dir={run_dir}", "train.steps=100000"))
    wait_for_rows(run_dir, 20)
    process.kill(number)
    assert process.wait().returncode == 128 + number
    assert checkpoints(run_dir)[0].name == f"step_{read_rows(run_dir)[-1]['step']}"


SLOW = """
import os, signal, time
from gpt.norms import Norm, register

@register("slow")
class Slow(Norm):
    axes = ()
    step = 0

    def __init__(self, n_embd):
        super().__init__()

    def begin_step(self, step, steps):
        self.step = step

    def forward(self, x):
        if self.step == 3 and self.training:
            for _ in range(2):  # the second arrives while the step goes on
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return x
"""


def test_a_second_signal_ends_the_process_at_once(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    own = ["norm=module", f"norm.module={tmp_path}/slow.py", "norm.name=slow"]
    own += ["train.steps=9", "train.checkpoint_every=9"]
    started = time.monotonic()
    result = run_program(*tiny(corpus, *own, f"run_dir={tmp_path}/run"))
    assert result.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - started < 50
    assert not checkpoints(tmp_path / "run")


def wait_for_rows(run_dir: Path, count: int) -> None:
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        assert time.monotonic() < deadline, "the run does not start"
        time.sleep(0.01)


@pytest.mark.long
def test_a_kill_inside_a_checkpoint_s_writing_loses_nothing(corpus: Path, tmp_path: Path) -> None:
    size = ["model.n_embd=128", "train.checkpoint_every=1", "train.steps=30"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_program(*tiny(corpus, *size, f"run_dir={whole}")).returncode == 0
    torn = 0
    for _ in range(6):
        process = start(*tiny(corpus, *size, f"run_dir={killed}"))
        while process.poll() is None and not list(killed.glob("checkpoints/*.tmp/model*")):
            pass
        process.kill()
        process.wait()
        torn += bool(list(killed.glob("checkpoints/*.tmp")))
        if torn == 2:
            break
    assert torn, "no kill met a checkpoint's writing"
    assert run_program(*tiny(corpus, *size, f"run_dir={killed}")).returncode == 0
    assert curve(killed) == curve(whole)
    name = "checkpoints/step_30/model.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert not list(killed.glob("checkpoints/*.tmp"))


def test_a_killed_sweep_skips_what_is_finished_and_resumes_the_rest(
    corpus: Path, tmp_path: Path
) -> None:
    args = tiny(corpus, "train.steps=60", "train.checkpoint_every=5", "seed=1,2,3")
    args = [arg for arg in args if not arg.startswith("run_dir=")]
    sweep, alone = tmp_path / "sweep", tmp_path / "alone"
    process = start("-m", *args, f"hydra.sweep.dir={sweep}")
    while not (list(sweep.glob("*-s1-*/DONE")) and list(sweep.glob("*-s2-*/checkpoints/step_1*"))):
        assert process.poll() is None, process.wait()
        time.sleep(0.005)
    process.kill()
    process.wait()
    (first,) = sweep.glob("*-s1-*/DONE")
    (second,) = sweep.glob("*-s2-*")
    assert not (second / "DONE").exists()
    before = first.stat().st_mtime_ns
    assert run_program("-m", *args, f"hydra.sweep.dir={sweep}").returncode == 0
    assert first.stat().st_mtime_ns == before
    for seed in (2, 3):
        one = [*args[:-1], f"seed={seed}", f"run_dir={alone}/{seed}"]
        assert run_program(*one).returncode == 0
        (ours,) = sweep.glob(f"*-s{seed}-*")
        assert curve(ours) == curve(alone / str(seed))
        name = "checkpoints/step_60/model.safetensors"
        assert (ours / name).read_bytes() == (alone / str(seed) / name).read_bytes()


def workers_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.long
def test_a_process_that_is_stopped_does_not_hang_the_others(corpus: Path, tmp_path: Path) -> None:
    """torch's own limit is 30 minutes."""
    run_dir = tmp_path / "run"
    args = tiny(corpus, "train.steps=1000000", f"run_dir={run_dir}", "distributed.timeout=0.1")
    process = torchrun(*args)
    wait_for_rows(run_dir, 20)
    stopped = workers_of(process.pid)[-1]
    os.kill(stopped, signal.SIGSTOP)
    ended = process.wait()
    assert ended.returncode != 0
    assert "did not answer for distributed.timeout=0.1 minutes; the same command" in ended.stderr


@pytest.mark.long
def test_processes_whose_torchrun_was_killed_save_and_end(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = torchrun(*tiny(corpus, "train.steps=1000000", f"run_dir={run_dir}"))
    wait_for_rows(run_dir, 20)
    workers = workers_of(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/stat").exists() for pid in workers):
        assert time.monotonic() < deadline, "a process trains on"
        time.sleep(0.1)
    assert checkpoints(run_dir)[0].name == f"step_{read_rows(run_dir)[-1]['step']}"


@pytest.mark.long
def test_torchrun_restarts_a_run_that_lost_a_process(corpus: Path, tmp_path: Path) -> None:
    """After a restart gloo's processes sometimes wait for each other in vain: then the timeout ends
    them, and torchrun restarts once more."""
    run_dir = tmp_path / "run"
    args = tiny(corpus, "train.steps=300", "train.checkpoint_every=10", f"run_dir={run_dir}")
    args.append("distributed.timeout=0.2")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [sys.executable, *launch, "--max-restarts=5", TRAIN, *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not checkpoints(run_dir):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "resuming" in printed
    assert [row["step"] for row in read_rows(run_dir) if "lr" in row] == list(range(1, 301))


def test_another_number_of_processes_is_told(
    config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpt.training.checkpoint import FILES, write_manifest

    train(config())
    (tmp_path / "run" / "DONE").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_6")
    state = tmp_path / "run" / "checkpoints" / "step_4" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"processes": 2}))
    write_manifest(state.with_name("manifest.json"), FILES)
    capsys.readouterr()
    train(config())
    assert "ran on 2 processes and resumes on 1" in capsys.readouterr().err
