"""Faults that are provoked for real: closed terminals, full disks, kills and damaged files."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from tests.tools.configs import make_config, mostly_long, overrides, tiny
from tests.tools.programs import REPO, run_program, start

Result = TypeVar("Result")
TRAIN = str(REPO / "scripts" / "train.py")


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
