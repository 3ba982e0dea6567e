"""The embedded model on an emulated Arm processor: Debian's arm64 Python and the pinned wheels under qemu-user.

It needs a package index and Debian's packages; where there are none, `-m "slow and not index"` leaves it out.
How fast it is there says nothing of a real one.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from uv import find_uv_bin

REPOSITORY = Path(__file__).resolve().parents[2]
ASK = REPOSITORY / "tests" / "models" / "answers_here.py"
PROGRAMS = ("qemu-aarch64-static", "debootstrap", "dpkg-deb")
# Largest difference of a logit from this machine's, of logits that span 25. Seen: 4e-6; and 0.05 to 0.09, for a last
# digit that rounds otherwise in float32 moves an 8-bit number by one.
MAX_LOGIT_DIFFERENCE = {"tiny-scenes@fp32": 1e-4, "tiny-scenes@int8": 0.2}
OLD = "fp asimd evtstrm aes pmull sha1 sha2 crc32"
DOTS = f"{OLD} atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
# QEMU's name of a processor -> its part number and features as Linux tells them, and those of them that we look at.
# Without SME: with it DynamicQuantizeMatMul is wrong under QEMU 7.2, whoever is at fault, and the replay refuses it.
PROCESSORS = {
    "cortex-a72": ("0xd08", OLD, ["asimd"]),  # a Raspberry Pi 4
    "neoverse-n1": ("0xd0c", DOTS, ["asimd", "asimddp"]),
    "max,sme=off": ("0x051", f"{DOTS} sve sve2 i8mm bf16", ["asimd", "asimddp", "i8mm", "bf16", "sve2"]),
}
pytestmark = [pytest.mark.slow, pytest.mark.index, pytest.mark.timeout(600)]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """An arm64 Debian in `home`/root, where QEMU looks for files before it takes this machine's; wheels in `site`."""

    home: Path

    def make(self) -> None:
        """Unpack only, so that nothing of it has to run yet: Debian's packages by debootstrap's list, wheels by uv."""
        root, packages = self.home / "root", self.home / "packages"
        include = "--include=python3,libstdc++6"
        _run("debootstrap", "--arch=arm64", "--variant=minbase", "--download-only", include, "bookworm", packages)
        for package in (packages / "var" / "cache" / "apt" / "archives").glob("*.deb"):
            _run("dpkg-deb", "--extract", package, root)
        wheels = ("--only-binary", ":all:", "--python-platform", "aarch64-manylinux_2_36", "--python-version", "3.11")
        what = ("--constraint", REPOSITORY / "constraints.txt", "--requirement", REPOSITORY / "pyproject.toml")
        _run(find_uv_bin(), "pip", "install", "--no-config", *wheels, *what, "--target", self.home / "site")

    def answers(self, processor: str) -> Any:
        """What answers_here.py prints on that processor."""
        root, (part, features, _) = self.home / "root", PROCESSORS[processor]
        # onnxruntime ends with a segmentation fault where it finds this machine's own text there.
        core = f"Features\t: {features}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\n"
        cores = [
            f"processor\t: {n}\n{core}CPU part\t: {part}\nCPU revision\t: 0\n\n" for n in range(os.cpu_count() or 1)
        ]
        (root / "proc" / "cpuinfo").write_text("".join(cores))
        paths = {"PYTHONPATH": f"{REPOSITORY}:{self.home / 'site'}", "PYTHONPYCACHEPREFIX": f"{self.home / 'compiled'}"}
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self.home), "LANG": "C.UTF-8", **paths}
        python = root / "usr" / "bin" / "python3.11"
        said = _run("qemu-aarch64-static", "-cpu", processor, "-L", root, python, "-S", ASK, environment=environment)
        return json.loads(said)


def _run(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    """Its standard output; fails the test where it fails."""
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
    return run.stdout


@pytest.fixture(scope="module")
def arm() -> Iterator[Arm]:
    """Skips where it cannot be made; `make check-slow` installs what it needs."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if platform.machine() != "x86_64" or os.geteuid() != 0 or missing:
        pytest.skip(f"made by root on x86-64 with qemu-user-static and debootstrap; missing: {missing or 'that'}")
    with tempfile.TemporaryDirectory(prefix="nearfar-arm-") as home:
        made = Arm(home=Path(home))
        made.make()
        yield made


@pytest.fixture(scope="module")
def expected() -> Any:
    """The same of this machine."""
    return json.loads(_run(sys.executable, ASK, environment=os.environ | {"PYTHONPATH": str(REPOSITORY)}))


@pytest.mark.parametrize("processor", PROCESSORS)
def test_an_emulated_arm_processor_answers_the_samples_as_this_machine_does(
    arm: Arm, expected: Any, processor: str
) -> None:
    found = arm.answers(processor)
    assert (found["machine"], found["sets"]) == ("aarch64", PROCESSORS[processor][2])
    assert found["bundles"].keys() == MAX_LOGIT_DIFFERENCE.keys()
    for name, bundle in found["bundles"].items():
        here = expected["bundles"][name]
        assert bundle["answers"] == here["answers"]
        assert [target for target, _ in bundle["answers"]] == [f"local/{name}"] * 6
        furthest = np.abs(np.subtract(bundle["logits"], here["logits"])).max()
        print(f"{processor}, {name}: all answers equal, logits differ by {furthest:.2g} at most")
        assert furthest <= MAX_LOGIT_DIFFERENCE[name]
