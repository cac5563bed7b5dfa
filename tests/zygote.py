"""Runs scripts, each in a process forked from this one, which has imported what takes seconds.

A request is a line of JSON on stdin, the arguments of `become`. The answer is a line on stdout: the
exit code as `subprocess` has it. Scripts end as they do elsewhere, at the end of an interpreter.
"""

from __future__ import annotations

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
    """Make this process what `python *argv` is, with files for stdin, stdout and stderr."""
    for target, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDWR), target)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
    signal.alarm(timeout)  # a script that hangs is killed


for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        become(**json.loads(line))
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
