"""Errors on the command line: each becomes one line with its exit code, also Hydra's."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from gpt.common.errors import (
    IO_ERROR,
    NO_MEMORY,
    ConfigError,
    Diverged,
    MissingInput,
    ProcessLost,
    UserError,
    nearest,
)
from gpt.common.terminal import fail

TRACEBACK = "GPT_TRACEBACK"  # set it to see the whole traceback of an error
EXAMPLES = {"sample.py": "run_dir=DIR", "prepare.py": "data=stdlib"}  # an override for each
LAUNCHERS = ("joblib", "ray", "submitit_local", "submitit_slurm")  # extras: joblib, ray, submitit
LOST = ("TerminatedWorkerError", "UncompletedJobError")  # raised for killed runs


Job = Callable[[DictConfig], None]


class Failed(Exception):
    """An error that was already reported. It holds no reference to the run that raised it."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code


def one_line_errors(job: Job) -> Job:
    """Decorate a Hydra job: an error ends it with one line and an exit code.

    In a sweep Hydra then continues with the other runs and raises the first error at the end.
    """

    @wraps(job)
    def guarded(raw: DictConfig) -> None:
        try:
            return job(raw)
        except Exception as error:
            code = tell(error)
            diverged = isinstance(error, Diverged)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            if diverged:
                return None  # divergence is a result
            raise Failed(code)
        sys.exit(code)  # Hydra passes SystemExit on unchanged

    return guarded


def run(app: Callable[[], None]) -> None:
    """Run a script's main function; an error becomes one line on stderr and an exit code."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing
    argparse.ArgumentParser.error = refuse_usage  # type: ignore[assignment, method-assign]
    open_streams()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, so that a closed pipe is handled below
    except Failed as failed:
        sys.exit(failed.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        sys.exit(tell(error))


def open_streams() -> None:
    """Make stdout and stderr accept any text: they may be closed (`>&-`) or unable to encode it."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            with suppress(OSError):  # its number must not become that of a file of the run
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")


def refuse_usage(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Replaces argparse's error method, also for Hydra: one line without the usage text."""
    hint = "; an override is KEY=VALUE" if parser.description == "Hydra" else ""
    raise UserError(f"{parser.prog}: {message}{hint}; see --help")


def tell(error: Exception) -> int:
    """Print one line on stderr, or a bug's whole traceback, and return the exit code."""
    if isinstance(error, BrokenPipeError):  # the reader closed the pipe: `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    message, code = explain(error)
    if code is None or os.environ.get(TRACEBACK):
        traceback.print_exception(error)
        return code or 1
    fail(message)
    return code


def explain(error: Exception) -> tuple[str, int | None]:
    """The one line and the exit code for `error`; the code is None for a bug."""
    if isinstance(error, UserError):
        return " ".join(str(error).split()), error.exit_code
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain_hydra(error), ConfigError.exit_code
    if "Config group override must be" in str(error):  # Hydra's ValueError for norm=null
        return f"{error}; a group such as norm or placement takes a name", ConfigError.exit_code
    if type(error).__name__ in LOST:  # the launcher's first two lines and the last of the log
        lines = [line for line in str(error).splitlines() if line.strip()]
        said = " ".join(" ".join([*lines[:2], *lines[3:][-1:]]).split())
        message = f"a process of the sweep has ended: {said}"
        return f"{message}; the same command continues with the rest", ProcessLost.exit_code
    if 'Could not detect "srun"' in str(error):  # submitit's RuntimeError
        where = "this machine has no srun; run it on a Slurm cluster"
        return f"hydra/launcher=submitit_slurm: {where}", MissingInput.exit_code
    if isinstance(error, OSError):
        number = "" if error.errno is None else f" (errno {error.errno})"
        return f"{error.filename or 'output'}: {error.strerror or error}{number}", IO_ERROR
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        first = text.splitlines()[0].rpartition("] ")[2] if text else "no reason given"
        hint = "use a smaller train.batch_size or model"
        return f"out of memory: {first}; {hint}", NO_MEMORY
    if "No working C++ compiler" in text:
        hint = "install one or use compile=false"
        return f"compile=true: no working C++ compiler; {hint}", MissingInput.exit_code
    return str(error), None


def explain_hydra(error: Exception) -> str:
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = sorted(error.options)
        if group == "hydra/launcher" and name in LAUNCHERS:
            return f"{group}={name}: not installed; pip install -e '.[{name.partition('_')[0]}]'"
        missing = f"{group}={name}: there is no configs/{group}/{name}.yaml"
        return f"{missing}; expected one of {', '.join(options)}{nearest(name, options)}"
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            example = EXAMPLES.get(Path(sys.argv[0]).name, "norm=layer")
            return f"{error.override}: expected KEY=VALUE, such as {example}"
        twice = f"\"{error.override.partition('=')[0]}='VALUE'\""
        return f"{error.override}: Hydra cannot read the value; quote it twice: {twice}"
    if "Ambiguous value" in str(error):  # several values without -m
        override = str(error).splitlines()[0].partition("'")[2].rstrip("'")
        return f"{override}: expected one value; add -m to run several in turn"
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    key = getattr(cause, "full_key", None)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        composed = cause.parent_node._get_root()
        group = str(key).partition(".")[0]
        owner = OmegaConf.select(composed, f"{group}.name", throw_on_missing=False)
        subject = f"{group}={owner} has " if owner else ""  # a sweep may have several
        return f"{key}: {subject}no such key{similar_key(str(key), composed)}"
    if key:
        return f"{key}: {str(cause).splitlines()[0]}"
    if str(error).startswith("Could not override"):  # a group that only another script has
        key = str(error).split("'")[1]
        return f"{key}: {Path(sys.argv[0]).name} has no such key; see --help"
    return " ".join(str(error).split())


def similar_key(key: str, config: DictConfig) -> str:
    """`; did you mean 'train.steps'?`, for `train.stpes` and for `steps`."""
    keys = dotted(OmegaConf.to_container(config, resolve=False), "")
    options = [option for option in keys if not option.startswith("hydra")]
    parent, _, name = key.rpartition(".")
    beside = [option for option in options if option.rpartition(".")[0] == parent]
    namesakes = [option for option in options if option.rpartition(".")[2] == name]
    for candidates in (namesakes, beside, options):
        by_name = {o.rpartition(".")[2]: o for o in reversed(candidates)}
        for found in get_close_matches(name, by_name, n=1):
            return f"; did you mean {by_name[found]!r}?"
    return ""


def dotted(content: object, prefix: str) -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield f"{prefix}{key}"
            yield from dotted(value, f"{prefix}{key}.")
