"""What is installed: the wheel's files, declared dependencies and their pins, make targets."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from models.errors import Unavailable
from serving.child import free_port, get, post
from serving.demo import first_sample
from tests.test_structure import PACKAGES, imports_of, module_files, module_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
CODE = ("models", "export", "comparisons", "serving")
NEVER_AT_RUNTIME = {"torch", "transformers", "optimum", "onnx", "onnxscript", "onnx-ir", "onnxruntime-genai"}
# Where an import is named otherwise than the distribution that has it, or comes with another's.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "genai_prices": "genai-prices",
    "huggingface_hub": "huggingface-hub",
    "mlx_vlm": "mlx-vlm",
    "onnx_ir": "onnx-ir",
    "pynvml": "nvidia-ml-py",
    "prometheus_client": "prometheus-client",
    "onnxruntime_genai": "onnxruntime-genai",
    "pydantic_core": "pydantic",
    "pydantic_settings": "pydantic-settings",
    "starlette": "fastapi",
}


def name_of(requirement: str) -> str:
    """The normalised name in a requirement: `Foo_bar[x]>=1` is `foo-bar`."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def names_of(requirements: Iterable[str]) -> set[str]:
    return {name_of(requirement) for requirement in requirements}


def pins() -> dict[str, str]:
    """constraints.txt as name -> version; every line must be an exact pin without a local version."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    matches = [re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)", line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return {match[1]: match[2] for match in matches if match}


# The wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building in place would leave build/ behind, and pack what lies there."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in (*CODE, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    # Whether or not a checkpoint is there today, it must stay out.
    checkpoint = source / "models" / "tiny_scenes" / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    return source


def wheel_of(source: Path, out: Path) -> Path:
    """The wheel that pip makes of a folder or an archive of sources, with what is installed here."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run = subprocess.run([*command, "--wheel-dir", out, source], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (built,) = out.glob("nearfar-*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    return ZipFile(wheel_of(source, tmp_path_factory.mktemp("wheel")))


def test_the_wheel_has_every_module_and_no_other_package(wheel: ZipFile) -> None:
    names = set(wheel.namelist())
    modules = {str(path.relative_to(ROOT)) for path in module_files()}
    assert modules <= names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_has_bundles_samples_and_page(wheel: ZipFile) -> None:
    names = set(wheel.namelist())
    for folder in ("models/tiny_scenes/bundles", "models/tiny_scenes/samples", "models/specimens", "serving/page"):
        found = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        unread = [path for path in found if path.name == "README.md" or "gallery" in path.parts]  # of the source alone
        files = {str(path.relative_to(ROOT)) for path in found if path not in unread}
        assert files, f"{folder} is empty"
        assert files <= names
    for recipe in ("int8", "fp32"):
        manifest = json.loads(wheel.read(f"models/tiny_scenes/bundles/{recipe}/manifest.json"))
        assert {f"models/tiny_scenes/bundles/{recipe}/{file}" for file in manifest["files"]} <= names


