"""Who may import whom, and which library, read off the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sophia_train"

# The layer of each module or folder. It may import what is in a lower layer, its own folder, and FOUNDATIONS;
# the top layer, which puts everything together, also itself. So models and optim never see each other.
LAYERS = {
    "__init__": 0,
    "durable": 0,
    "errors": 0,
    "seeds": 0,
    "models": 0,
    "optim": 0,
    "data": 0,
    "trackers": 0,
    "collectives": 0,
    "checkpoint_files": 0,
    "checkpoint_state": 1,
    "distributed": 1,
    "parallel": 1,
    "gradients": 1,
    "state": 1,
    "checkpoint": 2,
    "evaluation": 2,
    "hessian": 2,
    "memory": 2,
    "profiler": 2,
    "throughput": 2,
    "health": 2,
    "compare": 3,
    "run_folder": 3,
    "saving": 3,
    "trainer": 4,
    "__main__": 5,
    "assembly": 5,
    "benchmarks": 5,
    "command_line": 5,
    "compile_cache": 5,
    "config": 5,
    "launch": 5,
    "planning": 5,
    "processes": 5,
    "run_queue": 5,
    "run_results": 5,
    "tuning": 5,
    "run_config": 5,
    "schema_check": 5,
    "sweep": 5,
    "train": 5,
    "scripts": 5,
}
TOP = 5
FOUNDATIONS = {"durable", "errors", "seeds"}

# Third-party libraries below the top and the modules that may import them; torch and numpy may be anywhere.
LIBRARIES = {
    "accelerate": {"distributed", "parallel"},
    "datasets": {"benchmarks/data"},
    "datatrove": {"data/datatrove_steps"},
    "filelock": {"run_folder", "data/prepare"},
    "huggingface_hub": {"data/hub_client"},
    "matplotlib": {
        "compare/curves",
        "compare/drawing",
        "compare/figures",
        "compare/loss_figures",
        "compare/size_figures",
    },
    "joblib": {"sweep"},
    "optuna": {"tuning/search", "tuning/space"},
    "pyarrow": {"data/parquet"},
    "requests": {"data/hub_client"},
    "rich": {"trackers/console", "data/progress", "data/report", "distributed"},
    "safetensors": {"checkpoint", "checkpoint_files", "models/convert"},
    "submitit": {"sweep"},
    "scipy": {"compare/statistics"},
    "tensorboard": {"trackers/tensorboard"},
    "tiktoken": {"benchmarks/data", "data/tokenizers"},
    "tokenizers": {"data/tokenizers"},
    "torchao": {"models/float8"},
    "transformers": {"hessian/transformers_callback", "benchmarks/train"},
    "triton": {"models/triton_cross_entropy", "optim/triton_sophia"},
    "wandb": {"trackers/wandb"},
    "wandb_workspaces": {"scripts/dashboard"},
    "zstandard": {"data/text_files"},
}
# These are in those places only, at the top, too: they are optional, slow to import, or both.
CONFINED = {
    "datatrove",
    "joblib",
    "optuna",
    "submitit",
    "tiktoken",
    "tokenizers",
    "torchao",
    "transformers",
    "triton",
    "wandb",
    "wandb_workspaces",
    "tensorboard",
    "zstandard",
}


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])


def module_of(path: Path) -> str:
    """`optim/sophia` for a module of the package, `scripts/sample` for a script."""
    base = PACKAGE if path.is_relative_to(PACKAGE) else ROOT
    name = path.relative_to(base).with_suffix("").as_posix()
    return name.removesuffix("/__init__")


def part_of(module: str) -> str:
    """The module or the folder as the table of layers has it."""
    return module.partition("/")[0]


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            if node.module in ("sophia_train", "torch.utils"):  # the names are modules themselves
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def imported_parts(path: Path) -> set[str]:
    """The modules and folders of our own package that a file imports."""
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("sophia_train.")}


def libraries_of(path: Path) -> set[str]:
    """Third-party libraries that a file imports."""
    names = {"tensorboard" if "tensorboard" in name else name.partition(".")[0] for name in imports_of(path)}
    return {name for name in names if name not in sys.stdlib_module_names and name != "sophia_train"}


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_point_downwards(path):
    part = part_of(module_of(path))
    assert part in LAYERS, f"{part} has no layer yet: give it one in the table above"
    for other in imported_parts(path) - {part} - FOUNDATIONS:
        below = LAYERS[other] < LAYERS[part]
        assert below or LAYERS[other] == LAYERS[part] == TOP, f"{path} imports {other}, which is not below it"


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_libraries_are_where_they_belong(path):
    module = module_of(path)
    for library in libraries_of(path) - {"torch", "numpy"}:
        at_the_top = LAYERS[part_of(module)] == TOP and library not in CONFINED
        assert at_the_top or module in LIBRARIES.get(library, set()), f"{path} imports {library}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "optim").glob("*.py")), ids=module_of)
def test_optimizers_need_torch_only(path):
    assert libraries_of(path) <= {"torch", "triton"}  # which comes with torch for CUDA
    assert imported_parts(path) <= {"optim"}


@pytest.mark.parametrize("library", ["hydra", "omegaconf"])
def test_hydra_is_in_the_top_layer_only(library):
    for path in sources():
        if library in libraries_of(path):
            assert LAYERS[part_of(module_of(path))] == TOP, f"{path} imports {library}"


@pytest.mark.parametrize("library", sorted(CONFINED))
def test_each_confined_library_is_imported_in_one_module(library):
    importers = {module_of(path) for path in sources() if library in libraries_of(path)}
    assert importers == LIBRARIES[library]


def test_the_table_has_no_dead_lines():
    assert set(LAYERS) - {"scripts"} <= {part_of(module_of(path)) for path in sources()}
