"""gpt-norms: a minimal GPT-2 trainer with pluggable norms.

    import gpt

    cfg = gpt.compose("norm=rbn", "model.n_layer=2")
    data = gpt.prepare(cfg)
    model = gpt.build_model(cfg, data.tokenizer.n_vocab)

The names below are imported when they are first used, so that `import gpt` does not import torch.
"""

import importlib
import os
from typing import Any

# Before torch is imported: two OpenMP threads that spin at every barrier slow each other down
# up to tenfold on a busy machine; waiting passively costs nothing measurable on an idle one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# cuBLAS needs this to repeat the same bits.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HOMES = {
    "compose": "gpt.config",  # a configuration, from overrides
    "prepare": "gpt.data.tokens",  # a configuration's corpus as tokens
    "TrainBatches": "gpt.data.batches",
    "build_model": "gpt.placement",
    "norm_step": "gpt.norms.base",  # one training step, for the norms
    "collect": "gpt.probes.stats",  # statistics of one forward and backward pass
    "to_numbers": "gpt.probes.stats",
    "train": "gpt.training.trainer",
    "load_model": "gpt.training.checkpoint",  # a run's trained model
    "load_tokenizer": "gpt.data.tokenizer",
    "generate": "gpt.sampling.generate",
    "report": "gpt.reports.report",
}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    if name == "norms":
        return importlib.import_module("gpt.norms")
    raise AttributeError(f"gpt has no {name!r}; it has {', '.join(HOMES)}")


def __dir__() -> list[str]:
    return sorted([*HOMES, "norms"])
