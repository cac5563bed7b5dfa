"""Sample from a trained model: python scripts/sample.py run_dir=DIR prompt="def " """

from __future__ import annotations

import sys
from contextlib import nullcontext

import hydra
from omegaconf import DictConfig

from gpt.cli.arguments import literal
from gpt.cli.errors import one_line_errors, run
from gpt.common.errors import ConfigError
from gpt.common.places import CONFIGS
from gpt.common.terminal import say
from gpt.config import register_schemas, typed

register_schemas()


@hydra.main(config_path=str(CONFIGS), config_name="sample", version_base="1.3")
@one_line_errors
def main(raw: DictConfig) -> None:
    cfg = typed(raw)
    from gpt.common.device import resolve_device
    from gpt.data.hf_tokenizer import read_hf_tokenizer
    from gpt.data.tokenizer import load_tokenizer
    from gpt.norms.batch import batch_statistics, norms_with_batch_stats
    from gpt.norms.registry import load_module
    from gpt.sampling.exchange import is_gpt2, locate
    from gpt.sampling.fold import fold
    from gpt.sampling.generate import stream
    from gpt.training.checkpoint import load_model  # after the configuration is checked

    if cfg.norm_module:
        load_module(cfg.norm_module)
    model = load_model(cfg.run_dir, cfg.step, resolve_device(cfg.device))
    folder = locate(cfg.run_dir)
    tokenizer = (
        read_hf_tokenizer(folder) if is_gpt2(folder) else load_tokenizer(folder / "tokenizer.json")
    )
    if cfg.batch_stats and not norms_with_batch_stats(model):
        raise ConfigError("batch_stats=true: no norm of this run has statistics over the batch")
    if cfg.fold:
        counts = fold(model)
        if not counts["folded"] + counts["affine"]:
            raise ConfigError(
                "fold=true: no norm of this run can be folded; a foldable norm is x·scale + "
                "shift in evaluation, and its as_affine() returns these two"
            )
        print(
            f"norms: {counts['folded']} folded into Linears, {counts['affine']} left as a "
            f"multiply-add, {counts['kept']} kept",
            file=sys.stderr,
        )
    say(cfg.prompt, end="")
    with batch_statistics(model) if cfg.batch_stats else nullcontext():
        for piece in stream(
            model,
            tokenizer,
            cfg.prompt,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            seed=cfg.seed,
        ):
            say(piece, end="")
    say("")


if __name__ == "__main__":
    sys.argv[1:] = [literal(arg, "prompt", "run_dir", "norm_module") for arg in sys.argv[1:]]
    run(main)
