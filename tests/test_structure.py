"""Structure: imports point downward, `import gpt` is light, every README command runs."""

from __future__ import annotations

import ast
import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.tools.configs import mostly_long, overrides
from tests.tools.programs import REPO, Process, run_program, run_pytest

# A room may import from itself and from the rooms below it, but not from one beside it.
ROOMS = [
    ["cli", "training"],
    ["reports", "sampling"],
    ["probes"],
    ["placement"],
    ["norms", "model", "data"],
    ["kernels", "config"],
    ["common", "formula"],
]
LEVEL = {room: i for i, beside in enumerate(ROOMS) for room in beside}


def modules() -> dict[str, Path]:
    """Paths by name: `norms.layer` for `gpt/norms/layer.py`, `norms` for its `__init__.py`."""
    root = REPO / "gpt"
    names = {p: p.relative_to(root).with_suffix("").parts for p in root.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): p for p, parts in names.items()}


def imported(path: Path) -> set[str]:
    """The gpt modules that a file imports, anywhere in it."""
    names: set[str] = set()
    known = modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gpt":
            base = (node.module or "").removeprefix("gpt").strip(".")
            inside = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            names |= {name if name in known else base for name in inside}
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("gpt.") for a in node.names if a.name.startswith("gpt.")}
    return names


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_is_in_a_room() -> None:
    assert {room(name) for name in modules()} == {*LEVEL, "__init__"}


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_imports_point_downward(name: str) -> None:
    for module, path in modules().items():
        if room(module) == name:
            others = {i for i in imported(path) if room(i) != name}
            upward = {i for i in others if LEVEL[room(i)] <= LEVEL[name]}
            assert not upward, f"gpt.{module} imports {upward}"


def test_no_modules_import_one_another_in_a_circle() -> None:
    graph = {name: imported(path) - {name} for name, path in modules().items()}
    list(TopologicalSorter(graph).static_order())


def test_the_model_never_sees_a_norm() -> None:
    assert not {i for i in imported(modules()["model"]) if i.startswith("norms")}


def test_importing_gpt_does_not_import_torch() -> None:
    code = "import gpt, gpt.cli.errors, gpt.config, sys\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_trainer_imports_neither_datasets_nor_wandb_nor_matplotlib() -> None:
    code = "import gpt.training.trainer, sys\n"
    code += "assert not {'wandb', 'datasets', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


PAGES = [
    REPO / "README.md",
    *sorted(REPO.glob("[a-z]*/README.md")),
    *sorted(REPO.glob("gpt/*/README.md")),
]


def readme_commands() -> list[str]:
    """Every line of the pages' shell blocks that runs a script of ours."""
    text = "".join(page.read_text() for page in PAGES)
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    commands = [
        line[line.index("python scripts/") :] for line in lines if "python scripts/" in line
    ]
    return list(dict.fromkeys(commands))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_a_page_has_no_gap(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r"\bTODO\b", text)
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_leads_to_every_page() -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (REPO / "README.md").read_text())
    missing = {str(page.relative_to(REPO)) for page in PAGES[1:]} - set(links)
    assert not missing


def test_the_study_s_numbers_are_those_of_its_tables() -> None:
    """Every "mean ± half-width" on the page is in a table that the report wrote."""
    study = REPO / "scripts" / "study"
    page = (study / "README.md").read_text()
    assert all((study / link).exists() for link in re.findall(r"\]\(([^)#:]+)\)", page))
    number = re.compile(r"([+−-]?\d+\.\d+) ± (\d+\.\d+)")
    tables = "".join(path.read_text() for path in study.glob("*/table.md"))
    told, measured = (
        {(mean[0] == "+", float(mean.replace("−", "-")), float(half)) for mean, half in found}
        for found in (number.findall(page), number.findall(tables))
    )
    assert len(told) > 30
    for difference, mean, half in told:  # the page has three decimals, the tables four
        assert any(
            abs(mean - m) < 5.51e-4 and abs(half - h) < 5.51e-4 and difference == d
            for d, m, h in measured
        ), (mean, half)


