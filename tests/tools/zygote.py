"""Starts programs by forking this process, which has already imported the slow modules.

A request is a line of JSON on stdin; its answer is a line on stdout. The arguments of `become`
start a program; the answer is its process id. `[pid, flags]` waits for it; the answer is its exit
code as `subprocess` gives it, or null. A program's threads and exit handlers end as usual. The
interpreter is then shut down only on request (`whole`), because that takes longer than most
programs here.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

SAMPLE_TOKENS = 20  # length of a run's sample; 200 take longer than a tiny training


def become(
    argv: list[str], cwd: str, env: dict[str, str], files: list[str], timeout: int, whole: bool
) -> None:
    """Run as `python *argv`, with files for stdin, stdout and stderr."""
    for target, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDWR), target)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.alarm(timeout)  # a program that hangs is killed
    try:
        if argv[0] == "-m":
            sys.argv, sys.path[0] = argv[1:], cwd
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = argv, os.path.dirname(os.path.abspath(argv[0]))
            runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        if whole or not isinstance(ended.code, int | None):
            raise
        code = ended.code or 0
    if whole:
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as an interpreter does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(pid: int, flags: int) -> int | None:
    ended, status = os.waitpid(pid, flags)
    return os.waitstatus_to_exitcode(status) if ended else None


def serve() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import hydra.main  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import plotly.graph_objects  # noqa: F401
    import torch._dynamo  # noqa: F401  (which the first optimizer imports)

    import gpt.cli.sweep
    import gpt.reports.page
    import gpt.training.trainer

    gpt.training.trainer.SAMPLE_TOKENS = SAMPLE_TOKENS
    gc.collect()
    gc.freeze()  # else each program's last collection copies the whole heap, which takes a second
    for line in sys.stdin:
        request = json.loads(line)
        answer = wait(*request) if isinstance(request, list) else os.fork() or become(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
