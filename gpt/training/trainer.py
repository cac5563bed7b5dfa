"""Training, top to bottom: `train` sets a run up, `run_steps` is the loop; a step is in step.py."""

from __future__ import annotations

import math
import os
import signal
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt.common.device import (
    make_deterministic,
    peak_memory,
    precision,
    reset_peak_memory,
    resolve_device,
)
from gpt.common.errors import ConfigError, DataError, Diverged
from gpt.common.files import changed, read_json, read_jsonl, sha256
from gpt.common.processes import (
    on_any_process,
    processes,
    rank,
    wait_for_all,
    world_size,
)
from gpt.config import Config, save_config
from gpt.data.batches import TrainBatches, ValBatches
from gpt.data.tokenizer import save_tokenizer, token_bytes
from gpt.data.tokens import Data, prepare
from gpt.model import GPT
from gpt.norms.base import norms_of
from gpt.norms.registry import name_of
from gpt.placement import build_model, refuse_single_values
from gpt.probes import stats
from gpt.probes.leak import probe, refuse_leaks
from gpt.probes.verdict import Sight
from gpt.sampling.generate import generate
from gpt.training import checkpoint
from gpt.training.checkpoint import TrainState
from gpt.training.evaluation import evaluate
from gpt.training.log import RunLog
from gpt.training.optimizer import make_optimizer
from gpt.training.run_dir import (
    locked,
    mark_done,
    refuse_another_configuration,
    stop_signals,
)
from gpt.training.screen import Screen
from gpt.training.step import Row, first_not_finite, is_finite, read, update, where_not_finite
from gpt.training.warm_start import source_sha256, transplant

READ_EVERY = 10  # steps on CUDA, where reading a loss waits for the device; elsewhere each is read
SAMPLE_TOKENS = 200  # length of the text that a run generates at its end
TRAIN_LOSS_OVER = 50  # the summary's training loss is the mean over the last 50 steps
ADVICE = "Try a smaller optim.lr or a different norm"
ANOTHER = {  # what a finished run was made with, if one of its `sources` has changed since
    "corpus_sha256": "on another text",
    "train_bytes": "on another split of its text",
    "init_sha256": "from other weights in init.from",
    "norm_sha256": "with another norm.module",
}


@dataclass(frozen=True)
class Run:
    """What stays fixed during training. What changes is in `TrainState`."""

    cfg: Config
    dir: Path
    device: torch.device
    data: Data
    bytes_of: Tensor  # how many bytes of text each token stands for
    sight: Sight
    screen: Screen


def train(cfg: Config, root: Path = Path("runs"), quiet: bool = False) -> dict[str, Any]:
    """Start or resume the run that `cfg` describes, and return its summary; a finished run only
    returns it.

    The run's directory is `cfg.run_dir`, or a folder in `root` whose name follows from `cfg`.
    Raises Diverged if the loss stops being finite. That is a result too: it is not tried again.
    """
    run_dir = Path(cfg.run_dir) if cfg.run_dir else root / cfg.run_name()
    with (
        processes(cfg.device, cfg.distributed.timeout),
        locked(run_dir) if rank() == 0 else nullcontext(),
    ):
        screen = Screen(cfg.train.steps, quiet=quiet or rank() > 0)
        wait_for_all()  # until the first process holds the lock, so that the files are this run's
        refuse_another_configuration(run_dir, cfg)
        data = prepare(cfg)
        if (run_dir / "DONE").exists():
            return finished(run_dir, cfg, data, screen)

        run, state = set_up(cfg, run_dir, data, screen)
        resumed = checkpoint.restore(run_dir, state)
        line = f"resuming {run_dir} at step {state.step}" if resumed else ""
        if cfg.init["from"] and not resumed:
            line = transplant(state.model, cfg, data.train.header.fingerprint)
        if rank() == 0:
            save_config(cfg, run_dir / "config.yaml")
            save_tokenizer(run.data.tokenizer, run_dir / "tokenizer.json")
        introduce(run, state.model)
        if line:
            screen.say(line, style="green")
        log = RunLog(run_dir, cfg, state.rows)
        try:
            run_steps(run, state, log)
            if rank() > 0:
                return {}  # only the first process writes files
            sample = sample_text(run, state.model)
            log.sample(state.step, sample)
            summary = summarise(run, state)
            log.summary(summary)
            mark_done(run_dir)
        except Diverged:
            if rank() == 0:
                log.summary(summarise(run, state) | {"diverged_at": state.step})
                mark_done(run_dir)
            wait_for_all()  # when one process ends, torchrun ends the others
            raise
        finally:
            log.close()
        screen.report(run_dir, summary, sample)
        return summary


