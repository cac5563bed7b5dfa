"""A run as a model of Hugging Face: weights, tokenizer and a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpt.common.errors import ConfigError
from gpt.common.files import read_json
from gpt.config import load_config
from gpt.data.hf_tokenizer import write_hf_tokenizer
from gpt.data.tokenizer import load_tokenizer
from gpt.probes.verdict import verdict
from gpt.sampling.exchange import write_folder
from gpt.training.checkpoint import load_model

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, gpt-norms]
---

# {name}

A GPT-2 that gpt-norms trained, with norm `{norm}` at placement `{placement}`.

{results}

Its configuration:

```yaml
{config}```
"""


def export(run_dir: Path, to: Path, step: int | None = None) -> list[Path]:
    """Write a run's checkpoint into the new folder `to`. Returns the files.

    Raises ConfigError if GPT-2 cannot express the model, or if `to` has files.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"to={to}: it has files; use a new or an empty folder")
    model = load_model(run_dir, step)
    cfg = load_config(run_dir / "config.yaml")
    write_folder(model, cfg, to)
    write_hf_tokenizer(load_tokenizer(run_dir / "tokenizer.json"), to, model.block_size)
    text = CARD.format(
        name=run_dir.resolve().name,
        norm=cfg.norm["name"],
        placement=cfg.placement.name,
        results=results(run_dir / "summary.json"),
        config=(run_dir / "config.yaml").read_text(encoding="utf-8"),
    )
    (to / "README.md").write_text(text, encoding="utf-8")
    return sorted(to.iterdir())


def results(path: Path) -> str:
    """The losses of a finished run and what its tokens see, in two sentences."""
    if not path.is_file():
        return "The run has not finished."
    summary = read_json(path)
    line = f"After {summary['steps']:,} steps on {summary['corpus']}"
    line += f" (SHA-256 {summary['corpus_sha256'][:8]}) its validation loss is "
    line += f"{shown(summary['val_loss'])} nats a token, {shown(summary['val_bpb'])} bits a byte."
    for mode in ("training", "evaluation"):
        seen = summary[f"sees_in_{mode}"]
        what = f"{' and '.join(seen)} ({verdict(seen)})" if seen else "nothing but its past"
        line += f" In {mode} a token sees {what}."
    return line


def shown(value: Any) -> str:
    return "no number" if value is None else f"{value:.4f}"
