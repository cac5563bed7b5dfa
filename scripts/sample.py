"""Sample from a trained model: python scripts/sample.py run_dir=DIR prompt="def " """

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import hydra
from omegaconf import DictConfig

from gpt import cli
from gpt.config import register_schemas, typed
from gpt.errors import ConfigError

register_schemas()


@hydra.main(config_path=str(cli.CONFIGS), config_name="sample", version_base="1.3")
@cli.one_line_errors
def main(raw: DictConfig) -> None:
    cfg = typed(raw)
    from gpt.checkpoint import load_model  # after the configuration is checked
    from gpt.device import resolve_device
    from gpt.fold import fold
    from gpt.generate import generate
    from gpt.norms.batch import batch_statistics, norms_with_batch_stats
    from gpt.norms.registry import load_module
    from gpt.tokenizer import load_tokenizer

    if cfg.norm_module:
        load_module(cfg.norm_module)
    model = load_model(cfg.run_dir, cfg.step, resolve_device(cfg.device))
    tokenizer = load_tokenizer(Path(cfg.run_dir) / "tokenizer.json")
    if cfg.batch_stats and not norms_with_batch_stats(model):
        raise ConfigError("batch_stats=true: no norm of this run has statistics over the batch")
    if cfg.fold:
        counts = fold(model)
        if not counts["folded"] + counts["affine"]:
            raise ConfigError(
                "fold=true: no norm of this run can be folded; a norm folds if in evaluation it "
                "is x·scale + shift, which it says by as_affine()"
            )
        print(
            f"norms: {counts['folded']} folded into Linears, {counts['affine']} left as a scale "
            f"and a shift, {counts['kept']} kept",
            file=sys.stderr,
        )
    print(cfg.prompt, end="", flush=True)
    with batch_statistics(model) if cfg.batch_stats else nullcontext():
        for piece in generate(
            model,
            tokenizer,
            cfg.prompt,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            seed=cfg.seed,
        ):
            print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    sys.argv[1:] = [cli.literal(arg, "prompt", "run_dir", "norm_module") for arg in sys.argv[1:]]
    cli.run(main)
