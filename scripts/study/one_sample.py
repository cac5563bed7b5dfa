"""Losses of BatchNorm models on one sample: python scripts/study/one_sample.py runs/norms

For every BatchNorm model below the folder, at its best learning rate: the loss of the token after a
context of T tokens, given alone, with the running statistics and with the context's own.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from gpt.config import load_config
from gpt.data.batches import ValBatches
from gpt.data.tokens import prepare
from gpt.norms.batch import batch_statistics
from gpt.reports.cells import in_order, make_cells, tuned
from gpt.reports.runs import load_runs
from gpt.training.checkpoint import load_model

LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128)
SAMPLES = 256


@torch.no_grad()
def main(folder: Path) -> None:
    best = [c for c in tuned(make_cells(load_runs(folder))) if c.norm == "batch"]
    print("| cell | statistics |", " | ".join(f"T={length}" for length in LENGTHS), "|")
    print("|" + " --- |" * (2 + len(LENGTHS)))
    for cell in in_order(best):
        models = [load_model(run.dir) for run in cell.runs]
        data = prepare(load_config(cell.runs[0].dir / "config.yaml"))
        windows = ValBatches(data.val.ids, 1, max(LENGTHS), SAMPLES * max(LENGTHS))
        pairs = list(windows.on(torch.device("cpu")))
        for name in ("running", "its own"):
            losses = []
            for length in LENGTHS:
                total = 0.0
                for model in models:
                    with batch_statistics(model) if name == "its own" else nullcontext():
                        for x, y in pairs:
                            logits, _ = model(x[:, :length])
                            total += cross_entropy(logits[:, -1], y[:, length - 1]).item()
                losses.append(total / len(models) / len(pairs))
            print(f"| {cell.label} | {name} |", " | ".join(f"{x:.2f}" for x in losses), "|")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
