"""The runs below a folder side by side: python scripts/report.py runs/norms

Prints their table and draws `loss.png` there: validation loss by step, one panel for each
placement and batch size, one line for each norm.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gpt import cli
from gpt.errors import MissingInput, UserError
from gpt.results import draw_curves, load_summaries, print_table


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("expected one folder of runs: python scripts/report.py runs/norms")
    folder = Path(sys.argv[1])
    summaries = load_summaries(folder)
    if not summaries:
        raise MissingInput(f"{folder}: no finished run below it")
    print_table(summaries)
    draw_curves(summaries, folder / "loss.png")
    print(folder / "loss.png")


if __name__ == "__main__":
    cli.run(main)
