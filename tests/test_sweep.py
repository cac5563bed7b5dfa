"""Sweeps: every cell in a directory of its own, a table at the end, nothing done twice."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gpt.cli.errors import explain
from gpt.cli.sweep import count_runs, progress_table, sweep_dir
from gpt.probes.verdict import FUTURE, UNKNOWN
from gpt.reports.runs import load_runs, print_table
from tests.tools.configs import TINY, mostly_long
from tests.tools.programs import Process, run_program, start


def cells(folder: Path) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted(folder.rglob("summary.json"))]


def begin(corpus: Path, *args: str, cwd: Path, **env: str) -> Process:
    fixed = {**TINY, "data": "text", "data.path": str(corpus), "train.steps": 2}
    fixed = {k: v for k, v in fixed.items() if k not in {a.split("=")[0] for a in args}}
    return start("-m", *args, *(f"{k}={v}" for k, v in fixed.items()), cwd=cwd, **env)


def sweep(corpus: Path, *args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return begin(corpus, *args, cwd=cwd, **env).wait()


def test_a_sweep_makes_one_run_a_cell_and_ends_with_a_table(corpus: Path, tmp_path: Path) -> None:
    args = ("norm=layer,batch", "placement=pre,post")
    result = sweep(corpus, *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summaries = cells(tmp_path / "runs")
    assert len({(s["norm"], s["placement"]) for s in summaries}) == 4
    assert len({p.parent for p in (tmp_path / "runs").rglob("summary.json")}) == 4
    shown = result.stdout[result.stdout.index("best validation loss first") :]
    losses = [s["val_loss"] for s in sorted(summaries, key=lambda s: s["val_loss"])]
    positions = [shown.index(f"{loss:.4f}") for loss in losses]
    assert positions == sorted(positions)
    assert shown.count("leaky") == 2
    assert not (tmp_path / "outputs").exists()
    assert not (tmp_path / "multirun").exists()

    again = sweep(corpus, *args, cwd=tmp_path)
    assert again.stdout.count("has already finished") == 4
    assert len(cells(tmp_path / "runs")) == 4


def test_the_ready_sweep_is_norm_by_placement_by_batch_size(corpus: Path, tmp_path: Path) -> None:
    one = ("seed=1", "optim.lr=1e-3", "train.batch_size=2", "placement=pre")
    result = sweep(corpus, "sweep=norms", *one, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {s["norm"] for s in cells(tmp_path / "runs")} == {"layer", "rms", "dummy", "batch"}


def test_a_command_has_its_folder_in_any_order_and_another_command_another() -> None:
    def folder(*args: str) -> Path:
        path = sweep_dir(["-m", *args])
        assert path is not None
        return path

    assert folder("a=1,2", "b=3") == folder("b=3", "a=1,2", "hydra.verbose=true")
    assert len({folder("a=1,2", "b=3"), folder("a=1,2"), folder("a=1,3", "b=3")}) == 3
    assert folder("sweep=norms") == Path("runs/norms")
    assert folder("sweep=norms", "a=1").name.startswith("norms-")
    assert folder("hydra.sweep.dir=elsewhere", "a=1") == Path("elsewhere")
    assert sweep_dir(["a=1"]) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_failed_cell_is_named_and_the_others_go_on(corpus: Path, tmp_path: Path) -> None:
    result = sweep(corpus, "norm=cuda_layer,rms,layer", cwd=tmp_path)
    assert result.returncode == 66
    assert "error: norm 'cuda_layer' needs a CUDA device" in result.stderr
    assert {s["norm"] for s in cells(tmp_path / "runs")} == {"rms", "layer"}
    assert "best validation loss first" in result.stdout
    assert "1 of 3 have no result; the same command tries again" in result.stdout


@pytest.mark.skipif(find_spec("hydra_plugins.hydra_ray_launcher"), reason="it is installed")
def test_a_launcher_that_is_not_installed_is_named_with_its_extra(tmp_path: Path) -> None:
    result = run_program("-m", "norm=layer,rms", "hydra/launcher=ray", cwd=tmp_path)
    assert result.returncode == 78
    assert result.stderr == "error: hydra/launcher=ray: not installed; pip install -e '.[ray]'\n"


def test_leaky_validation_and_diverged_runs_are_listed_last_and_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {
        "val_bpb": 2.0, "train_loss": 2.0, "placement": "pre", "batch_size": 4, "seed": 1,
        "sees_in_training": [], "sees_in_evaluation": [], "tokens_per_s": 1.0,
    }  # fmt: skip
    for name, extra in {
        "good": {"val_loss": 3.0},
        "longer tokens": {"val_loss": 2.9, "val_bpb": 2.1},
        "worse": {"val_loss": None, "val_bpb": None, "train_loss": None, "diverged_at": 1},
        "bad": {"val_loss": 1.0, "diverged_at": 7},
        "cheat": {"val_loss": 0.1, "sees_in_evaluation": [FUTURE]},
        "odd": {"val_loss": 0.2, "sees_in_training": [UNKNOWN], "sees_in_evaluation": [UNKNOWN]},
    }.items():
        (tmp_path / name).mkdir()
        row = base | {"norm": name} | extra
        (tmp_path / name / "summary.json").write_text(json.dumps(row))
    runs = load_runs(tmp_path)
    order = ["good", "longer tokens", "cheat", "odd", "bad", "worse"]
    assert [run.summary["norm"] for run in runs] == order
    print_table(runs)
    shown = capsys.readouterr().out
    assert "diverged" in shown
    assert "0.1000 (leaky)" in shown
    assert "0.2000 (unknown)" in shown
    assert "2.0000 (unknown)" in shown


def test_the_table_names_what_differs(corpus: Path, tmp_path: Path) -> None:
    result = sweep(corpus, "optim.lr=0.001,0.002", "norm=layer,rms", cwd=tmp_path)
    assert result.stdout.count("layer-pre-bs4-s1337 optim.lr=0.001") == 1
    assert result.stdout.count("rms-pre-bs4-s1337 optim.lr=0.002") == 1


def test_a_folder_without_runs_is_one_line(tmp_path: Path) -> None:
    result = run_program(str(tmp_path), script="report")
    assert result.returncode == 66
    assert result.stderr == f"error: {tmp_path}: no finished run below it\n"


def test_the_flag_may_stand_anywhere(corpus: Path, tmp_path: Path) -> None:
    fixed = {**TINY, "data": "text", "data.path": str(corpus), "train.steps": 1}
    result = run_program(
        *(f"{k}={v}" for k, v in fixed.items()), "-m", "norm=layer,rms", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert len(cells(tmp_path / "runs")) == 2


def test_wrong_usage_ends_with_64(tmp_path: Path) -> None:
    assert run_program("--foo", cwd=tmp_path).returncode == 64
    assert run_program(script="report", cwd=tmp_path).returncode == 64
    assert run_program("--compare", "layer", script="norms").returncode == 64


@pytest.mark.parametrize("override", ["norm=layr", "train.batch_size=-1", "run_dir=one"])
def test_a_sweep_that_cannot_start_is_one_line_too(override: str, tmp_path: Path) -> None:
    result = run_program("-m", override, cwd=tmp_path)
    assert result.returncode == 78
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr


def test_runs_are_drawn(tmp_path: Path, corpus: Path) -> None:
    sweep(corpus, "norm=layer,dummy", cwd=tmp_path)
    folder = next((tmp_path / "runs").iterdir())
    result = run_program(str(folder), script="report")
    assert result.returncode == 0, result.stderr
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra.launcher.timeout_min=5"],
}


@pytest.mark.parametrize("launcher", mostly_long(LAUNCHERS, "joblib"))
def test_cells_run_in_processes_of_their_own_with_the_same_results(
    launcher: str, corpus: Path, tmp_path: Path
) -> None:
    args = ("norm=layer,dummy",)
    many = [f"hydra/launcher={launcher}", *LAUNCHERS[launcher]]
    for folder, extra in (("one", []), ("many", many)):
        (tmp_path / folder).mkdir()
        result = sweep(corpus, *args, *extra, cwd=tmp_path / folder)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "best validation loss first" in result.stdout
    found = [
        {s["config_hash"]: s["val_loss"] for s in cells(tmp_path / d)} for d in ("one", "many")
    ]
    assert len(found[0]) == 2
    assert found[0] == found[1]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc").exists(), reason="it looks for the process there")
def test_a_sweep_that_loses_a_process_says_so_and_goes_on_by_the_same_command(
    corpus: Path, tmp_path: Path
) -> None:
    args = ["norm=layer,dummy", "train.steps=150", "train.stats_every=0"]
    args += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    sweeping = begin(corpus, *args, cwd=tmp_path)
    while not list(tmp_path.glob("runs/*/*/checkpoints/step_*")):
        assert sweeping.poll() is None
        time.sleep(0.05)
    folders = [folder for folder in Path("/proc").glob("[0-9]*") if in_loky(folder, tmp_path)]
    os.kill(int(folders[0].name), signal.SIGKILL)
    lost = sweeping.wait()
    assert lost.returncode == 74
    line = lost.stderr.splitlines()[-1]
    assert "error: a process of the sweep has ended: A worker process managed by the" in line
    assert "SIGKILL(-9)}; the same command continues with the rest" in line
    assert "Traceback" not in lost.stderr
    again = sweep(corpus, *args, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert len(cells(tmp_path)) == 2


def in_loky(process: Path, cwd: Path) -> bool:
    """Whether it is a joblib worker in the folder `cwd`."""
    try:
        mine = (process / "cwd").readlink() == cwd
        return mine and b"LokyProcess" in (process / "cmdline").read_bytes()
    except OSError:  # it has ended or belongs to another user
        return False


def test_what_a_lost_job_left_in_its_log_is_said() -> None:
    class UncompletedJobError(Exception):
        """Named like submitit's."""

    log = "--------\n  File ...\nModuleNotFoundError: No module named 'torch'\n\n"
    error = UncompletedJobError(
        "Job 7 (task: 0) with path /x/7_0_result.pkl\nhas not produced any output "
        f"(state: TIMEOUT)\nError stream produced:\n{log}"
    )
    assert explain(error) == (
        "a process of the sweep has ended: Job 7 (task: 0) with path /x/7_0_result.pkl has not "
        "produced any output (state: TIMEOUT) ModuleNotFoundError: No module named 'torch'; the "
        "same command continues with the rest",
        74,
    )


