"""A container engine of one's own: podman with a store in a temporary folder, and a base image made from Debian."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = ("podman", "runc", "debootstrap")
# pip finds its packages in a build as it does here, behind a proxy with a certificate of its own too.
PIP_SETTINGS = [path for path in ("/etc/ssl/certs", "/etc/pip.conf") if Path(path).exists()]
# As strict as an engine can be told to be: no network, no capability, nothing writable but /tmp and the volume.
CONFINED = (
    "--network=none", "--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp", "--cap-drop=all",
    "--security-opt=no-new-privileges", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Podman:
    """Runs commands on images and containers that lie in `home`, whatever else this machine has."""

    home: Path

    def __call__(self, *arguments: str | Path, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """One command to its end; fails the test where it ends otherwise than with `status` (None: any)."""
        own = ("--root", self.home / "store", "--runroot", self.home / "run", "--runtime=runc")
        run = subprocess.run(
            ["podman", *own, "--cgroup-manager=cgroupfs", *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert status in (None, run.returncode), f"{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
        return run

    def build(self, name: str, folder: Path, file: str, **arguments: str) -> None:
        """Build `file` of that folder without a cache, each stage one layer."""
        given = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        mounts = [f"--volume={path}:{path}:ro" for path in PIP_SETTINGS]
        # Docker's format, for that of the Open Container Initiative knows no HEALTHCHECK.
        how = ("--format=docker", "--isolation=chroot", "--network=host", "--layers=false")
        self("build", *how, *mounts, *given, "--file", folder / file, "--tag", name, folder)


@contextmanager
def podman() -> Iterator[Podman]:
    """Skips where there is no engine; `make check-slow` installs one."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"images are built by root with podman, runc and debootstrap; missing: {missing or 'root'}")
    home = Path(tempfile.mkdtemp(prefix="nf-"))  # short, for it becomes part of a socket's name
    engine = Podman(home=home)
    try:
        yield engine
    finally:
        engine("rm", "--all", "--force", "--volumes", status=None)
        engine("image", "umount", "--all", "--force", status=None)
        subprocess.run(["umount", home / "store" / "overlay"], capture_output=True, check=False)  # where there is one
        shutil.rmtree(home)


def debian_python(engine: Podman, name: str) -> None:
    """Import a Debian with its Python as an image: what `python:3.11-slim-bookworm` is, made without a hub."""
    root = engine.home / "debian"
    make = ["debootstrap", "--variant=minbase", "--include=ca-certificates,python3,python3-venv", "bookworm", root]
    run = subprocess.run(make, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    # What Debian's slim images leave out too.
    for folder in ("usr/share/doc", "usr/share/locale", "usr/share/man", "var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / folder)
        (root / folder).mkdir()
    subprocess.run(["tar", "--create", "--file", engine.home / "debian.tar", "--directory", root, "."], check=True)
    shutil.rmtree(root)
    engine("import", engine.home / "debian.tar", name)
