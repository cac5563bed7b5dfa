"""All output of the program: text on stdout, warnings and errors on stderr, tables by rich."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.table import Table


class Terminal(Console):
    """Prints text unchanged. In a file or a pipe it has at least 120 columns, to fit names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, **options)
        if not self.is_terminal:
            self.width = max(self.width, 120)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with 1


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)


def show(table: Table) -> None:
    Terminal().print(table)


def warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def fail(line: str) -> None:
    with suppress(OSError):  # a full disk
        print(f"error: {line}", file=sys.stderr)
