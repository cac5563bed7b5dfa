"""Faults that are provoked for real: closed terminals, full disks, kills and damaged files."""

from __future__ import annotations

import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt.common.errors import UserError
from gpt.config import Config
from gpt.data.batches import windows
from gpt.data.readers import read_texts
from gpt.data.tokenizer import byte_ranks, encode
from gpt.data.tokens import HEADER_BYTES, open_tokens, prepare
from gpt.training.checkpoint import checkpoints, load_model
from gpt.training.trainer import train
from tests.tools.configs import curve, make_config, mostly_long, overrides, read_rows
from tests.tools.programs import REPO, run_program, start, torchrun

Result = TypeVar("Result")
TRAIN = str(REPO / "scripts" / "train.py")


def tiny(corpus: Path, *more: str) -> list[str]:
    return overrides("data=text", f"data.path={corpus}", *more)


def real(*argv: str, **options: object) -> subprocess.CompletedProcess[str]:
    """`python *argv` as a process of its own: its streams and environment are as given."""
    command = [sys.executable, *argv]
    return subprocess.run(command, text=True, timeout=120, **options)  # type: ignore[call-overload, no-any-return]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a disk of `size` at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a disk is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_output_that_the_terminal_cannot_encode_is_escaped(corpus: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    args = tiny(corpus, f"run_dir={tmp_path}/ü", "train.steps=2")
    result = real(TRAIN, *args, env=env, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert r"/\xfc" in result.stdout
    assert result.stdout.isascii()


def test_a_closed_output_is_no_error(corpus: Path, tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$0" "$@" >&- 2>&-', sys.executable, TRAIN]
    closed = subprocess.run([*command, *tiny(corpus, f"run_dir={tmp_path}/run")])
    assert closed.returncode == 0
    assert (tmp_path / "run" / "DONE").exists()


def test_a_name_that_is_not_utf8_is_refused_before_training(tmp_path: Path) -> None:
    """It could be trained, and then neither resumed nor sampled."""
    result = real(TRAIN, os.fsdecode(b"run_dir=r/d\xfc"), cwd=tmp_path, capture_output=True)
    assert result.returncode == 78
    assert "not UTF-8" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_directory(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zsh passes run_dir=~/x as it is typed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(corpus, tmp_path / "text.txt")
    text = overrides("data=text", "data.path=~/text.txt", "train.steps=2")
    assert run_program(*text, "run_dir=~/a", cwd=tmp_path).returncode == 0
    warm = [*text, "init.from=~/a", "hydra.sweep.dir=~/sweep", "seed=1,2"]
    assert run_program("-m", *warm, cwd=tmp_path).returncode == 0
    assert run_program("run_dir=~/a", script="sample", cwd=tmp_path).returncode == 0
    assert run_program("~/sweep", script="report", cwd=tmp_path).returncode == 0
    assert len(list((tmp_path / "sweep").glob("*/DONE"))) == 2
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["model.n_embd=400000", "model.n_head=2"], 71, "out of memory: "),
        (["train.batch_size=2000000000"], 78, "train.batch_size=2000000000: expected at most"),
        (["init.from=runs/x", "init.swap_norm=5"], 78, "init.swap_norm=5: expected anneal"),
    ],
)
def test_what_this_machine_cannot_do_is_one_line(
    args: list[str], code: int, message: str, corpus: Path, tmp_path: Path
) -> None:
    result = run_program(*tiny(corpus, f"run_dir={tmp_path}/run", *args))
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.long
def test_a_missing_compiler_is_one_line(corpus: Path, tmp_path: Path) -> None:
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    env = {**os.environ, "CXX": "/nonexistent", **cache}
    args = tiny(corpus, f"run_dir={tmp_path}/run", "compile=true")
    result = real(TRAIN, *args, env=env, capture_output=True)
    assert result.returncode == 66, result.stderr
    assert "error: compile=true: no working C++ compiler; install one" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_prompt_that_hydra_takes_for_missing_is_one_line() -> None:
    result = run_program("run_dir=runs/x", "prompt=???", script="sample")
    assert (result.returncode, result.stderr.count("\n")) == (78, 1)


