"""GPT-2's weights in and out: folders of Hugging Face, and nanoGPT's checkpoints (in only).

Both name the parts of a block as OpenAI did. Hugging Face keeps its four matrices as (in, out),
transposed against `nn.Linear`.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpt.common.errors import ConfigError, DataError, MissingInput
from gpt.common.files import read_json, write_json
from gpt.common.hub import go_offline_if_unreachable
from gpt.config import Config, ModelConfig
from gpt.model import GPT, Block, BlockPlan
from gpt.norms.layer import LayerNorm

# Their names and ours, as pairs of regular expression and template, in both directions.
IN = ((r"ln_1\.", "attn.in."), (r"ln_2\.", "mlp.in."), (r"ln_f\.", "final_norm."))
OUT = ((r"attn\.in\.", "ln_1."), (r"mlp\.in\.", "ln_2."), (r"final_norm\.", "ln_f."))
MATRIX = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_FILES = ["config.json", "model*.safetensors*", "tokenizer.json", "vocab.json", "merges.txt"]
# What Hugging Face's configuration must say for the model to be this one.
GPT2 = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


@dataclass(frozen=True)
class Gpt2:
    """A GPT-2 read from elsewhere.

    sizes    n_layer, n_head, n_embd, block_size
    norm     the options of its LayerNorms: eps, bias
    weights  by our names; a matrix is (out, in)
    note     in what it is not GPT-2, or ""
    """

    sizes: dict[str, int]
    norm: dict[str, Any]
    weights: dict[str, Tensor]
    note: str = ""

    @property
    def vocab_size(self) -> int:
        return len(self.weights["wte.weight"])

    def empty(self, block_size: int) -> GPT:
        """The model without memory for its weights."""

        def make_norm(site: str, width: int) -> nn.Module:
            has_one = site.endswith(".in") or site == "final_norm"
            return LayerNorm(width, **self.norm) if has_one else nn.Identity()

        with torch.device("meta"):
            plans = [BlockPlan()] * self.sizes["n_layer"]
            sizes = ModelConfig(**self.sizes | {"block_size": block_size})
            return GPT(sizes, self.vocab_size, make_norm, plans, seed=0)

    def build(self, block_size: int | None = None) -> GPT:
        """The model in evaluation mode; a smaller `block_size` crops its positions."""
        most = self.sizes["block_size"]
        if (block_size or 0) > most:
            raise ConfigError(f"model.block_size={block_size}: its weights have {most} positions")
        T = block_size or most
        model = self.empty(T)
        weights = self.weights | {"wpe.weight": self.weights["wpe.weight"][:T]}
        model.load_state_dict(weights, assign=True)
        return model.eval()


def locate(source: str | Path) -> Path:
    """A path that exists, or the folder to which a model of the hub (`gpt2`, OWNER/NAME) is
    downloaded: its configuration, weights and tokenizer.

    A name in a folder that exists here is a path, so that a mistyped `runs/x` asks nobody. Raises
    MissingInput if the hub does not have it, or cannot be reached and the cache does not have it.
    """
    path, name = Path(source).expanduser(), str(source)
    owner = name.rpartition("/")[0]
    on_hub = name in HUB_NAMES or (owner and re.fullmatch(r"[\w.-]+/[\w.-]+", name))
    if path.exists() or not on_hub or (owner and Path(owner).exists()):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    offline = go_offline_if_unreachable()
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = "the hub cannot be reached" if offline else " ".join(str(error).split())[:200]
        raise MissingInput(
            f"{source}: no such run or folder, and {reason}; give a folder with config.json and "
            "model.safetensors"
        ) from error


def is_gpt2(path: Path) -> bool:
    """Whether `path` is a model from elsewhere, not a run."""
    folder = (path / "config.json").is_file() and not (path / "config.yaml").exists()
    return folder or (path.is_file() and path.suffix == ".pt")


def read_gpt2(path: Path) -> Gpt2:
    """The GPT-2 in a folder of Hugging Face or in nanoGPT's `ckpt.pt`; UserError if it is none."""
    if not is_gpt2(path):
        raise MissingInput(f"{path}: no config.json of a GPT-2, and not a ckpt.pt")
    return read_folder(path) if path.is_dir() else read_nanogpt(path)


def read_folder(folder: Path) -> Gpt2:
    config = read_json(folder / "config.json")
    where = f"{folder}/config.json"
    if config.get("model_type") != "gpt2":
        raise DataError(f"{where}: model_type={config.get('model_type')}; expected gpt2")
    for key, allowed in GPT2.items():
        if config.get(key, allowed[0]) not in allowed:
            expected = " or ".join(map(str, allowed))
            raise DataError(f"{where}: {key}={config[key]}; expected {expected}")
    C = config["n_embd"]
    if config.get("n_inner") not in (None, 4 * C):
        raise DataError(f"{where}: n_inner={config['n_inner']}; expected {4 * C}")
    sizes = {
        "n_layer": config["n_layer"],
        "n_head": config["n_head"],
        "n_embd": C,
        "block_size": config["n_positions"],
    }
    weights = {
        name: tensor.T.contiguous() if MATRIX.fullmatch(name) else tensor
        for name, tensor in renamed(read_tensors(folder), IN).items()
    }
    norm = {"eps": config.get("layer_norm_epsilon", 1e-5), "bias": True}
    return checked(Gpt2(sizes, norm, weights), folder)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, in one file or in several that an index lists."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted(set(read_json(index)["weight_map"].values()))
            if any(Path(file).name != file for file in files):
                raise DataError(f"{index}: it names files outside its folder")
            return {k: v for file in files for k, v in read_file(folder / file).items()}
    raise MissingInput(f"{folder}: no model.safetensors and no pytorch_model.bin")


