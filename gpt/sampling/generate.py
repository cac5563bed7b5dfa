"""Generates text from a model, one token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

import tiktoken
import torch
from torch import Tensor

from gpt.common.errors import Diverged
from gpt.common.seeds import stream_seed
from gpt.data.tokenizer import encode, separator
from gpt.model import GPT
from gpt.sampling.cache import next_logits


def generate(model: GPT, tokenizer: tiktoken.Encoding, prompt: str = "", **options: Any) -> str:
    """The continuation of `prompt` as one text; for the options see `stream`."""
    return "".join(stream(model, tokenizer, prompt, **options))


@torch.no_grad()
def stream(
    model: GPT,
    tokenizer: tiktoken.Encoding,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 1,
) -> Iterator[str]:
    """Yield the continuation of `prompt` in pieces, as they are generated.

    temperature  0 takes the likeliest token; otherwise logits are divided by it
    top_k        only the k likeliest tokens are drawn from; 0 draws from all
    seed         of the stream `sample`; drawn on the CPU, so that all devices draw the same numbers

    The model is put into evaluation mode and sees the last block_size tokens. A character whose
    bytes are spread over several tokens is yielded when it is whole. It raises Diverged if the
    largest logit is not finite.
    """
    model.eval()
    device = model.wte.weight.device
    generator = torch.Generator().manual_seed(stream_seed(seed, "sample"))
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ids = encode(tokenizer, prompt) or separator(tokenizer)
    idx = torch.tensor([ids], device=device)  # (1, T)
    with next_logits(model) as logits_after:
        for _ in range(max_new_tokens):
            logits = logits_after(idx)[0].float().cpu()  # (vocab_size,)
            token = draw(logits, temperature, top_k, generator)
            idx = torch.cat([idx, token.view(1, 1).to(device)], dim=1)
            yield decoder.decode(tokenizer.decode_single_token_bytes(int(token)))
    yield decoder.decode(b"", final=True)


def draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """A token (1,) by its logits (vocab_size,)."""
    largest = logits.max()
    if not largest.isfinite():  # a logit of −∞ is allowed: its token is never drawn
        raise Diverged("the model has diverged, its logits are not finite; try an earlier step")
    if temperature == 0:
        return logits.argmax().view(1)
    if 0 < top_k < len(logits):
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    # The largest becomes 0, so that even the smallest temperature cannot overflow.
    scaled = (logits - largest).double() / max(temperature, 1e-200)
    return torch.multinomial(scaled.softmax(0), 1, generator=generator)