@given(st.text(" \n\u3000\x1ca1.", max_size=30))
def test_a_long_run_of_spaces_is_cut_where_gpt2_s_pattern_splits_it(text: str) -> None:
    """Its pattern overflows tiktoken's stack on 1.2 million spaces before a letter."""
    import tiktoken
    from tiktoken_ext import openai_public

    from gpt.data import tokenizer

    ranks = {token: rank for rank, token in enumerate(byte_ranks())}
    for rank in range(2, 12):  # runs of spaces are tokens, so that a wrong cut shows
        ranks[b" " * rank] = len(ranks)
    gpt2 = tiktoken.Encoding(
        "gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )
    with pytest.MonkeyPatch.context() as patch:
        short = tokenizer.SPACES.pattern.replace("100000", "3")
        patch.setattr(tokenizer, "SPACES", tokenizer.re.compile(short))
        assert encode(gpt2, text) == gpt2.encode_ordinary(text)


def test_a_million_spaces_before_a_letter_are_tokens_of_gpt2() -> None:
    import tiktoken
    from tiktoken_ext import openai_public

    ranks = {token: rank for rank, token in enumerate(byte_ranks())}
    gpt2 = tiktoken.Encoding(
        "gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )
    assert len(encode(gpt2, "a" + " " * 1_200_000 + "b")) == 1_200_002


def test_a_full_disk_names_the_file_and_the_error(corpus: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "runs", "60k"):
        args = tiny(corpus, f"run_dir={tmp_path}/runs/x", "train.steps=4000", "train.stats_every=1")
        result = run_program(*args, "train.checkpoint_every=4000")
    assert result.returncode == 74, result.stderr
    assert "jsonl: No space left on device (errno 28)" in result.stderr
    assert result.stderr.count("\n") == 1
    with small_disk(tmp_path / "data", "8k"):
        args = tiny(corpus, f"run_dir={tmp_path}/y")
        result = run_program(*args, GPT_DATA=str(tmp_path / "data"))
    assert result.returncode == 74, result.stderr
    assert "No space left on device (errno 28)" in result.stderr
    assert f"{tmp_path}/data/" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.long
def test_a_full_disk_for_wandb_is_one_warning(corpus: Path, tmp_path: Path) -> None:
    """Its thread once printed 62 lines."""
    run_dir = tmp_path / "run"
    args = tiny(corpus, f"run_dir={run_dir}", "train.checkpoint_every=2")
    begun = start(*args, "train.steps=40")
    while not checkpoints(run_dir):
        time.sleep(0.01)
    begun.kill(signal.SIGTERM)
    begun.wait()
    with small_disk(run_dir / "wandb", "16k"):
        result = real(TRAIN, *args, "train.steps=40", "wandb.mode=offline", capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("warning: wandb failed; the run goes on without it")
    assert result.stderr.count("\n") == 1


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(make_config("data=text", f"data.path={corpus}", "norm=batch", f"run_dir={run_dir}"))
    return run_dir


@pytest.mark.parametrize("seed", mostly_long(range(9), 0))
def test_a_damaged_file_of_a_run_gives_the_same_result_or_one_line(
    seed: int, finished: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bits are flipped and ends cut off, in every file that is read again."""
    rng = random.Random(seed)
    cfg = make_config("data=text", f"data.path={corpus}", "norm=batch", f"run_dir={finished}")
    right = {step: load_model(finished, step).state_dict() for step in (4, 6)}
    summary = train(cfg, quiet=True)
    files = [path for path in finished.rglob("*") if path.is_file() and path.name[0] != "."]
    assert len(files) == 15
    for path in files:
        whole = path.read_bytes()
        for cut in (True, False, False):
            damaged = bytearray(whole)
            place = rng.randrange(len(whole))
            damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged[:place] if cut else damaged)
            result = result_or_line(lambda: train(cfg, quiet=True))
            assert result in (None, summary)
            model = result_or_line(lambda: load_model(finished))
            assert model is None or any(equal(model.state_dict(), r) for r in right.values())
        path.write_bytes(whole)
    assert train(cfg, quiet=True) == summary
    capsys.readouterr()


def result_or_line(call: Callable[[], Result]) -> Result | None:
    """The result, or None if it is an error of one line."""
    try:
        return call()
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    return None


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_tokens_beyond_4_gb_are_read_where_they_are(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    """A sparse file: it takes no room on the disk."""
    small = prepare(config()).train.path
    path = tmp_path / "train.bin"
    head = small.read_bytes()[:HEADER_BYTES]
    count = 3 << 30  # of two bytes
    n_tokens = json.loads(head[head.index(b"{") :])["n_tokens"]
    head = head.replace(f'"n_tokens": {n_tokens},'.encode(), f'"n_tokens": {count},'.encode())
    last = np.arange(1, 101, dtype="<u2")
    with path.open("wb") as file:
        file.write(head.rstrip().ljust(HEADER_BYTES - 1) + b"\n")
        file.seek(HEADER_BYTES + 2 * count - last.nbytes)
        file.write(last.tobytes())
    tokens = open_tokens(path)
    (window,) = windows(tokens.ids, np.array([count - 33]), 32)
    assert window.tolist() == list(range(68, 101))
    assert path.stat().st_blocks * 512 < 1 << 20


@pytest.mark.long
def test_a_text_beyond_4_gb_is_cut_at_nine_tenths(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    with path.open("wb") as file:
        for _ in range(5 << 10):
            file.seek((1 << 20) - 1, 1)
            file.write(b"\n")
    sizes = {"train": 0, "val": 0}
    for split, text in read_texts([path]):
        sizes[split] += len(text)
    assert sizes == {"train": (5 << 30) * 9 // 10, "val": (5 << 30) - (5 << 30) * 9 // 10}


def test_a_run_directory_can_be_moved(finished: Path, tmp_path: Path, corpus: Path) -> None:
    moved = Path(shutil.copytree(finished, tmp_path / "moved"))
    load_model(moved)
    cfg = make_config("data=text", f"data.path={corpus}", "norm=batch", f"run_dir={moved}")
    assert train(cfg, quiet=True)["steps"] == 6
