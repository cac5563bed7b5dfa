"""The configuration: errors are one line with exit code 78; every yaml composes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from gpt.cli import errors
from gpt.cli.arguments import literal
from gpt.config import Config, load_config, save_config, typed
from tests.tools.configs import make_config
from tests.tools.programs import REPO, run_program

CONFIGS = REPO / "configs"
GROUPS = sorted(p for p in CONFIGS.glob("*/*.yaml") if p.parent.name != "sweep")


def refusal(*overrides: str) -> tuple[str, int | None]:
    """The line and the exit code that the command line gives for `overrides`."""
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = typed(compose("train", list(overrides)))
        from gpt.placement import build_model

        build_model(cfg, 16)
    except Exception as error:
        return errors.explain(error)
    raise AssertionError(f"{overrides} was accepted")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("norm=layr", "rbn, repbn, rms, scale; did you mean 'layer'?"),
        ("init.swap_norm=rms", "init.swap_norm needs a trained run; add init.from=RUN_DIR"),
        ("init.swap=rms", "did you mean 'init.swap_norm'?"),
        ("norm.epz=1", "norm.epz: norm=layer has no such key; did you mean 'norm.eps'?"),
        ("norm.name=layr", "did you mean 'layer'?"),
        ("norm.eps=tiny", "norm.eps=tiny: expected a finite number"),
        ("model.n_lyer=3", "model.n_lyer: no such key; did you mean 'model.n_layer'?"),
        ("steps=3", "steps: no such key; did you mean 'train.steps'?"),
        ("train.lr=1", "train.lr: no such key; did you mean 'optim.lr'?"),
        ("norm.block_size=64", "norm=layer has no such key; did you mean 'model.block_size'?"),
        ("block_size=3", "did you mean 'model.block_size'?"),
        ("placement.mlp.q=true", "did you mean 'placement.attn.q'?"),
        ("data.streaming=true", "data=pydoc does not use it; add data=hf"),
        ("nrom=layer", "nrom: no such key; did you mean 'norm'?"),
        ("+train.stpes=3", "train.stpes: no such key; did you mean 'steps'?"),
        ("model.n_layer=abc", "model.n_layer: Value 'abc' of type 'str' could not be converted to "
         "Integer"),
        ("model.n_embd=130", "model.n_embd=130: expected a multiple of model.n_head=4"),
        ("train.batch_size=-1", "train.batch_size=-1: expected an integer >= 1"),
        ("train.batch_size=1.5", "train.batch_size: Value '1.5'"),
        ("optim.lr=1e400", "optim.lr=inf: expected a finite number >= 0"),
        ("optim.lr=nan", "optim.lr=nan: expected a finite number >= 0"),
        ("optim.lr=1e-4", "optim.min_lr=0.0003: expected at most optim.lr=0.0001, such as "
         "optim.min_lr=1e-05"),
        ("model.dropout=1", "model.dropout=1.0: expected a number in [0, 1)"),
        ("tokenizer=gpt3", "tokenizer=gpt3: expected bpe | bytes | gpt2; did you mean 'gpt2'?"),
        ("dtype=float16", "dtype=float16: expected auto | float32 | bfloat16"),
        ("device=gpu", "device=gpu: expected auto | cpu | cuda | cuda:N | mps"),
        ("device=cuda:x", "device=cuda:x: expected"),
        ("placement=per", "parallel, peri, post, pre, reordered, subln; did you mean 'peri'?"),
        ("placement.alpha=1/l-M", "placement.alpha=1/l-M: expected a finite number, or a formula"),
        ("placement.alpha='import os'", "expected a finite number, or a formula in l and L"),
        ("placement.scale='9**9**9**9'", "expected a finite number, or a formula in l and L"),
        ("placement.alpha='1/(l-3)'", "expected a finite number, or a formula in l and L"),
        ("placement.attn.in='l*2'", "expected true, false or a norm's name, or a formula"),
        ("placement.init.fc=2", "did you mean 'placement.init.fc2'?"),
        ("placement.parallel=true", "set placement.mlp.in=false"),
        ("placement.attn.in=3", "placement.attn.in=3: expected true, false or a norm's name"),
        ("placement.attn.inn=true", "did you mean 'placement.attn.in'?"),
        ("placement.alpha=inf", "placement.alpha=inf: expected a finite number"),
        ("wandb.mode=of", "wandb.mode=of: expected auto | online | offline | disabled"),
        ("data=text", "data.path: not given; data=text needs data.path=PATH"),
        ("data=pydocs", "did you mean 'pydoc'?"),
        ("model=gpt3", "did you mean 'gpt2'?"),
        ("train.steps=", "train.steps"),
        ("data.path=a.txt", "data.path=a.txt: data=pydoc does not use it; add data=text"),
        ("placement.attn.out=rmz", "placement of h.0.attn.out: norm=rmz"),
        ("norm=null", "a group such as norm or placement takes a name"),
        ("norm.name=null", "norm.name=None: expected a norm's name"),
        ("norm.name=5", "norm.name=5: expected a norm's name"),
        ("~norm.name", "norm.name=None: expected a norm's name"),
        ("norm=[", "norm=[: Hydra cannot read the value; quote it twice: \"norm='VALUE'\""),
        ("norm", "norm: expected KEY=VALUE, such as norm=layer"),
        ("norm=layer,rms", "norm=layer,rms: expected one value; add -m to run several in turn"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_78(override: str, expected: str) -> None:
    line, code = refusal(override)
    assert expected in line
    assert "\n" not in line
    assert code == 78


@pytest.mark.parametrize("override", ["norm.xyz=1", "train.bogus=1", "+train.foo=1"])
def test_a_key_that_is_like_none_gets_no_suggestion(override: str) -> None:
    line, _ = refusal(override)
    assert line.endswith("no such key")


@pytest.mark.parametrize("override", ["train.batch_size=-1", "norm=layr", "norm.epz=1"])
def test_the_program_says_one_line_and_exits_78(override: str, tmp_path: Path) -> None:
    result = run_program(override, "tokenizer=bytes", f"run_dir={tmp_path}/run")
    assert result.returncode == 78
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_a_norm_s_name_beside_another_norm_leads_to_what_works() -> None:
    result = run_program("norm=layer", "norm.name=mine", "norm.module=mine.py")
    assert result.returncode == 78
    assert result.stderr == (
        "error: norm=layer norm.name=mine: the options are those of layer; expected norm=mine, or "
        "for a norm of your own norm=module norm.module=FILE norm.name=mine; for several, "
        "-m norm=module norm.module=FILE norm.name=mine,layer\n"
    )


def test_a_reader_that_has_gone_is_no_error_to_talk_about() -> None:
    """For example `… | head`: the exit code is that of SIGPIPE, and stderr is empty."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "scripts/train.py", "--help"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # written at exit
    result = subprocess.run(command, cwd=REPO, stdout=writer, stderr=subprocess.PIPE, env=env)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