def sample_text(run: Run, model: GPT) -> str:
    """A text that the model generates after a newline."""
    options: Any = {"max_new_tokens": SAMPLE_TOKENS, "temperature": 0.6, "seed": run.cfg.seed}
    return generate(model, run.data.tokenizer, "\n", **options)


def finished(run_dir: Path, cfg: Config, data: Data, screen: Screen) -> dict[str, Any]:
    """The summary of a finished run. Raises an error if its configuration or its `sources` differ
    from this run's."""
    if names := changed(run_dir / "DONE", ("config.yaml", "metrics.jsonl", "summary.json")):
        raise DataError(
            f"{run_dir}: {', '.join(names)} changed since the run finished; restore it, or use "
            "another run_dir"
        )
    summary = read_json(run_dir / "summary.json")
    if summary.get("config_hash") != cfg.hash():
        raise ConfigError(f"{run_dir} has finished with another configuration; use another run_dir")
    for key, now in sources(cfg, data).items():
        if None not in (now, summary.get(key)) and now != summary[key]:
            raise DataError(f"{run_dir} has finished {ANOTHER[key]}; use another run_dir")
    if "diverged_at" in summary:
        raise Diverged(
            f"{run_dir} diverged at step {summary['diverged_at']} earlier; it is not tried again"
        )
    screen.say(f"{run_dir} has already finished", style="green")
    return summary


def sources(cfg: Config, data: Data) -> dict[str, Any]:
    """The inputs of a run besides its configuration. They must be the same when it resumes."""
    module = cfg.norm.get("module")
    return {
        "corpus_sha256": data.train.header.corpus_sha256,
        "train_bytes": data.train.header.n_bytes,
        "init_sha256": source_sha256(cfg),
        "norm_sha256": sha256(Path(module)) if module else None,
    }


def set_up(cfg: Config, run_dir: Path, data: Data, screen: Screen) -> tuple[Run, TrainState]:
    """A run before its first step."""
    device = resolve_device(cfg.device)
    make_deterministic(device)
    reset_peak_memory(device)
    if cfg.train.batch_size % world_size():
        raise ConfigError(
            f"train.batch_size={cfg.train.batch_size}: expected a multiple of the "
            f"{world_size()} processes"
        )
    n_vocab, block_size = data.tokenizer.n_vocab, cfg.model.block_size
    model = build_model(cfg, n_vocab).to(device)
    refuse_single_values(model, cfg)
    sight = probe(model, n_vocab, block_size, cfg.train.steps, cfg.dtype)
    if cfg.strict_causal:
        refuse_leaks(sight)
    setting = {
        **sources(cfg, data),
        "tokenizer": data.train.header.fingerprint,
        "device": device.type,
        "precision": precision(device, cfg.dtype),
        "configuration": cfg.hash(),
    }
    memory = dict(model.named_buffers())
    state = TrainState(0, model, make_optimizer(model, cfg.optim), setting, memory)
    bytes_of = torch.tensor(token_bytes(data.tokenizer), device=device)
    return Run(cfg, run_dir, device, data, bytes_of, sight, screen), state


