"""Run directories written without training, for tests of the reports."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import OmegaConf

from gpt.common.files import write_manifest


def summary(
    folder: Path,
    norm: str,
    seed: int,
    loss: float | None,
    config: dict[str, object] | None = None,
    **more: object,
) -> None:
    """Write a run directory as training leaves it, with the given loss, config and other keys."""
    run = folder / f"{norm}-pre-bs4-s{seed}"
    run.mkdir(parents=True)
    base = {
        "norm": norm, "placement": "pre", "batch_size": 4, "seed": seed, "val_loss": loss,
        "val_bpb": loss and loss / 2, "train_loss": loss, "tokens_per_s": 100.0, "params": 10,
        "peak_memory": 2**20, "leaky": norm == "batch", "sees_in_training": [], "tokenizer": "bpe",
        "sees_in_evaluation": [], "device": "cpu", "corpus": "text", "corpus_sha256": "0" * 64,
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(base | more))
    named = {"seed": seed, "norm.name": norm, "placement.name": "pre", "train.batch_size": 4}
    tree = OmegaConf.create()
    for key, value in (named | (config or {})).items():
        OmegaConf.update(tree, key, value)
    OmegaConf.save(tree, run / "config.yaml")
    curve = {s: (loss or 9) + 1 / (s + 1) for s in (0, 5, 10)}
    rows = [{"step": s, "val_loss": nats, "val_bpb": nats / 2} for s, nats in curve.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    moments = {"after": {"rms": 1.0, "kurtosis": 3.0}}
    (run / "stats.jsonl").write_text(json.dumps({"step": 1, "residual": {"embd": moments}}) + "\n")
    names = ("config.yaml", "metrics.jsonl", "stats.jsonl", "summary.json")
    write_manifest(run / "DONE", names)
