"""The house: which package may import which, where each heavy dependency lives, and how large all of it may get."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.readmes import file_tree, readmes

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "export", "comparisons", "serving")
# The plan was 60 modules and 9,000 lines. Part 2 took 72 and 12,200, part 3 adds batching, caches, dialects, tools and
# operations, part 4 a second hosted protocol with tools, caches and facts, routes, budgets, a ledger and calibration,
# part 5 records, statistics, data sets, votes, break-even and a report, part 6 replicas, fine-tuning, MLX and small
# devices: these bounds are there so that growth is a decision, written here, and not an accident.
MAX_MODULES = 210
MAX_LINES = 34_800

# First-party imports run one way.
MAY_IMPORT = {
    "models": {"models"},
    "export": {"export", "models"},
    "comparisons": {"comparisons", "models"},
    "serving": {"serving", "comparisons", "models"},
}
LAZY_DOOR = ("serving.cli", "export")  # the command line alone, and only inside a function: torch stays out of a server
ROOMS = ("serving.engine", "serving.hosted", "serving.api")  # they do not know each other

# Heavy dependency -> modules and packages that may import it.
TRAINING = ("models.tiny_scenes.train",)
HOMES = {
    "torch": ("export", *TRAINING),
    "transformers": ("export", *TRAINING),
    "optimum": ("export",),
    "peft": ("export.finetune",),
    "mlx": ("export.mlx",),
    "mlx_vlm": ("export.mlx",),
    "onnx": ("export",),
    "onnx_ir": ("export",),
    "onnxscript": ("export",),
    "onnxruntime_genai": ("export",),
    "llguidance": ("serving.engine.constraints",),
    "openvino": ("models.openvino_vision",),
    "onnxruntime": ("export", "models.execution", "models.onnx_model", "models.kv_cache"),
    "tokenizers": ("export", "models.tokenizer", *TRAINING),
    "fastapi": ("serving.api", "serving.app", "serving.ray_service"),
    "ray": ("serving.ray_head", "serving.ray_service"),
    "starlette": ("serving.api", "serving.app"),
    "uvicorn": ("serving.cli",),
    "typer": ("serving.cli",),
    "sqlalchemy": ("comparisons.ballots", "comparisons.store", "comparisons.database", "comparisons.schema"),
    "tomlkit": ("serving.calibration",),
    "matplotlib": ("serving.plots",),
    "anthropic": ("serving.hosted",),
    "openai": ("serving.hosted",),
    "httpx2": ("serving.hosted",),
    "genai_prices": ("comparisons.cost",),
    "prometheus_client": ("serving.metrics",),
    "pynvml": ("serving.power",),
    "pydantic_settings": ("serving.settings",),
    "huggingface_hub": ("serving.pull",),
}
TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "serving",
    "export",
    "models",
    "comparisons",
    "tests",
    "Dockerfile.gpu",
    "Dockerfile.cpu",
    "LICENSE",
    "CHANGELOG.md",
    "Makefile",
    "constraints.txt",
    ".gitignore",
    ".dockerignore",
    ".ci",
}


class Import(NamedTuple):
    """One imported module. `lazy`: inside a function."""

    module: str
    line: int
    lazy: bool


def imports_of(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """Every import of a source, also those inside functions; `from a import b` is both `a` and `a.b`."""
    package = module.split(".") if is_package else module.split(".")[:-1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = package[: len(package) - child.level + 1] if child.level else []
                base = ".".join([*above, *([child.module] if child.module else [])])
                yield Import(base, child.lineno, lazy)
                yield from (Import(f"{base}.{alias.name}", child.lineno, lazy) for alias in child.names)
            else:
                yield from visit(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return visit(ast.parse(source), lazy=False)


def lies_in(module: str, places: Iterable[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def offences(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, each as one line."""
    own = module.partition(".")[0]
    room = next((room for room in ROOMS if lies_in(module, [room])), None)
    found = []
    for imported in imports_of(source, module, is_package=is_package):
        top = imported.module.partition(".")[0]
        through_door = lies_in(module, [LAZY_DOOR[0]]) and top == LAZY_DOOR[1] and imported.lazy
        other_rooms = [other for other in ROOMS if room and other != room]
        if top in PACKAGES and top not in MAY_IMPORT[own] and not through_door:
            why = f"{own} may not import {top}"
        elif lies_in(imported.module, other_rooms):
            why = f"{room} may not know {imported.module}"
        elif top in HOMES and not lies_in(module, HOMES[top]):
            why = f"{top} lives in {', '.join(HOMES[top])}"
        else:
            continue
        found.append(f"{module}:{imported.line} imports {imported.module}: {why}")
    return found