@pytest.mark.parametrize("some", mostly_long(["*", "warmup"], "warmup"))
def test_the_study_s_tables_follow_from_its_runs(some: str, tmp_path: Path) -> None:
    """The archive holds what its runs left behind; the report makes the same tables from it."""
    study = REPO / "scripts" / "study"
    subprocess.run(["tar", "-xf", study / "runs.tar.xz", "-C", tmp_path], check=True)
    questions = sorted(path.parent.name for path in study.glob("*/table.md"))
    assert questions == sorted(path.name for path in (tmp_path / "runs").iterdir())
    for question in fnmatch.filter(questions, some):
        baseline = ["baseline=optim.warmup_steps=40"] if question == "warmup" else []
        made = run_program(f"runs/{question}", *baseline, script="report", cwd=tmp_path)
        assert made.returncode == 0, made.stderr
        table = (tmp_path / "runs" / question / "table.md").read_text()
        assert table == (study / question / "table.md").read_text()


def test_the_norm_that_the_readme_adds_passes_the_suite_and_trains(
    tmp_path: Path, corpus: Path
) -> None:
    page = (REPO / "gpt" / "norms" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    own = tmp_path / "my_norms.py"
    own.write_text(blocks[0])
    assert "pytest --norm-module=my_norms.py --norm length\n" in page
    suite = run_pytest(f"--norm-module={own}", "--norm", "length")
    assert suite.returncode == 0, suite.stdout
    assert "passed" in suite.stdout
    args = ["norm=module", f"norm.module={own}", "norm.name=length", "norm.eps=1e-3", "data=text"]
    result = run_program(*overrides(*args, f"data.path={corpus}", f"run_dir={tmp_path}/run"))
    assert result.returncode == 0, result.stderr
    card = run_program("length", "--norm-module", str(own), script="norms")
    assert "length: LengthNorm" in card.stdout


TINY = ["model.n_layer=1", "model.n_head=1", "model.n_embd=16", "model.block_size=16",
        "train.steps=2", "train.batch_size=2", "train.eval_tokens=64",
        "wandb.mode=disabled", "device=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of a README reader: their own text, a first run and a sweep's runs."""
    folder = tmp_path_factory.mktemp("visitor")
    (folder / "my.txt").write_text("To norm or not to norm, that is the question.\n" * 60)
    (folder / "ref.txt").write_text((folder / "my.txt").read_text())
    rows = '{"text": "a document about norms, long enough to train on"}\n' * 40
    (folder / "docs.jsonl").write_text(rows)
    shutil.copytree(REPO / "scripts", folder / "scripts")
    for norm in ("batch", "layer"):
        run(folder, ["python", "scripts/train.py", f"norm={norm}", f"run_dir=runs/{norm}"])
    sweep = ["-m", "sweep=norms", "norm=layer,rms", "hydra.sweep.dir=runs/norms"]
    run(folder, ["python", "scripts/train.py", *sweep])
    return folder


def run(folder: Path, args: list[str]) -> subprocess.CompletedProcess[str]:
    if args[1] in ("scripts/train.py", "scripts/prepare.py"):
        given = {a.split("=")[0] for a in args}
        args = [",".join(arg.split(",")[:2]) for arg in args]  # a part of each grid
        narrow = ["seed=1", "optim.lr=1e-3", "placement=pre"] if "-m" in args else []
        args = args + [a for a in TINY + narrow if a.split("=")[0] not in given]
        args = [a if not a.startswith("train.steps=") else "train.steps=2" for a in args]
    return Process(args[1:], folder, timeout=300).wait()


@pytest.mark.parametrize(
    "command",
    mostly_long(readme_commands(), *(c for c in readme_commands() if "data=stdlib" not in c)),
)
def test_every_readme_command_runs_at_two_steps(command: str, visitor: Path) -> None:
    result = run(visitor, shlex.split(command))
    assert result.returncode == 0, result.stderr
