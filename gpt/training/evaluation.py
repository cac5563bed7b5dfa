"""Validation: always on the same windows, and with BatchNorm's running statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpt.common.device import autocast
from gpt.data.batches import ValBatches
from gpt.model import GPT
from gpt.norms.batch import batch_statistics, norms_with_batch_stats


@torch.no_grad()
def evaluate(
    model: GPT, batches: ValBatches, bytes_of: Tensor, device: torch.device, dtype: str
) -> dict[str, float]:
    """Validation loss in nats a token and in bits a byte of text.

    BatchNorm uses its running statistics, as in generation. `val_loss_batch_stats` is the loss with
    each batch's own statistics. It is taken over full batches only, because a shorter batch has
    other statistics, and left out if the windows do not fill one.
    """

    def losses(equal: bool = False) -> tuple[float, float]:
        nats = torch.zeros((), device=device)
        text_bytes = torch.zeros((), dtype=torch.int64, device=device)
        tokens = 0
        for x, y in batches.on(device, equal):
            with autocast(device, dtype):
                _, loss = model(x, y)
            nats += loss.float() * y.numel()
            text_bytes += bytes_of[y].sum()
            tokens += y.numel()
        return nats.item() / tokens, nats.item() / text_bytes.item() / math.log(2)

    model.eval()
    loss, bpb = losses()
    result = {"val_loss": loss, "val_bpb": bpb}
    if norms_with_batch_stats(model) and len(batches.starts()) >= batches.batch_size:
        with batch_statistics(model):
            result["val_loss_batch_stats"], _ = losses(equal=True)
    model.train()
    return result
