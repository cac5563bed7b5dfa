"""A run's directory: one configuration, one process that writes; and signals that stop a run."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt.common.errors import ConfigError, Locked
from gpt.common.files import flatten, write_manifest
from gpt.config import Config, load_config

RESULTS = ("config.yaml", "tokenizer.json", "metrics.jsonl", "stats.jsonl", "summary.json",
           "sample.txt")  # fmt: skip


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Inside, no other process trains in `run_dir`. Locked is raised, with the other's name, if one
    already does.

    A run that is refused before it starts leaves nothing behind.
    """
    refuse_foreign_folder(run_dir)
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    holder = run_dir / ".holder"
    try:
        with FileLock(run_dir / ".lock", timeout=0):  # freed however a process ends
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            try:
                yield
            finally:
                if not (run_dir / "metrics.jsonl").exists():
                    for name in (".lock", ".holder"):
                        (run_dir / name).unlink(missing_ok=True)
                    with suppress(OSError):  # another process has begun something there
                        for path in made:
                            path.rmdir()
    except Timeout as error:
        by = holder.read_text() if holder.exists() else "another process"
        raise Locked(
            f"run_dir={run_dir}: {by} is training there; wait or use another run_dir"
        ) from error


def refuse_foreign_folder(run_dir: Path) -> None:
    """Raise ConfigError if `run_dir` has files, but is not a run: a run would overwrite some."""
    if run_dir.is_dir():
        names = sorted(path.name for path in run_dir.iterdir())
        if names and "config.yaml" not in names and ".holder" not in names:
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            raise ConfigError(
                f"run_dir={run_dir}: the folder has {shown} and no config.yaml, so it is not a "
                "run; use a new or an empty folder"
            )


def mark_done(run_dir: Path) -> None:
    """Write DONE, the SHA-256 of the files that a finished run leaves to read."""
    write_manifest(run_dir / "DONE", [name for name in RESULTS if (run_dir / name).exists()])


def refuse_another_configuration(run_dir: Path, cfg: Config) -> None:
    """Raise ConfigError if `run_dir` holds a run with other settings; it names the first one."""
    path = run_dir / "config.yaml"
    if not path.exists():
        return
    there, here = flatten(load_config(path).identity(), "."), flatten(cfg.identity(), ".")
    # `norm.name` comes before the settings that follow from it.
    for key in sorted(there.keys() | here.keys(), key=lambda k: (not k.endswith(".name"), k)):
        if repr(there.get(key)) != repr(here.get(key)):  # 1 and 1.0 have different hashes
            raise ConfigError(
                f"{path}: the run has {key}={there.get(key)}, and now it is {here.get(key)}; a run "
                "keeps its configuration, so use the same values or another run_dir"
            )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside, SIGINT, SIGTERM, SIGHUP (a closed terminal) and SIGUSR1 only append to the list, so
    that the current step can finish. A second signal ends the process at once."""
    caught: list[int] = []
    terminals = [descriptor for descriptor in (1, 2) if is_terminal(descriptor)]

    def note(number: int, _: Any) -> None:
        if caught:
            os._exit(128 + number)
        caught.append(number)
        if number == getattr(signal, "SIGHUP", None):
            for descriptor in terminals:  # they are gone, and writing to them would fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)  # as nohup wants it
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python delivers signals to the main thread only
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def is_terminal(descriptor: int) -> bool:
    with suppress(OSError):  # closed
        return os.isatty(descriptor)
    return False
