"""The program as a user runs it: in separate processes, which can be killed."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]


class Process:
    """`python *argv` with torch already imported, which saves seconds. Like `subprocess.Popen`."""

    def __init__(
        self, argv: list[str], cwd: Path, timeout: int, whole: bool = False, **env: str
    ) -> None:
        self.argv, self.folder = argv, Path(tempfile.mkdtemp())
        self.returncode: int | None = None
        files = [self.folder / "out", self.folder / "err"]
        for file in files:
            file.touch()
        self.pid = ask(
            argv=argv,
            cwd=str(cwd),
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", **env},
            files=[os.devnull, *map(str, files)],
            timeout=timeout,
            whole=whole,
        )

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = ask(self.pid, os.WNOHANG)
        return self.returncode

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait until it ends; return what it printed."""
        if self.returncode is None:
            self.returncode = ask(self.pid, 0)
        printed = [(self.folder / name).read_text() for name in ("out", "err")]
        shutil.rmtree(self.folder)
        assert self.returncode is not None
        return subprocess.CompletedProcess(self.argv, self.returncode, *printed)


def ask(*pid_and_flags: int, **program: Any) -> Any:
    """Send a request to zygote.py, which describes the format."""
    process = zygote()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(program or pid_and_flags) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


@cache
def zygote() -> subprocess.Popen[str]:
    """Start zygote.py; it ends with the process that started it."""
    command = [sys.executable, str(REPO / "tests" / "tools" / "zygote.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)
    atexit.register(process.communicate)
    return process


def start(
    *args: str, script: str = "train", cwd: Path = REPO, whole: bool = False, **env: str
) -> Process:
    return Process([str(REPO / "scripts" / f"{script}.py"), *args], cwd, 120, whole, **env)


def run_program(
    *args: str, script: str = "train", cwd: Path = REPO, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does; return what it printed."""
    return start(*args, script=script, cwd=cwd, **env).wait()


def run_pytest(*args: str) -> subprocess.CompletedProcess[str]:
    options = ["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    options += ["-W", "ignore:Module already imported"]  # the zygote did: hydra's plugin
    return Process([*options, *args], REPO, timeout=120).wait()


def torchrun(*args: str) -> Process:
    """Train in two processes that torchrun starts."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return Process([*launch, str(REPO / "scripts" / "train.py"), *args], REPO, timeout=120)


def run_ranks(*args: str) -> subprocess.CompletedProcess[str]:
    """Train in two processes, as torchrun starts them; return what both printed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [start(*args, whole=True, **world, RANK=i, LOCAL_RANK=i) for i in "01"]
    ended = [rank.wait() for rank in ranks]
    failed = ended[0].returncode or ended[1].returncode
    printed = ("".join(e.stdout for e in ended), "".join(e.stderr for e in ended))
    return subprocess.CompletedProcess(ranks[0].argv, failed, *printed)