def test_without_slurm_its_launcher_says_so(corpus: Path, tmp_path: Path) -> None:
    slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=any"]
    result = sweep(corpus, "norm=layer,rms", *slurm, cwd=tmp_path, PATH="/nowhere")
    assert result.returncode == 66
    assert result.stderr == (
        "error: hydra/launcher=submitit_slurm: this machine has no srun; run it on a Slurm "
        "cluster\n"
    )


def test_a_diverged_cell_is_a_result_and_is_not_run_again(corpus: Path, tmp_path: Path) -> None:
    args = ("norm=dummy,layer", "placement=none", "optim.lr=1e30", "optim.grad_clip=0",
            "train.steps=6")  # fmt: skip
    result = sweep(corpus, *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("diverged at step") == 2
    assert result.stdout.count("diverged at") == 2  # the table
    again = sweep(corpus, *args, cwd=tmp_path)
    assert again.stderr.count("earlier; it is not tried again") == 2
    assert again.returncode == 0


@pytest.mark.parametrize(
    ("argv", "count"),
    [
        (["-m", "norm=layer,rms", "placement=pre,post", "seed=1"], 4),
        (["-m", "sweep=norms"], 288),
        (["-m", "sweep=norms", "placement=pre", "seed=1"], 48),
        (["-m", "sweep=seeds"], 10),
        (["-m", "norm=layer,rms", "hydra/sweeper=optuna"], None),
        (["-m", "norm=glob(batch*)"], None),
        (["-m", "norm=[layer"], None),
    ],
)
def test_the_cells_of_a_sweep_are_counted(argv: list[str], count: int | None) -> None:
    assert count_runs(argv) == count


def test_the_live_table_follows_the_runs_files(corpus: Path, tmp_path: Path) -> None:
    sweep(corpus, "norm=layer,rms,dummy", cwd=tmp_path)
    folder = next((tmp_path / "runs").iterdir())
    half = sorted(folder.glob("rms*"))[0]
    (half / "DONE").unlink()
    lines = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(lines[:2]) + '{"step": 2, "lo')  # being written
    console = Console(width=100, file=io.StringIO())
    console.print(progress_table(folder, 4, time.time() - 60, done_before=0.0))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 of 4 done, 1 running, about 1 min left" in shown
    assert "1/2" in shown
    assert shown.index("begun") < shown.index("val loss")
    console.print(progress_table(folder, 4, time.time() + 9, done_before=0.0))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 of 4 done, 0 running, 1 to resume" in shown  # as a kill leaves it