def run_steps(run: Run, state: TrainState, log: RunLog) -> None:
    """Train to `train.steps`, with evaluations, statistics and checkpoints on the way.

    Step n is the n-th update. Its loss is measured before the update, a validation loss after it.
    """
    cfg, t, device = run.cfg, run.cfg.train, run.device
    block_size = cfg.model.block_size
    batches = TrainBatches(run.data.train.ids, t.batch_size, t.grad_accum, block_size, cfg.seed)
    val = ValBatches(run.data.val.ids, t.batch_size, block_size, t.eval_tokens)
    model, compiled = wrap(state.model, cfg)
    unread: list[Row] = []
    parent = os.getppid()

    def stop_asked() -> bool:
        orphan = world_size() > 1 and os.getppid() != parent  # torchrun was killed
        return on_any_process(bool(signals) or orphan)

    def due(every: int) -> bool:
        return state.step % every == 0 or state.step == t.steps

    with stop_signals() as signals, run.screen.progress:
        if state.step == 0:
            evaluate_and_log(run, state, log, val)
        started = time.perf_counter()
        while state.step < t.steps:
            step = state.step + 1
            collecting = t.stats_every > 0 and (step == 1 or step % t.stats_every == 0)
            # Statistics hook into the model as it is written, not as it is compiled.
            forward = model if collecting else compiled
            row, record = update(cfg, state, forward, batches, device, collecting)
            unread.append(row)

            reading = device.type != "cuda" or step % READ_EVERY == 0
            # All processes look once, at the same time: only what was saved may say "stopped".
            stopping = (reading or world_size() == 1) and stop_asked()
            evaluating, saving = due(t.eval_every), due(t.checkpoint_every) or stopping
            if not (reading or collecting or evaluating or saving):
                continue
            seconds = (time.perf_counter() - started) / len(unread)
            log_steps(run, state, log, batches, read(unread), seconds, collecting)
            unread.clear()
            if collecting:
                log.stats(step, stats.to_numbers(record))
            if evaluating:
                evaluate_and_log(run, state, log, val)
            if saving:
                refuse_not_finite(state)
            if saving and rank() == 0:
                state.rows = log.sync()
                checkpoint.save(run.dir, state, t.keep_checkpoints)
            if stopping:
                break
            started = time.perf_counter()
        if stop_asked():  # all wait until the first has saved
            run.screen.say(f"stopped at step {state.step}; the same command resumes there")
            raise SystemExit(128 + (signals or [signal.SIGTERM])[0])


def refuse_not_finite(state: TrainState) -> None:
    """Raise Diverged if a weight or a buffer is not finite, such as a running variance: the losses
    do not show it while training uses the batch's own."""
    for name, tensor in state.model.state_dict().items():
        if not tensor.isfinite().all():
            raise Diverged(f"diverged at step {state.step}: {name} is not finite. {ADVICE}")


def wrap(model: GPT, cfg: Config) -> tuple[nn.Module, nn.Module]:
    """The model for steps with statistics and for steps without: both share gradients between
    processes, and the second is compiled if `compile` is true."""
    shared: nn.Module = model
    if world_size() > 1:
        with warnings.catch_warnings():  # torch 2.13 has renamed an option that 2.11 needs
            warnings.simplefilter("ignore", FutureWarning)
            # A user's norm may leave parameters out of some steps; ours never do.
            own = any(not type(n).__module__.startswith("gpt.") for n in norms_of(model))
            shared = DistributedDataParallel(
                model, broadcast_buffers=False, find_unused_parameters=own
            )
    if not cfg.compile:
        return shared, shared
    torch.compiler.reset()  # forget what other runs of a sweep have compiled
    warnings.filterwarnings("ignore", "TensorFloat32")  # float32 means float32 here
    # Dropout draws the same numbers compiled or not, so that steps with statistics fit in.
    options: Any = {"fallback_random": True}
    return shared, torch.compile(shared, options=options)  # type: ignore[return-value]


def evaluate_and_log(run: Run, state: TrainState, log: RunLog, val: ValBatches) -> None:
    """Raises Diverged, with the site, if the validation loss is not finite."""
    result = evaluate(state.model, val, run.bytes_of, run.device, run.cfg.dtype)
    log.metrics(state.step, **result)
    run.screen.evaluation(state.step, result)
    if not math.isfinite(result["val_loss"]):
        model = state.model.eval()
        site = first_not_finite(run.cfg, model, val.on(run.device), run.device)
        raise Diverged(
            f"diverged at step {state.step}: validation loss {result['val_loss']}, first in "
            f"{site or 'the loss'}. {ADVICE}"
        )


