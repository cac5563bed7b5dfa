"""Write a run as a model of Hugging Face: python scripts/export.py run_dir=DIR to=OUT

`transformers.AutoModelForCausalLM` and `AutoTokenizer` load OUT. step=N takes that checkpoint; the
newest is the default.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gpt.cli.errors import run
from gpt.common.errors import UserError
from gpt.common.terminal import say


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        return say(__doc__)
    given = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    if not {"run_dir", "to"} <= given.keys() <= {"run_dir", "to", "step"}:
        raise UserError("expected python scripts/export.py run_dir=DIR to=OUT [step=N]")
    if not given.get("step", "1").isdecimal():
        raise UserError(f"step={given['step']}: expected the number of a checkpoint")
    from gpt.training.export import export

    step = int(given["step"]) if "step" in given else None
    for path in export(Path(given["run_dir"]), Path(given["to"]), step):
        say(str(path))


if __name__ == "__main__":
    run(main)
