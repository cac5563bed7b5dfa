"""Checkpoints: `checkpoints/step_N/` with safetensors, JSON, and a SHA-256 manifest.

A folder is written under a temporary name and renamed, so that it is whole or absent. The manifest
reveals a bit that flipped later. Nothing is pickled.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpt.common.errors import DataError, MissingInput, UserError
from gpt.common.files import changed, read_json, sync, write_json, write_manifest
from gpt.common.processes import rank, world_size
from gpt.common.terminal import warn
from gpt.config import load_config
from gpt.data.tokenizer import fingerprint, load_tokenizer
from gpt.model import GPT
from gpt.placement import build_model
from gpt.sampling.exchange import is_gpt2, locate, read_gpt2

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass
class TrainState:
    """What changes during training. A checkpoint holds all of it except `memory`; batches and
    dropout follow from `step`.

    setting  what must be the same when a run resumes: its `sources` and its configuration, and the
             device and precision that `auto` chose
    memory   all buffers as they were before the current step; see `remember` in step.py
    rows     the rows logged so far, {"metrics.jsonl": {"bytes": …, "sha256": …}, …}; see `RunLog`
    """

    step: int
    model: GPT
    optimizer: torch.optim.Optimizer
    setting: dict[str, Any]
    memory: dict[str, Tensor]
    rows: dict[str, Any] = field(default_factory=dict)


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
    progress = {"step": state.step, "setting": state.setting, "rows": state.rows}
    write_json(temporary / "state.json", progress | {"processes": world_size()})
    write_manifest(temporary / "manifest.json", FILES)
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
    progress = read_progress(folder)
    for key, here in state.setting.items():
        there = progress["setting"].get(key)
        if None not in (there, here) and there != here:  # None: init.from's run is gone
            raise DataError(
                f"{folder}: its {key} was {there} and is now {here}; restore the former or use "
                "another run_dir"
            )
    if progress["processes"] != world_size() and rank() == 0:
        warn(
            f"{run_dir} ran on {progress['processes']} processes and resumes on {world_size()}; "
            "its losses will differ by rounding, and by dropout if there is any"
        )
    state.step, state.rows = progress["step"], progress["rows"]
    state.setting |= progress["setting"]  # keeps the hash of init.from's run if that is gone
    load_weights(state.model, folder)
    load_optimizer(state.model, state.optimizer, folder)
    return True


def read_progress(folder: Path) -> dict[str, Any]:
    """The checked content of a checkpoint's `state.json`."""
    path = folder / "state.json"
    progress = read_json(path)
    kinds = {"step": int, "setting": dict, "rows": dict, "processes": int}
    for key, kind in kinds.items():
        if not isinstance(progress.get(key), kind):
            raise DataError(f"{path}: no valid {key}; use another run_dir")
    if f"step_{progress['step']}" != folder.name:
        raise DataError(f"{path}: step {progress['step']}, in the folder {folder.name}")
    return progress


def load_model(
    run_dir: str | Path, step: int | None = None, device: str | torch.device = "cpu"
) -> GPT:
    """The trained model of a run, in evaluation mode; or a GPT-2 in a folder of Hugging Face, in
    nanoGPT's `ckpt.pt`, or on the hub, such as `gpt2`.

    step  of the checkpoint to load; the newest by default

    Raises MissingInput if there is no such checkpoint, and DataError if it is damaged.
    """
    run_dir = locate(run_dir)
    if is_gpt2(run_dir) and step is None:
        return read_gpt2(run_dir).build().to(device)
    if not (run_dir / "config.yaml").exists():
        raise MissingInput(f"{run_dir}: not a run directory, it has no config.yaml")
    if not checkpoints(run_dir, step):
        have = ", ".join(f.name for f in checkpoints(run_dir)) or "none"
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise MissingInput(f"{run_dir}: no {wanted}; it has {have}")
    folder = newest(run_dir, step)
    if folder is None:
        raise DataError(f"{run_dir}/checkpoints: no such checkpoint is intact")
    cfg = load_config(run_dir / "config.yaml")
    tokenizer = load_tokenizer(run_dir / "tokenizer.json")
    setting = read_progress(folder)["setting"]
    for name, now, key in (
        ("config.yaml", cfg.hash(), "configuration"),
        ("tokenizer.json", fingerprint(tokenizer), "tokenizer"),
    ):
        if setting.get(key) != now:
            raise DataError(f"{run_dir}/{name}: not what {folder.name} was made with; restore it")
    model = build_model(cfg, tokenizer.n_vocab)
    load_weights(model, folder)
    return model.to(device).eval()


def load_weights(model: GPT, folder: Path) -> None:
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = load_tensors(folder / "model.safetensors", expected)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise DataError(f"{folder}/model.safetensors: {missing[0]} is missing; restore it")
    model.load_state_dict(tensors)


def load_tensors(path: Path, expected: dict[str, list[int]]) -> dict[str, Tensor]:
    """The tensors of a file, whose names and shapes must be among `expected`. These are compared
    before anything is loaded."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        if not found.items() <= expected.items():
            raise DataError(
                f"{path}: it does not fit the model of config.yaml and tokenizer.json, or a norm "
                "has changed since; restore the files that belong together"
            )
        return load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path}: damaged ({error})") from error


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
        damaged = changed(folder / "manifest.json", FILES)
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


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[p] for group in optimizer.param_groups for p in group["params"]]
    expected: dict[str, list[int]] = {}
    for parameter, name in names.items():
        shape = list(parameter.shape)
        expected |= {f"{name}/exp_avg": shape, f"{name}/exp_avg_sq": shape, f"{name}/step": []}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_tensors(folder / "optimizer.safetensors", expected).items():
        name, _, entry = key.rpartition("/")
        state.setdefault(ordered.index(name), {})[entry] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