def log_steps(
    run: Run,
    state: TrainState,
    log: RunLog,
    batches: TrainBatches,
    rows: list[dict[str, Any]],
    seconds: float,
    collecting: bool,
) -> None:
    """Log the steps since the last call, which took `seconds` each. Raises Diverged, with the site,
    if the last one is not finite."""
    t = run.cfg.train
    speed = t.batch_size * t.grad_accum * run.cfg.model.block_size / seconds
    leaky = {"leaky": True} if run.sight.leaky else {}
    for values in rows:
        log.metrics(**values, **leaky, tokens_per_s=round(speed, 1))
    last = rows[-1]
    run.screen.steps_done(last["step"], last["loss"], None if collecting else speed)
    if not is_finite(last):
        state.step = last["step"]
        site = where_not_finite(run.cfg, state, batches, run.device)
        raise Diverged(
            f"diverged at step {state.step}: loss {last['loss']}, gradient norm "
            f"{last['grad_norm']}, {site}. {ADVICE}"
        )


def introduce(run: Run, model: GPT) -> None:
    cfg, header = run.cfg, run.data.train.header
    parameters = sum(p.numel() for p in model.parameters())
    others = sorted({name_of(norm) for norm in norms_of(model)} - {cfg.norm["name"]})
    in_slots = f" (in some slots {', '.join(others)})" if others else ""
    run.screen.say(
        f"norm={cfg.norm['name']}{in_slots} placement={cfg.placement.name} on {run.device}: "
        f"{parameters:,} parameters, {header.n_bytes:,} bytes of {cfg.data.name} to train on as "
        f"{header.n_tokens:,} {header.tokenizer} tokens of {header.vocab_size}"
    )
    if header.left_out:
        counts = ", ".join(f"{what} ({n})" for what, n in header.left_out.items())
        run.screen.say(f"left out of the text: {counts}", style="yellow")
    if cfg.optim.warmup_steps > cfg.train.steps:
        run.screen.say(
            f"optim.warmup_steps={cfg.optim.warmup_steps}: the run ends before optim.lr is reached"
        )
    for line in run.sight.lines():
        run.screen.say(line, style="yellow")
    if cfg.train.batch_size == 1 and any("B" in norm.axes for norm in norms_of(model)):
        run.screen.say("train.batch_size=1: the statistics are those of one sample", style="yellow")


def summarise(run: Run, state: TrainState) -> dict[str, Any]:
    """The run in numbers, mostly from its `metrics.jsonl`."""
    cfg, t = run.cfg, run.cfg.train
    rows = read_jsonl(run.dir / "metrics.jsonl")
    losses = [r["loss"] for r in rows if r.get("loss") is not None][-TRAIN_LOSS_OVER:]
    spikes = {
        f"{key}_spikes": stats.spike_score([r[key] for r in rows if r.get(key) is not None])
        for key in ("loss", "grad_norm")
    }
    evaluations = [r for r in rows if "val_loss" in r]
    if not evaluations:
        raise DataError(f"{run.dir}/metrics.jsonl: it has no evaluations; use another run_dir")
    tokens = state.step * t.batch_size * t.grad_accum * cfg.model.block_size
    return {
        **{k: v for k, v in evaluations[-1].items() if k != "step"},
        "best_val_loss": min((r["val_loss"] for r in evaluations if r["val_loss"]), default=None),
        "train_loss": sum(losses) / len(losses) if losses else None,
        **spikes,
        "leaky": run.sight.leaky,
        "sees_in_training": list(run.sight.training),
        "sees_in_evaluation": list(run.sight.evaluation),
        "norm": cfg.norm["name"],
        "placement": cfg.placement.name,
        "batch_size": t.batch_size,
        "seed": cfg.seed,
        "steps": state.step,
        "params": sum(p.numel() for p in state.model.parameters()),
        "tokens": tokens,
        # The median, because first steps may compile and steps with statistics take longer.
        "tokens_per_s": median([r["tokens_per_s"] for r in rows if "tokens_per_s" in r] or [0.0]),
        "corpus": cfg.data.name,
        **{key: state.setting[key] for key in ANOTHER},
        "tokenizer": run.data.tokenizer.name,
        "config_hash": cfg.hash(),
        "torch": torch.__version__,
        "peak_memory": peak_memory(run.device),
        "device": str(run.device),
    }
