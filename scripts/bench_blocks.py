"""Times two GPT-2 blocks with each LayerNorm on this GPU: python scripts/bench_blocks.py

It times forward and backward under autocast, eager and compiled. Only blocks show the full cost:
under torch.compile a custom kernel keeps Inductor from fusing the operations around it. It prints
median milliseconds from an idle device on, taken in turns: launched by Python, and replayed as a
CUDA graph, which shows the device time. bench_norms.py times the kernels alone, with those of other
packages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from bench_norms import machine, medians
from torch import Tensor, nn

from gpt.cli.errors import run
from gpt.common.errors import MissingInput
from gpt.config import ModelConfig
from gpt.model import Block, BlockPlan
from gpt.norms.cuda_layer import CudaLayerNorm
from gpt.norms.layer import LayerNorm


def from_idle(call: Callable[[], Any]) -> float:
    """Milliseconds of a call that starts on an idle device, including the host's time."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def block_step(
    norm: type[nn.Module], n_head: int, compiled: bool, device: str
) -> Callable[[], Any]:
    """Forward and backward of two GPT-2 blocks of hs = 64 on (8, 1024, C), under autocast."""
    config = ModelConfig(n_layer=2, n_head=n_head, n_embd=64 * n_head, block_size=1024, dropout=0.0)

    def make_norm(site: str, width: int) -> nn.Module:
        return norm(width) if site.endswith(".in") else nn.Identity()

    blocks = nn.ModuleList(Block(config, f"h.{i}", make_norm, BlockPlan()) for i in range(2))
    blocks.to(device)
    x = torch.randn(8, 1024, config.n_embd, device=device, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        branch = torch.zeros_like(x)
        for block in blocks:
            x, branch = block(x, branch)
        return x + branch

    run = torch.compile(forward) if compiled else forward

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            y = run(x)
        y.backward(torch.ones_like(y))

    return step


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a CUDA graph, whose replay costs the host next to nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    if not torch.cuda.is_available():
        raise MissingInput("bench_blocks needs a CUDA device")
    print(json.dumps(machine()))
    for n_head in (12, 16, 20, 25):  # GPT-2 small to XL
        torch._dynamo.reset()
        steps = {
            f"{name} {'compiled' if compiled else 'eager'}": block_step(
                norm, n_head, compiled, "cuda"
            )
            for compiled in (False, True)
            for name, norm in (("ours", CudaLayerNorm), ("native", LayerNorm))
        }
        python = medians(steps, from_idle)
        graphs = {name: captured(step) for name, step in steps.items()}
        graph = medians(graphs, from_idle)
        print(f"two blocks of C={64 * n_head}, by Python: {described(python)}")
        print(f"two blocks of C={64 * n_head}, by a graph: {described(graph)}")


def described(ms: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f} ms" for name, value in ms.items())


if __name__ == "__main__":
    run(main)
