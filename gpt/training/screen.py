"""What a run shows on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gpt.common.terminal import Terminal
from gpt.probes.verdict import verdict


class Screen:
    """Lines of text, and a progress bar during training; nothing if `quiet`."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        self.console = Terminal(soft_wrap=True, quiet=quiet)
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task("", total=total, loss="-", speed="-")

    def say(self, line: str, style: str = "") -> None:
        self.console.print(line, style=style)

    def evaluation(self, step: int, result: dict[str, float]) -> None:
        line = f"step {step:>6}  val loss {result['val_loss']:.4f}  "
        line += f"{result['val_bpb']:.4f} bits per byte"
        if "val_loss_batch_stats" in result:
            line += f"  (with the batch's own statistics: {result['val_loss_batch_stats']:.4f})"
        self.say(line)

    def steps_done(self, step: int, loss: float, speed: float | None) -> None:
        """speed: None for a step with statistics, which is slower; the last speed stays shown."""
        self.progress.update(self.task, completed=step, loss=f"{loss:.3f}")
        if speed is not None:
            self.progress.update(self.task, speed=f"{speed:,.0f}")

    def report(self, run_dir: Path, summary: dict[str, Any], sample: str) -> None:
        self.say("\n--- a sample " + "-" * 50)
        self.say(sample.strip("\n"))
        self.say("-" * 63)

        def seen(mode: str) -> str:
            what = summary[f"sees_in_{mode}"]
            return f"  ({verdict(what)}: tokens see {' and '.join(what)})" if what else ""

        train, val = f"{summary['train_loss']:.4f}", f"{summary['val_loss']:.4f}"
        self.say(f"train loss {train}  mean of the last steps{seen('training')}")
        self.say(f"val loss   {val}  {summary['val_bpb']:.4f} bits per byte{seen('evaluation')}")
        self.say(f"run        {run_dir}", style="bold")