def test_the_wheel_has_nothing_else(wheel: ZipFile) -> None:
    data = r"models/catalog\.json|models/(reports|specimens|tiny_scenes/(bundles|samples))/.*"
    page = r"serving/page/[^/]*\.(html|js|css|svg)|serving/templates/report\.(html|css)"
    wanted = rf"{data}|{page}|[^/]*\.dist-info/.*"
    names = [name for name in wheel.namelist() if not name.endswith(".py")]
    assert [name for name in names if not re.fullmatch(wanted, name)] == []
    assert [name for name in wheel.namelist() if "checkpoint/" in name or "tests/" in name or "gallery" in name] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wheel_of_the_sdist_is_the_same_and_serves_in_an_empty_environment(
    source: Path, wheel: ZipFile, tmp_path: Path
) -> None:
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    (sdist,) = tmp_path.glob("nearfar-*.tar.gz")
    (tmp_path / "out").mkdir()
    built = wheel_of(sdist, tmp_path / "out")
    assert set(ZipFile(built).namelist()) == set(wheel.namelist())

    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NEARFAR_", "PYTHON"))}
    venv.create(tmp_path / "env", with_pip=True)
    pip = [tmp_path / "env" / "bin" / "python", "-m", "pip"]
    install = [*pip, "install", "--quiet", "--constraint", ROOT / "constraints.txt", built]
    run = subprocess.run(install, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    subprocess.run([*pip, "check"], env=environment, cwd=tmp_path, capture_output=True, check=True)
    address = f"http://127.0.0.1:{(port := free_port())}"
    serve = [tmp_path / "env" / "bin" / "nearfar", "serve", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        own = environment | {"NEARFAR_DATA_DIR": str(tmp_path / "data")}
        process = subprocess.Popen(serve, env=own, cwd=tmp_path, stdout=log, stderr=log)
    try:
        ask_everything(address, lambda: process.poll() is None, tmp_path / "log")
    finally:
        process.terminate()
    assert process.wait(timeout=30) == 0


def ask_everything(address: str, is_running: Callable[[], bool], log: Path) -> None:
    """The page with all its files, /infer and /compare of a service that is just starting."""
    deadline = time.monotonic() + 120
    while not answers(f"{address}/ready"):
        assert is_running(), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    assert "<title>nearfar" in get(address)
    for file in (ROOT / "serving" / "page").rglob("*.*"):
        if file.suffix in (".js", ".css", ".svg"):
            assert get(f"{address}/page/{file.relative_to(ROOT / 'serving' / 'page')}") == file.read_text()
    sample, body = first_sample()
    assert post(f"{address}/infer", body)["text"] == sample["answer"]
    compared = post(f"{address}/compare", body | {"reference": sample["answer"]})
    assert [(each["ok"], each["text"]) for each in compared["results"]] == [(True, sample["answer"])] * 2


def answers(url: str) -> bool:
    try:
        return bool(get(url))
    except Unavailable:
        return False


def test_the_wheel_has_the_licence_and_the_command(wheel: ZipFile) -> None:
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "nearfar = serving.cli:main" in wheel.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


# Dependencies


def test_the_runtime_needs_no_torch() -> None:
    assert not names_of(PROJECT["dependencies"]) & NEVER_AT_RUNTIME
    assert not names_of(EXTRAS["hosted"]) & NEVER_AT_RUNTIME


def test_the_runtime_and_hosted_sections_of_the_pins_have_no_torch_either() -> None:
    # Sections are "# name" lines; a package that only the export needs must not have come in as something's dependency.
    text = (ROOT / "constraints.txt").read_text()
    runtime = text[text.index("# the runtime") : text.index("# export")]
    assert not names_of(line for line in runtime.splitlines() if "==" in line) & NEVER_AT_RUNTIME


def test_every_direct_dependency_is_pinned() -> None:
    direct = names_of([*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)])
    assert direct - set(pins()) == set()


def test_the_pins_are_what_the_tests_run_with() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=True,
    )
    installed = {name_of(each["name"]): each["version"].partition("+")[0] for each in json.loads(listed.stdout)}
    differing = {name: (pin, installed[name]) for name, pin in pins().items() if installed.get(name, pin) != pin}
    extras = ("hosted", "video", "documents", "export", "finetune", "dev")
    missing = names_of([*PROJECT["dependencies"], *(each for extra in extras for each in EXTRAS[extra])]) - set(
        installed
    )
    assert (differing, missing) == ({}, set())


def test_both_onnx_runtimes_are_pinned_to_one_release() -> None:
    assert pins()["onnxruntime"] == pins()["onnxruntime-gpu"]


OPTIONAL = {
    "export.finetune": "finetune",
    "models.openvino_vision": "openvino",
    "models.video": "video",
    "models.documents": "documents",
    "serving.plots": "report",
    "serving.power": "gpu",
    "serving.ray_head": "ray",
    "serving.ray_service": "ray",
}


def test_every_import_of_the_product_is_declared() -> None:
    declared = names_of([*PROJECT["dependencies"], *EXTRAS["hosted"]])
    with_export = declared | names_of(EXTRAS["export"])
    undeclared = set()
    for path in module_files():
        module = module_name(path)
        scripts = ("models.tiny_scenes.train",)  # run from a checkout, with [export]
        own = EXTRAS[OPTIONAL[module]] if module in OPTIONAL else []
        if module == "export.mlx":  # no extra: what it needs does not go with the rest of nearfar's
            lines = (ROOT / "export" / "mlx-requirements.txt").read_text().splitlines()
            own = [line for line in lines if line and line[0] != "#"]
        exports = module.startswith("export") or module in scripts
        allowed = (with_export if exports else declared) | names_of(own)
        for imported in imports_of(path.read_text(), module):
            top = imported.module.partition(".")[0]
            if top and top not in sys.stdlib_module_names and top not in PACKAGES:
                distribution = DISTRIBUTIONS.get(top, top)
                if distribution not in allowed:
                    undeclared.add((module, distribution))
    assert undeclared == set()


# Commands


def test_the_ci_script_is_executable_and_runs_the_tests_once() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    commands = [line for line in script.read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make check"]
    planned = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "check"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert planned.stdout.count("-m pytest") == 1


def test_make_alone_lists_the_targets() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "check", "check-slow", "format", "clean"):
        assert f"make {target} " in listed
