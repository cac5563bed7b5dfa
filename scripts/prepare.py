"""Tokenize a corpus without training: python scripts/prepare.py data=text data.path=FILE

Training also does this. Use this script for a large corpus, once, before many runs share it.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from gpt.cli.arguments import literal
from gpt.cli.errors import one_line_errors, run
from gpt.common.places import CONFIGS
from gpt.common.terminal import say
from gpt.config import register_schemas, typed

register_schemas()


@hydra.main(config_path=str(CONFIGS), config_name="train", version_base="1.3")
@one_line_errors
def main(raw: DictConfig) -> None:
    cfg = typed(raw)
    from gpt.data.tokens import prepare

    data = prepare(cfg)
    for tokens in (data.train, data.val):
        h = tokens.header
        say(f"{tokens.path}: {h.n_bytes:,} bytes as {h.n_tokens:,} {h.tokenizer} tokens")


if __name__ == "__main__":
    sys.argv[1:] = [literal(arg, "data.path") for arg in sys.argv[1:]]
    run(main)
