"""Several processes train as one does: the same losses, weights and BatchNorm statistics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from gpt.common import device
from gpt.common.device import resolve_device
from gpt.common.errors import ConfigError
from gpt.common.processes import processes
from gpt.training.run_dir import locked
from tests.tools.configs import mostly_long, overrides, read_rows
from tests.tools.programs import run_program, run_ranks, torchrun


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to be one of two processes that torchrun has started."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "2" if name.endswith("WORLD_SIZE") else "1")
    monkeypatch.setenv("MASTER_PORT", "1")


def test_without_torchrun_s_other_variables_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as some schedulers leave it
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 without RANK"), processes("cpu"):
        pass


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 processes, but 1 CUDA devices"), processes("cuda"):
        pass


def test_several_processes_leave_mps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torch backend exchanges MPS tensors between processes."""
    pretend(monkeypatch)
    with pytest.raises(ConfigError, match="device=mps: only one process"), processes("mps"):
        pass
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == "mps"
    monkeypatch.setattr(device, "world_size", lambda: 2)
    assert resolve_device("auto").type == "cpu"


@pytest.mark.parametrize(
    ("norm", "accum"),
    mostly_long(
        [("layer", 1), ("batch", 1), ("batch", 2), ("rbn", 1), ("power", 1)],
        ("layer", 1), ("batch", 2),
    ),
)  # fmt: skip
def test_two_processes_train_as_one_does(
    norm: str, accum: int, corpus: Path, tmp_path: Path
) -> None:
    """BatchNorm too: its statistics cover the whole batch, over all processes."""
    args = overrides(
        "data=text", f"data.path={corpus}", f"norm={norm}", f"train.grad_accum={accum}"
    )
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert run_program(*args, f"run_dir={alone}").returncode == 0
    args.append(f"run_dir={together}")
    result = run_ranks(*args)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("run        ") == 1  # only one process prints
    # A bias before a BatchNorm has a true gradient of 0; AdamW amplifies its rounding error into
    # steps, which show in the validation loss because it uses running statistics.
    for key, rel in (("loss", 1e-4), ("grad_norm", 1e-3), ("val_loss", 1e-3)):
        values = [[row[key] for row in read_rows(d) if key in row] for d in (alone, together)]
        assert values[0] == pytest.approx(values[1], rel=rel), key


def test_two_processes_resume_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    args = overrides("data=text", f"data.path={corpus}", "norm=batch", "model.dropout=0.1")
    run_dir = tmp_path / "run"
    assert run_ranks(*args, f"run_dir={run_dir}").returncode == 0
    whole = (run_dir / "checkpoints/step_6/model.safetensors").read_bytes()
    (run_dir / "DONE").unlink()
    for file in (run_dir / "checkpoints/step_6").iterdir():
        file.unlink()
    (run_dir / "checkpoints/step_6").rmdir()
    result = run_ranks(*args, f"run_dir={run_dir}")
    assert "resuming" in result.stdout
    assert (run_dir / "checkpoints/step_6/model.safetensors").read_bytes() == whole
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 6


def test_a_process_that_dies_ends_the_others_in_one_line(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = overrides("data=text", f"data.path={corpus}", "train.steps=100000", f"run_dir={run_dir}")
    process = torchrun(*args)
    while not ((run_dir / "metrics.jsonl").exists() and len(read_rows(run_dir)) > 20):
        assert process.poll() is None, process.wait()
        time.sleep(0.1)
    children = ["pgrep", "-P", str(process.pid)]
    workers = subprocess.run(children, capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    ended = process.wait()
    assert ended.returncode != 0
    gone = "error: another process of this run has ended; the same command"
    assert gone in ended.stderr
    assert "RuntimeError" not in ended.stderr  # torchrun's own traceback is there


BAD_ON_THE_SECOND = """
import os
from torch import nn
from gpt.norms import Norm, register

@register("bad")
class Bad(Norm):
    axes = ()
    step = 0

    def __init__(self, n_embd):
        super().__init__()

    def begin_step(self, step, steps):
        self.step = step

    def forward(self, x):
        return x * float("nan") if self.step == 3 and os.environ["RANK"] == "1" else x
"""


def test_a_divergence_on_any_process_names_its_site(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(BAD_ON_THE_SECOND)
    own = [f"norm.module={tmp_path}/bad.py", "placement.final_norm=bad", f"run_dir={tmp_path}/run"]
    result = run_ranks(*overrides("data=text", f"data.path={corpus}", *own))
    assert result.returncode == 17
    told = [line for line in result.stderr.splitlines() if "diverged at step 3" in line]
    assert len(told) == 2
    assert all("first in final_norm (after)" in line for line in told)


FADES_IN = """
import torch
from torch import nn
from gpt.norms import Norm, register

@register("fades_in")
class FadesIn(Norm):
    axes = ()
    late = False

    def __init__(self, n_embd):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))

    def begin_step(self, step, steps):
        self.late = 2 * step > steps

    def forward(self, x):
        return self.weight * x if self.late else x
"""


def test_a_norm_of_one_s_own_may_leave_parameters_out(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FADES_IN)
    own = [f"norm.module={tmp_path}/own.py", "placement.final_norm=fades_in"]
    args = overrides("data=text", f"data.path={corpus}", *own)
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert run_program(*args, f"run_dir={alone}").returncode == 0
    result = run_ranks(*args, f"run_dir={together}")
    assert result.returncode == 0, result.stderr[-2000:]
    losses = [[r["loss"] for r in read_rows(d) if "loss" in r] for d in (alone, together)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_second_start_leaves_the_files_of_the_first_alone(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    half_written = run_dir / "checkpoints" / "step_77.tmp"
    args = overrides("data=text", f"data.path={corpus}", f"run_dir={run_dir}")
    with locked(run_dir):
        half_written.mkdir(parents=True)
        result = run_ranks(*args)
    assert result.returncode == 75
    assert f"process {os.getpid()}" in result.stderr
    assert half_written.exists()


def test_a_sweep_in_several_processes_is_refused(tmp_path: Path) -> None:
    result = run_program("-m", "norm=layer,rms", cwd=tmp_path, WORLD_SIZE="2")
    assert result.returncode == 78
    assert result.stderr.startswith("error: each run of a sweep has one process")


def test_a_batch_that_cannot_be_shared_is_refused(corpus: Path, tmp_path: Path) -> None:
    args = overrides("data=text", f"data.path={corpus}", "train.batch_size=3")
    result = torchrun(*args, f"run_dir={tmp_path}/run").wait()
    assert result.returncode != 0
    assert "train.batch_size=3: expected a multiple of the 2 processes" in result.stderr
