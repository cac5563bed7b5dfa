"""What norms see and do: statistics of a step, by site and by depth.

    sites      every norm, `h.0.attn.in`: moments before and after, gradient, γ, β and their drift
               (root mean square) from the values that the norm is built with
    residual   the stream by depth, `embd`, `h.0`: moments, gradient, angle to the previous depth
    branches   what a sublayer adds to it, `h.0.attn`: moments, ratio to the block's input
    attention  `h.0.attn`: the largest logit, the mean entropy
    layers     `h.0`, `wte`: norms of gradient, parameters before the update, and update
    output     `logits`: mean log Z

Hooks exist only inside `collect`, so that other steps cost nothing. Inside, everything stays on
the device until `to_numbers` reads it in one transfer. On an accelerator `bincount` also waits for
the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpt.common.errors import ConfigError
from gpt.model import GPT, Block
from gpt.norms.base import Norm, norms_of

MOMENTS = ("mean", "std", "rms", "absmax", "skew", "kurtosis", "outliers", "absmax_to_median")
BINS = 32  # of a histogram from −8 to 8 root mean squares; the outermost bins hold what is beyond
EDGES = [16 * i / BINS - 8 for i in range(BINS + 1)]
GREEK = {"weight": "gamma", "bias": "beta"}  # what a norm's parameters are called in papers
TORCH_NORMS = nn.LayerNorm | nn.RMSNorm  # they run over the last axis, as ours do
Record = dict[tuple[str, ...], Tensor]  # ("sites", "h.0.attn.in", "before") → its moments


def moments(x: Tensor, rows: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """MOMENTS of x (…, C), in fp32.

    mean, std (biased), rms, absmax   of all of x
    skew, kurtosis     E z³ and E z⁴, z = (x − μ)/σ: 0 and 3 for a Gaussian; 0 if x is constant
    outliers           Var_c(m)/(E_c m)², m the mean square of a feature (arXiv:2405.19279)
    absmax_to_median   max |x| over the median of at most 2¹⁴ of the |x| (arXiv:2402.17762)

    rows: the mean and the biased variance of each row, if they are known.
    """
    x = x.detach().float()
    features = x.square().flatten(0, -2).mean(0)
    if rows is None:
        mean, square = x.mean(), features.mean()
        std = (x - mean).square().mean().sqrt()
    else:
        mean, within = rows[0].mean(), rows[1].mean()
        std = (within + (rows[0] - mean).square().mean()).sqrt()
        square = within + rows[0].square().mean()
    # Divide first: x⁴ overflows fp32 from 4·10⁹ on, which runs without norms reach.
    z = (x - mean) / std.clamp_min(1e-30)
    cube = z * z * z
    absolute = x.abs().flatten()
    stride = -(-absolute.numel() // 2**14)
    while math.gcd(stride, x.shape[-1]) > 1:  # otherwise only some features would be sampled
        stride += 1
    median = absolute[::stride].median()
    absmax = absolute.amax()
    outliers = (features / features.mean().clamp_min(1e-30)).var(correction=0)
    shape = [cube.mean(), (cube * z).mean(), outliers, absmax / median.clamp_min(1e-30)]
    return torch.stack([mean, std, square.sqrt(), absmax, *shape])


def histogram(x: Tensor) -> Tensor:
    """The share of x in each of BINS equal bins over [−8, 8] root mean squares."""
    x = x.detach().float()
    scaled = x / x.square().mean().sqrt().clamp_min(1e-30)
    bins = ((scaled.nan_to_num() + 8) * (BINS / 16)).clamp(0, BINS - 1).to(torch.int64)
    return torch.bincount(bins.flatten(), minlength=BINS) / x.numel()


def attention(q: Tensor, k: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    """The largest attention logit and the mean entropy in nats, of at most 4 samples."""
    q, k = (t[:4].detach().float().unflatten(-1, (n_head, -1)).transpose(1, 2) for t in (q, k))
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ k.mT / math.sqrt(q.shape[-1])  # (B, nh, T, T)
    T = logits.shape[-1]
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    logits = logits.masked_fill(later, -torch.inf)
    return logits.amax(), torch.special.entr(logits.softmax(-1)).sum(-1).mean()


def angle(x: Tensor, y: Tensor) -> Tensor:
    """The mean angle between two streams' tokens, in units of π (Mix-LN).

    It uses Kahan's formula, 2 atan(‖x̂ − ŷ‖/‖x̂ + ŷ‖), since the arccosine of a rounded cosine
    cannot resolve angles below 1e-4.
    """
    a, b = (nn.functional.normalize(stream.float(), dim=-1) for stream in (x, y))
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)).mean() / math.pi


class Collector:
    """The hooks of one step, which fill the record."""

    def __init__(self, record: Record, grad_scale: float) -> None:
        self.record = record
        self.handles: list[RemovableHandle] = []
        self.grad_scale = grad_scale
        self.depth_before: Tensor | None = None

    def after(self, module: nn.Module, hook: Any) -> None:
        self.handles.append(module.register_forward_hook(hook))

    def keep_gradient(self, key: tuple[str, str], output: Tensor) -> Tensor:
        """Record the norm of the gradient that comes back to `output`.

        It hooks a new view: an identity's output is its input, and the input's gradient also comes
        from elsewhere.
        """
        output = output.view_as(output)

        def keep(gradient: Tensor) -> None:
            norm = gradient.detach().float().norm() * self.grad_scale
            self.record[(*key, "grad_norm")] = norm

        if output.requires_grad:
            output.register_hook(keep)
        return output

    def site(self, name: str, norm: nn.Module) -> None:
        started = norm.started if isinstance(norm, Norm) else {}
        for parameter, value in norm.named_parameters():
            label, now = GREEK.get(parameter, parameter), value.detach().float()
            self.record["sites", name, f"{label}_norm"] = now.norm()
            if parameter in started:
                off = now - started[parameter].to(now)
                self.record["sites", name, f"{label}_drift"] = off.square().mean().sqrt()

        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # This runs before the running statistics are updated with this batch.
            assert isinstance(norm, Norm)
            for key, value in norm.statistics(inputs[0].detach()).items():
                self.record["sites", name, key] = value

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
            # A norm that adds the branch returns (y, stream).
            y, stream = output if isinstance(output, tuple) else (output, None)
            x = inputs[0] if stream is None else stream
            rows = norm.rows if isinstance(norm, Norm) else None
            self.record["sites", name, "before"] = moments(x, rows)
            self.record["sites", name, "after"] = moments(y)
            self.record["sites", name, "histogram"] = histogram(x)
            y = self.keep_gradient(("sites", name), y)
            return y if stream is None else (y, stream)

        if isinstance(norm, Norm):
            self.handles.append(norm.register_forward_pre_hook(before))
        self.after(norm, hook)

    def stream(self, name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
            # A block returns the two summands (x, branch).
            x, branch = output if isinstance(output, tuple) else (output, None)
            total = (x if branch is None else x + branch).detach()
            self.record["residual", name, "after"] = moments(total)
            self.record["residual", name, "histogram"] = histogram(total)
            if self.depth_before is not None:
                self.record["residual", name, "angle"] = angle(self.depth_before, total)
            self.depth_before = total
            x = self.keep_gradient(("residual", name), x)
            return (x, branch) if isinstance(output, tuple) else x

        self.after(module, hook)

    def branch(self, name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            self.record["branches", name, "after"] = moments(output)

        self.after(module, hook)

    def heads(self, name: str, q_from: nn.Module, k_from: nn.Module, n_head: int) -> None:
        found: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.append(output.detach())

        def finish(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            logit, entropy = attention(found.pop(), output, n_head)
            self.record["attention", name, "max_logit"] = logit
            self.record["attention", name, "entropy"] = entropy

        self.after(q_from, keep)
        self.after(k_from, finish)

    def depths(self, model: GPT) -> None:
        """Hook the stream, the sublayers' branches and attention at each depth, and the logits."""
        self.stream("embd", model.drop)
        for i, block in enumerate(cast(Iterable[Block], model.h)):
            self.stream(f"h.{i}", block)
            for name, sublayer in (("attn", block.attn), ("mlp", block.mlp)):
                self.branch(f"h.{i}.{name}", sublayer["out"])
            self.heads(f"h.{i}.attn", block.attn["q"], block.attn["k"], block.attn.n_head)
        self.logits(model)

    def logits(self, model: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            log_z = output[0].detach().float().logsumexp(-1).mean()
            self.record["output", "logits", "log_z"] = log_z

        self.after(model, hook)


@contextmanager
def collect(
    model: nn.Module, record: Record | None = None, grad_scale: float = 1.0
) -> Iterator[Record]:
    """Inside, one forward and backward of `model` fills the record, which `to_numbers` reads.

    Any other model than our `GPT` fills only `sites`, with its norms from `gpt.norms` or torch. A
    model without such norms raises ConfigError.

    grad_scale  a factor on the recorded gradients: grad_accum, if the loss was divided by it
    """
    record = {} if record is None else record
    collector = Collector(record, grad_scale)
    norms = norms_of(model)
    for norm in norms:  # a norm that computes row moments keeps them for reuse
        norm.keep_rows = True
    sites = {name: m for name, m in model.named_modules() if isinstance(m, Norm | TORCH_NORMS)}
    for name, module in sites.items():
        collector.site(name, module)
    if isinstance(model, GPT):
        collector.depths(model)
    elif not sites:
        raise ConfigError(f"{type(model).__name__} has no norm of gpt.norms or of torch")
    try:
        yield record
    finally:
        for handle in collector.handles:
            handle.remove()
        for norm in norms:
            norm.keep_rows, norm.rows = False, None


@contextmanager
def watch_update(model: nn.Module, record: Record) -> Iterator[None]:
    """Wraps an optimizer step: records each layer's norms of gradient, parameters and update."""
    layers: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        layer = ".".join(name.split(".")[:2]) if name.startswith("h.") else name.split(".")[0]
        layers.setdefault(layer, []).append(parameter)
    before = {name: [p.detach().clone() for p in ps] for name, ps in layers.items()}
    for name, parameters in layers.items():
        gradients = [p.grad for p in parameters if p.grad is not None]
        record["layers", name, "grad_norm"] = nn.utils.get_total_norm(gradients)
        record["layers", name, "param_norm"] = nn.utils.get_total_norm(before[name])
    yield
    for name, parameters in layers.items():
        moved = torch._foreach_sub([p.detach() for p in parameters], before[name])
        record["layers", name, "update_norm"] = nn.utils.get_total_norm(moved)


def to_numbers(record: Record) -> dict[str, dict[str, dict[str, Any]]]:
    """The record as plain numbers: {"sites": {site: {"before": {"mean": …}, "grad_norm": …}}}."""
    numbers = iter(torch.cat([value.float().flatten() for value in record.values()]).tolist())
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for (group, name, key), value in record.items():
        values = [next(numbers) for _ in range(value.numel())]
        entry = result.setdefault(group, {}).setdefault(name, {})
        if value.numel() == len(MOMENTS):
            entry[key] = dict(zip(MOMENTS, values, strict=True))
        else:
            entry[key] = values if value.dim() else values[0]
    depths = list(result.get("residual", {}))
    for name, entry in result.get("branches", {}).items():
        before = depths[depths.index(name.rpartition(".")[0]) - 1]
        stream = result["residual"][before]["after"]["rms"]
        entry["ratio"] = entry["after"]["rms"] / stream if stream else math.nan
    return result


def spike_score(values: list[float]) -> float:
    """The share of values more than 6 standard deviations from the mean of the 128 before them; 0
    if too few. OLMo-core counts these as spikes (the OLMo 2 paper uses 7 and 1,000)."""
    if len(values) <= 128:
        return 0.0
    before = np.lib.stride_tricks.sliding_window_view(np.asarray(values[:-1]), 128)
    off = np.abs(np.asarray(values[128:]) - before.mean(1))
    return float((off > 6 * before.std(1)).mean())


def first_nonfinite(record: Record) -> str | None:
    """The first place in the forward pass that holds NaN or infinity."""
    for (_, name, key), value in record.items():
        # Skip what is no activation: norms of weights, drifts, `tid_*` of running statistics.
        if key == "histogram" or key.startswith("tid_") or key.endswith(("_norm", "_drift")):
            continue
        largest = value[MOMENTS.index("absmax")] if value.dim() else value
        if not math.isfinite(largest.item()):
            return f"{name} ({key})"
    return None
