"""Shared by all tests: a small corpus, small models, and the program run as a user runs it."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import gpt.norms  # noqa: F401
from gpt.common.errors import UserError
from gpt.config import Config
from gpt.kernels import layer_norm
from gpt.norms.registry import load_module, norm_class
from gpt.training import trainer
from tests.tools import ptx
from tests.tools.configs import BUILDABLE, make_config
from tests.tools.made_runs import summary
from tests.tools.zygote import SAMPLE_TOKENS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden from this machine's runs"
    )
    parser.addoption("--norm", help="run the conformance suite for this norm, and nothing else")
    parser.addoption("--norm-module", help="a Python file that registers a norm of your own")


def pytest_configure(config: pytest.Config) -> None:
    try:
        if config.getoption("--norm-module"):
            load_module(config.getoption("--norm-module"))
        if config.getoption("--norm"):
            norm_class(config.getoption("--norm"))
    except UserError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `norm_name` runs for every registered norm that runs on the CPU."""
    if "norm_name" in metafunc.fixturenames:
        one = metafunc.config.getoption("--norm")
        metafunc.parametrize("norm_name", [one] if one else BUILDABLE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--norm"):
        chosen = [item for item in items if "norm_name" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def short_samples() -> None:
    """Shorten the sample at a run's end: 200 tokens take longer than a tiny training."""
    trainer.SAMPLE_TOKENS = SAMPLE_TOKENS


@pytest.fixture(scope="session", autouse=True)
def prepared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write token files to a temporary folder, in subprocesses too."""
    folder = tmp_path_factory.mktemp("data")
    os.environ["GPT_DATA"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 kB of text with structure to learn, the same on every machine and Python."""
    rng = random.Random(0)
    words = ["norm", "row", "column", "token", "batch", "mean", "variance", "the", "of", "a"]
    lines = (" ".join(rng.choices(words, k=rng.randint(3, 9))) + ".\n" for _ in range(600))
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("".join(lines))
    return path


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Callable[..., Config]:
    """Make a tiny configuration over the test corpus, with its own run directory."""

    def make(*extra: str) -> Config:
        run_dir = (
            [] if any(a.startswith("run_dir=") for a in extra) else [f"run_dir={tmp_path}/run"]
        )
        return make_config("data=text", f"data.path={corpus}", *run_dir, *extra)

    return make


@pytest.fixture
def kernels_on_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CUDA LayerNorm takes CPU tensors and runs its kernels on the CPU. All of its code runs
    except the driver's part. Memory that it leaves unwritten is NaN."""
    pytest.importorskip("cuda.bindings")
    monkeypatch.setattr(layer_norm, "queue", ptx.queue)
    monkeypatch.setattr(layer_norm, "multiprocessors", lambda _: 1)  # each block takes many rows
    library = torch.library.Library("gpt_norms", "IMPL")
    with warnings.catch_warnings():  # it replaces one that refuses CPU tensors
        warnings.simplefilter("ignore")
        library.impl("layer_norm", layer_norm.forward_cuda, "CPU", allow_override=True)
    library.impl("layer_norm_backward", layer_norm.backward_cuda, "CPU")
    torch.use_deterministic_algorithms(True)  # fills what `torch.empty` gives
    yield
    torch.use_deterministic_algorithms(False)
    library._destroy()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, (layer, rms, dummy) in enumerate(
        [(3.0, 2.9, 3.5), (3.2, 3.1, 3.1), (3.4, 3.29, 3.4)]
    ):
        summary(tmp_path, "layer", seed, layer)
        summary(tmp_path, "rms", seed, rms)
        summary(tmp_path, "dummy", seed, dummy)
    summary(tmp_path, "instance", 0, 0.5, sees_in_evaluation=["later tokens"])
    summary(tmp_path, "scale", 0, None, diverged_at=7)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished run with BatchNorm, of six steps."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    trainer.train(
        make_config("data=text", f"data.path={corpus}", f"run_dir={run_dir}", "norm=batch")
    )
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