def read_file(path: Path) -> dict[str, Tensor]:
    """Tensors by name; nothing in a pickled file is run (`weights_only=True`)."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return loaded
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a file of weights ({reason})") from error


def read_nanogpt(path: Path) -> Gpt2:
    content: dict[str, Any] = read_file(path)
    try:
        args, weights = content["model_args"], content["model"]
        sizes = {key: args[key] for key in ("n_layer", "n_head", "n_embd", "block_size")}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not a checkpoint of nanoGPT; it lacks {error}") from error
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}
    weights = renamed(weights, IN)
    bias = bool(args.get("bias", True))
    if not bias:  # our Linears always have one
        for name in [name for name in weights if MATRIX.fullmatch(name)]:
            weights[name.replace("weight", "bias")] = torch.zeros(len(weights[name]))
    note = "nanoGPT's GELU is exact, here it is GPT-2's tanh form: outputs differ by about 1e-3"
    return checked(Gpt2(sizes, {"eps": 1e-5, "bias": bias}, weights, note), path)


def renamed(weights: dict[str, Tensor], pairs: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """By our names, without the prefix, masks and a head that is the embedding."""
    found = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    head = found.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, found.get("wte.weight", head)):
        raise DataError("its output head is not tied to the token embedding, as in GPT-2")
    result = {}
    for name, tensor in found.items():
        if not re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", name):
            for old, new in pairs:
                name = re.sub(old, new, name)
            result[name] = tensor
    return result


def checked(source: Gpt2, path: Path) -> Gpt2:
    """Raise DataError unless the weights have the names and shapes that the sizes give."""
    try:
        model = source.empty(source.sizes["block_size"])
    except (ConfigError, KeyError) as error:
        raise DataError(f"{path}: {error}") from error
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in source.weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            got, want = (list(x[name]) if name in x else "nothing" for x in (found, expected))
            raise DataError(f"{path}: {name} has the shape {got}; expected {want}")
    return source


def write_folder(model: GPT, cfg: Config, folder: Path) -> None:
    """Write config.json and model.safetensors as `transformers.GPT2LMHeadModel` reads them.

    Raises ConfigError, naming the slot, if GPT-2 cannot express the model.
    """
    eps = express(model, cfg)
    tensors = {}
    for name, tensor in with_all_affines(model).items():
        if MATRIX.fullmatch(name):
            tensor = tensor.T
        for old, new in OUT:
            name = re.sub(old, new, name)
        tensors[f"transformer.{name}"] = tensor.detach().contiguous().cpu()
    vocab_size, C = model.wte.weight.shape
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "n_layer": len(model.h),
        "n_head": cfg.model.n_head,
        "n_embd": C,
        "n_positions": model.block_size,
        "vocab_size": vocab_size,
        "layer_norm_epsilon": eps,
        "embd_pdrop": cfg.model.dropout,
        "attn_pdrop": cfg.model.dropout,
        "resid_pdrop": cfg.model.dropout,
        "tie_word_embeddings": True,
        "torch_dtype": str(model.wte.weight.dtype).removeprefix("torch."),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", config)


def express(model: GPT, cfg: Config) -> float:
    """The ε of the model's LayerNorms; ConfigError if GPT-2 cannot express the model."""

    def refuse(site: str, what: str) -> None:
        raise ConfigError(f"{site} {what}; GPT-2 has only LayerNorms `in` every sublayer and last")

    found = {"embd_norm": model.embd_norm}
    for i, block in enumerate(model.h):
        assert isinstance(block, Block)
        if block.parallel:
            refuse(f"h.{i}", "runs attention and MLP in parallel")
        for part, sublayer in (("attn", block.attn), ("mlp", block.mlp)):
            found |= {f"h.{i}.{part}.{slot}": sublayer[slot] for slot in sublayer.slots}
            if sublayer.plan.alpha != 1 or sublayer.plan.scale != 1:
                refuse(f"h.{i}.{part}", "has factors α or s")
    found["final_norm"] = model.final_norm
    needed = [site for site in found if site.endswith(".in") or site == "final_norm"]
    for site, norm in found.items():
        if site in needed and not (isinstance(norm, LayerNorm) and not norm.unbiased):
            refuse(site, "has no norm" if isinstance(norm, nn.Identity) else f"has {norm}")
        if site not in needed and not isinstance(norm, nn.Identity):
            refuse(site, f"has {norm}")
    eps = {norm.eps for site in needed if isinstance(norm := found[site], LayerNorm)}
    if len(eps) > 1:
        refuse("its norms", f"have several eps, {', '.join(map(str, sorted(eps)))}")
    return eps.pop()


def with_all_affines(model: GPT) -> dict[str, Tensor]:
    """The weights, with γ = 1 and β = 0 for LayerNorms that have none."""
    weights = dict(model.state_dict())
    like = model.wte.weight
    for site, norm in model.named_modules():
        if isinstance(norm, LayerNorm):
            weights.setdefault(f"{site}.weight", torch.ones_like(like[0]))
            weights.setdefault(f"{site}.bias", torch.zeros_like(like[0]))
    return weights
