"""Training on a CUDA device: bf16 by default, close to the CPU, and resumed to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device on this machine", allow_module_level=True)

from gpt.config import Config
from gpt.training.trainer import train
from tests.tools.configs import curve, read_rows

# A hint from torch about the device must not fail a test.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("norm", ["layer", "rms", "batch", "dummy", "cuda_layer"])
def test_a_run_is_resumed_to_the_bit(
    norm: str, config: Callable[..., Config], tmp_path: Path
) -> None:
    cfg = config(f"norm={norm}", "device=cuda", "model.dropout=0.1")
    train(cfg)
    run_dir = Path(str(cfg.run_dir))
    whole = curve(run_dir)
    (run_dir / "DONE").unlink()
    shutil.rmtree(run_dir / "checkpoints" / "step_6")
    train(cfg)
    assert curve(run_dir) == whole


def test_float32_on_cuda_follows_the_cpu(config: Callable[..., Config], tmp_path: Path) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        train(config(f"device={device}", "dtype=float32", f"run_dir={tmp_path}/{device}"))
        losses[device] = [row["loss"] for row in read_rows(tmp_path / device) if "loss" in row]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)