def module_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_run_one_way_and_heavy_dependencies_stay_in_their_homes() -> None:
    found = [
        offence
        for path in module_files()
        for offence in offences(path.read_text(), module_name(path), is_package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "part"),
    [
        ("models.bundle", "from serving import settings", "models may not import serving"),
        ("models.bundle", "def late():\n    import export.graphs", "models may not import export"),
        ("comparisons.cost", "from export import quantize", "comparisons may not import export"),
        ("export.graphs", "import comparisons.runner", "export may not import comparisons"),
        ("serving.app", "def late():\n    import export", "serving may not import export"),
        ("serving.cli.models", "from export.bundling import export_bundle", "serving may not import export"),
        ("serving.cli.models", "if True:\n    import export", "serving may not import export"),
        ("serving.engine.loop", "from serving.api.errors import error_object", "may not know serving.api"),
        ("serving.engine.loop", "from serving import hosted", "may not know serving.hosted"),
        ("serving.engine.loop", "from ..hosted import providers", "may not know serving.hosted"),
        ("serving.hosted.router", "def late():\n    import serving.engine.local", "may not know serving.engine"),
        ("serving.engine.local", "import torch", "torch lives in"),
        ("models.tiny_scenes.scenes", "from transformers import AutoModel", "transformers lives in"),
        ("serving.engine.local", "import onnxruntime as ort", "onnxruntime lives in"),
        ("serving.targets", "from starlette.requests import Request", "starlette lives in"),
        ("serving.app", "import openai", "openai lives in"),
        ("serving.hosted.providers", "import genai_prices", "genai_prices lives in"),
        ("serving.app", "from pydantic_settings import BaseSettings", "pydantic_settings lives in"),
    ],
)
def test_a_made_up_offence_is_found(module: str, source: str, part: str) -> None:
    found = offences(source, module)
    assert found
    assert all(part in offence for offence in found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("serving.cli.models", "def export():\n    from export.bundling import export_bundle"),
        ("serving.app", "from serving.api import infer\nfrom serving.engine import local\nfrom fastapi import FastAPI"),
        ("serving.engine.loop", "from .sequence import Sequence\nfrom comparisons.cost import LOCAL_COST"),
        ("models.tiny_scenes.train", "import torch"),
        ("models.onnx_model", "import onnxruntime as ort"),
    ],
)
def test_a_permitted_import_is_no_offence(module: str, source: str) -> None:
    assert offences(source, module) == []


def test_the_product_stays_small() -> None:
    files = module_files()
    lines = sum(len(path.read_text().splitlines()) for path in files)
    # An __init__.py that holds a docstring alone marks a folder; there is nothing in it to know.
    marks = [path for path in files if path.name == "__init__.py" and len(ast.parse(path.read_text()).body) == 1]
    assert len(files) - len(marks) <= MAX_MODULES
    assert lines <= MAX_LINES


def test_every_module_begins_with_a_docstring() -> None:
    without = [module_name(path) for path in module_files() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert without == []


def test_every_package_folder_has_an_init() -> None:
    folders = {path.parent for path in module_files()}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_top_level_is_the_agreed_one() -> None:
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line and line[0] != "#"]
    found = {path.name for path in ROOT.iterdir() if not any(fnmatch(path.name, pattern) for pattern in ignored)}
    assert found - {".git"} == TOP_LEVEL


def test_what_a_readme_draws_as_the_file_tree_is_there() -> None:
    missing = [named for path in readmes() for named in file_tree(path) if not named.exists()]
    assert missing == []


def test_every_folder_of_the_product_is_in_the_file_tree() -> None:
    files = [path for package in PACKAGES for kind in ("*.py", "*.js", "README.md") for path in files_of(package, kind)]
    assert {path.parent for path in files} <= set(file_tree(ROOT / "README.md"))


def test_a_folder_whose_modules_a_readme_names_has_no_others() -> None:
    """`__init__.py` and `__main__.py` aside. Where a folder stands without one of its modules, its name has to do."""
    for path in readmes():
        modules = {named for named in file_tree(path) if named.suffix == ".py"}
        for folder in {module.parent for module in modules}:
            unnamed = [each.name for each in folder.glob("[!_]*.py") if each not in modules]
            assert unnamed == [], f"{path.relative_to(ROOT)} does not name them"


def files_of(package: str, kind: str) -> list[Path]:
    return [path for path in (ROOT / package).rglob(kind) if "__pycache__" not in path.parts]
