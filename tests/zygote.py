"""Starts programs, each forked from this process, which has imported what takes seconds.

A request is a line of JSON on stdin, its answer a line on stdout: the arguments of `become` start a
program and give its process id; `[pid, flags]` wait for it and give its exit code as `subprocess`
has it, or null. Programs end as they do elsewhere, at the end of an interpreter.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys

import hydra.main  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import plotly.graph_objects  # noqa: F401
import scipy.stats  # noqa: F401
import tiktoken  # noqa: F401
import torch._dynamo  # noqa: F401  (which the first optimizer imports)


def become(argv: list[str], cwd: str, env: dict[str, str], files: list[str], timeout: int) -> None:
    """Be what `python *argv` is, with files for stdin, stdout and stderr."""
    for target, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDWR), target)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.alarm(timeout)  # a program that hangs is killed
    if argv[0] == "-m":
        sys.argv, sys.path[0] = argv[1:], cwd
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = argv, os.path.dirname(os.path.abspath(argv[0]))
        runpy.run_path(argv[0], run_name="__main__")
    sys.exit()


def wait(pid: int, flags: int) -> int | None:
    ended, status = os.waitpid(pid, flags)
    return os.waitstatus_to_exitcode(status) if ended else None


gc.collect()
gc.freeze()  # else each program's last sweep of the heap copies all of it, which takes a second
for line in sys.stdin:
    request = json.loads(line)
    answer = wait(*request) if isinstance(request, list) else os.fork() or become(**request)
    print(json.dumps(answer), flush=True)