def one_of_each() -> list[tuple[str, ...]]:
    """Choices such as ("norm=rms", "placement=peri"): each file of each group is in one of them."""
    groups: dict[str, list[str]] = {}
    for path in GROUPS:
        groups.setdefault(path.parent.name, []).append(f"{path.parent.name}={path.stem}")
    return [tuple(filter(None, some)) for some in zip_longest(*groups.values())]


@pytest.mark.parametrize("choices", one_of_each(), ids=" ".join)
def test_every_yaml_composes(choices: tuple[str, ...]) -> None:
    needed = {"data=text": "data.path=x", "data=hf": "data.path=x", "norm=module": "norm.name=mine"}
    extra = [needed[choice] for choice in choices if choice in needed]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = typed(compose("train", [*choices, *extra]))
    assert isinstance(cfg, Config)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sweep/*.yaml")), ids=lambda p: p.stem)
def test_every_sweep_composes_and_its_parameters_exist(path: Path) -> None:
    own = OmegaConf.load(path)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        raw = compose("train", [f"sweep={path.stem}"], return_hydra_config=True)
        grid = [
            [f"{k}={v}" for v in str(vs).split(",")] for k, vs in raw.hydra.sweeper.params.items()
        ]
        for some in zip_longest(*grid):  # each value of each key
            typed(compose("train", [override for override in some if override]))
    for group in own.keys() - {"hydra"}:  # cells get the values outside the grid
        assert {k: raw[group][k] for k in own[group]} == dict(own[group])


def test_the_wandb_sweep_asks_what_the_sweep_file_asks() -> None:
    """The agent's arguments are overrides of ours; both files define the same sweep."""
    agent = OmegaConf.load(CONFIGS / "wandb_sweep.yaml").parameters
    ours = OmegaConf.load(CONFIGS / "sweep" / "norms.yaml")
    asked = {k: list(spec["values"]) for k, spec in agent.items() if "values" in spec}
    grid = {k: OmegaConf.create(f"[{v}]") for k, v in ours.hydra.sweeper.params.items()}
    assert asked == {k: list(v) for k, v in grid.items()}
    fixed = [f"{k}={spec['value']}" for k, spec in agent.items() if "value" in spec]
    first = [f"{k}={v[0]}" for k, v in asked.items()]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        by_agent = typed(compose("train", fixed + first))
        by_file = typed(compose("train", ["sweep=norms", *first]))
    assert by_agent.hash() == by_file.hash()


def test_the_registry_and_the_yaml_files_have_the_same_norms() -> None:
    import gpt.norms  # noqa: F401
    from gpt.norms.registry import NORMS

    assert {p.stem for p in CONFIGS.glob("norm/*.yaml")} - {"module"} == set(NORMS)


def test_help_needs_no_torch() -> None:
    code = "import runpy, sys; sys.argv = ['train.py', '--help']\n"
    code += "try: runpy.run_path('scripts/train.py', run_name='__main__')\n"
    code += "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "norm: anneal, batch, batch_ema" in result.stdout


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [
        ("train", ["--foo"], "see --help"),
        ("train", ["--norm", "layer"], "an override is KEY=VALUE"),
        ("norms", ["--compare", "layer"], "see --help"),
    ],
)
def test_a_usage_error_is_one_line_and_64(script: str, args: list[str], words: str) -> None:
    result = run_program(*args, script=script)
    assert result.returncode == 64
    assert result.stderr.count("\n") == 1, result.stderr
    assert words in result.stderr


def arrived(prompt: str) -> str:
    """The prompt as Hydra parses it."""
    override = OverridesParser.create().parse_override(literal(f"prompt={prompt}", "prompt"))
    return str(OmegaConf.create({"prompt": override.value()}).prompt)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30))
@settings(deadline=None, max_examples=100)
def test_a_prompt_arrives_as_it_was_typed(text: str) -> None:
    assert arrived(text) == text


@pytest.mark.parametrize(
    "text",
    ["def ", "f(x, y)", "it's", "a\\", "\\'", "${env}", "'q'", '"', "\n", "a\\\n", "a=b", "\\${x}"],
)
def test_awkward_prompts_arrive_as_they_were_typed(text: str) -> None:
    assert arrived(text) == text


@pytest.mark.parametrize("path", ["a b (1).txt", "it's.txt", "ümläut 文.txt", "'quoted'", "null"])
def test_paths_arrive_as_they_were_typed_quoted_or_not(path: str) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = typed(compose("train", [literal(f"run_dir={path}", "run_dir")]))
    assert cfg.run_dir == {"'quoted'": "quoted", "null": None}.get(path, path)


def test_a_sweep_s_name_without_m_is_refused(tmp_path: Path) -> None:
    result = run_program("sweep=norms", cwd=tmp_path)
    assert result.returncode == 78
    assert "add -m to run it" in result.stderr


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    cfg = make_config("data=pydoc", "norm=batch", "placement.final_norm=rms", "optim.lr=0.1")
    cfg.run_dir = "a ${x} \\${y} 'é"
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg


def test_the_run_name_changes_with_the_configuration_only() -> None:
    base = make_config("data=pydoc")
    assert base.run_name() == make_config("data=pydoc", "run_dir=elsewhere").run_name()
    assert base.run_name() == make_config("data=pydoc", "wandb.mode=offline").run_name()
    assert base.run_name() != make_config("data=pydoc", "optim.lr=0.1").run_name()


def test_no_config_names_a_callable() -> None:
    assert not [p for p in CONFIGS.rglob("*.yaml") if "_target_" in p.read_text()]


def test_a_bug_is_told_whole_and_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    """The exception is not kept: its frames would hold a cell's model until a sweep ends."""
    with pytest.raises(RuntimeError) as raised:
        raise RuntimeError("boom")
    assert errors.tell(raised.value) == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert told.endswith("RuntimeError: boom\n")


def test_an_interrupt_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """If nothing catches it, as before and after the training."""
    monkeypatch.setattr(argparse.ArgumentParser, "error", None)  # `run` sets it permanently
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        errors.run(interrupted)
    assert ended.value.code == 130
