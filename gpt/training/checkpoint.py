"""Checkpoints: `checkpoints/step_N/` with safetensors, JSON, and a SHA-256 manifest.

A folder is written under a temporary name and renamed, so that it is whole or absent. The manifest
reveals a bit that flipped later. Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpt.common.errors import DataError, MissingInput, UserError
from gpt.common.files import read_json, sha256, sync
from gpt.common.terminal import warn
from gpt.config import load_config
from gpt.data.tokenizer import load_tokenizer
from gpt.model import GPT
from gpt.placement import build_model

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass
class TrainState:
    """What changes during training. A checkpoint holds all of it except `memory`; batches and
    dropout follow from `step`.

    setting  what must be the same when a run resumes: its `sources` and its configuration, and the
             device and precision that `auto` chose
    memory   all buffers as they were before the current step; see `remember` in step.py
    """

    step: int
    model: GPT
    optimizer: torch.optim.Optimizer
    setting: dict[str, Any]
    memory: dict[str, Tensor]


def save(run_dir: Path, state: TrainState, keep: int) -> None:
    """Write `state`, and remove all but the newest `keep`."""
    folder = run_dir / "checkpoints" / f"step_{state.step}"
    temporary = folder.with_name(f"{folder.name}.tmp")
    temporary.mkdir(parents=True)
    tensors = {
        "model": state.model.state_dict(),
        "optimizer": optimizer_tensors(state.model, state.optimizer),
    }
    for name, group in tensors.items():
        path = temporary / f"{name}.safetensors"
        try:
            save_file({k: v.contiguous() for k, v in group.items()}, path)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(path)) from error
    progress = {"step": state.step, "setting": state.setting}
    (temporary / "state.json").write_text(json.dumps(progress) + "\n")
    manifest = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    sync(folder.parent)
    for old in checkpoints(run_dir)[keep:]:
        shutil.rmtree(old)


def restore(run_dir: Path, state: TrainState) -> bool:
    """Load the newest intact checkpoint into `state`; False if the run has no checkpoint.

    A damaged checkpoint is named in a warning, and the one before it is taken. If all are damaged,
    DataError is raised: starting over silently would overwrite what can be rescued.
    """
    for leftover in (run_dir / "checkpoints").glob("*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = newest(run_dir)
    if folder is None:
        if checkpoints(run_dir):
            raise DataError(f"{run_dir}/checkpoints: no checkpoint is intact; use another run_dir")
        return False
    progress = read_json(folder / "state.json")
    for key, here in state.setting.items():
        there = progress["setting"].get(key)
        if None not in (there, here) and there != here:  # None: init.from's run is gone
            raise DataError(
                f"{folder}: its {key} was {there} and is now {here}; restore the former or use "
                "another run_dir"
            )
    state.step = progress["step"]
    state.setting |= progress["setting"]  # keeps the hash of init.from's run if that is gone
    load_weights(state.model, folder)
    load_optimizer(state.model, state.optimizer, load_file(folder / "optimizer.safetensors"))
    return True


def load_model(
    run_dir: str | Path, step: int | None = None, device: str | torch.device = "cpu"
) -> GPT:
    """The trained model of a run, in evaluation mode.

    step  of the checkpoint to load; the newest by default

    Raises MissingInput if there is no such checkpoint, and DataError if it is damaged.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").exists():
        raise MissingInput(f"{run_dir}: not a run directory, it has no config.yaml")
    if not checkpoints(run_dir, step):
        have = ", ".join(f.name for f in checkpoints(run_dir)) or "none"
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise MissingInput(f"{run_dir}: no {wanted}; it has {have}")
    folder = newest(run_dir, step)
    if folder is None:
        raise DataError(f"{run_dir}/checkpoints: no such checkpoint is intact")
    tokenizer = load_tokenizer(run_dir / "tokenizer.json")
    model = build_model(load_config(run_dir / "config.yaml"), tokenizer.n_vocab)
    load_weights(model, folder)
    return model.to(device).eval()


def load_weights(model: GPT, folder: Path) -> None:
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as error:  # other names or shapes
        raise DataError(
            f"{folder}: its weights do not fit the model of config.yaml and tokenizer.json, or a "
            "norm has changed since; restore the files that belong together"
        ) from error


def newest(run_dir: Path, step: int | None = None) -> Path | None:
    """The newest intact checkpoint, or the one of `step`; None if there is none."""
    return next((f for f in checkpoints(run_dir, step) if is_valid(f)), None)


def checkpoints(run_dir: Path, step: int | None = None) -> list[Path]:
    """The finished checkpoint folders, newest first, or only the one of `step`."""
    found = (run_dir / "checkpoints").glob("step_*" if step is None else f"step_{step}")
    folders = [f for f in found if f.name.removeprefix("step_").isdecimal()]
    return sorted(folders, key=lambda f: int(f.name.removeprefix("step_")), reverse=True)


def is_valid(folder: Path) -> bool:
    """Whether every file matches the manifest; a warning names those that do not."""
    try:
        manifest = read_json(folder / "manifest.json")
        damaged = [name for name in FILES if sha256(folder / name) != manifest.get(name)]
    except (OSError, UserError) as error:
        damaged = [str(error)]
    if damaged:
        warn(f"{folder} is damaged: {', '.join(damaged)}")
    return not damaged


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter name: `h.0.mlp.c_fc.weight/exp_avg`."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[p] for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        state.setdefault(ordered.index(name), {})[entry] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
