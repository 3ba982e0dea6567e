"""The runtime's wheels on other machines than this one: resolved for each system and Python, not installed.

They need a package index, as `make test` does for its environment; where there is none, `-m "slow and not index"`
leaves them out. uv resolves, because pip takes the markers of the machine that it runs on.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from uv import find_uv_bin

from tests.test_packaging import name_of, pins

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("hosted", "video", "documents", "postgres")
# The oldest systems that all wheels are for: llguidance's ask for glibc 2.31, onnxruntime's for macOS 14 and an M1.
SYSTEMS = {
    "linux-x86-64": "x86_64-manylinux_2_31",
    "linux-aarch64": "aarch64-manylinux_2_31",
    "macos-arm64": "aarch64-apple-darwin",
    "windows-x86-64": "x86_64-pc-windows-msvc",
}
pytestmark = [pytest.mark.slow, pytest.mark.index]


def resolved(system: str, python: str, *options: str) -> dict[str, str]:
    """Name -> version of all that would be installed, from wheels alone."""
    command = [find_uv_bin(), "pip", "compile", "--quiet", "pyproject.toml", "--only-binary", ":all:"]
    command += ["--no-annotate", "--no-header", "--no-config", "--python-version", python, *options]
    command += ["--python-platform", SYSTEMS[system], *(word for extra in EXTRAS for word in ("--extra", extra))]
    environment = os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return dict(line.split("==") for line in run.stdout.splitlines())


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_there_are_wheels_of_all_that_is_pinned_and_nothing_comes_that_is_not(system: str, python: str) -> None:
    found = resolved(system, python, "--constraint", "constraints.txt")
    assert found.items() <= pins().items()
    assert ("uvloop" in found) == (system != "windows-x86-64")
    assert {"onnxruntime", "llguidance", "tokenizers", "numpy"} <= found.keys()


@pytest.mark.parametrize("system", SYSTEMS)
def test_there_are_wheels_of_the_oldest_versions_that_are_meant_to_work(system: str) -> None:
    found = resolved(system, "3.13", "--resolution", "lowest-direct")
    assert {name_of(name) for name in found} >= {"onnxruntime", "numpy", "pillow"}


def test_onnxruntime_has_no_wheel_for_a_mac_with_an_intel_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    # Should there be one again, models/README.md is to say so.
    monkeypatch.setitem(SYSTEMS, "macos-x86-64", "x86_64-apple-darwin")
    with pytest.raises(AssertionError, match=r"onnxruntime==.* has no wheels with a matching platform tag"):
        resolved("macos-x86-64", "3.12", "--constraint", "constraints.txt")
