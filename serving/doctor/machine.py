"""What this machine is, as far as it decides what can be served here: looked at once, then plain values."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryFile

from models.errors import InvalidValue
from models.execution import RUNTIME, ExecutionProvider, available
from models.machine import Memory, Processor, available_cores, compute_threads, memory, processor
from serving.hosted.rows import PROVIDERS
from serving.power import gpu_names
from serving.settings import Settings

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+).*;.*extra == ['\"]([A-Za-z0-9-]+)['\"]")


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Where models and records live, or will: the room in it."""

    folder: Path
    free_bytes: int
    writable: bool


@dataclass(frozen=True, kw_only=True)
class Machine:
    """All that a diagnosis goes by. `keys`: the names of those variables for providers' keys that are set.

    `extras`: of each extra its packages with their versions, None for one that is missing.
    """

    processor: Processor
    architecture: str
    system: str
    python: str
    cores: int
    threads: int
    memory: Memory
    disk: Disk
    runtime: str
    providers: tuple[ExecutionProvider, ...]
    gpus: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    extras: Mapping[str, Mapping[str, str | None]]

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= self.cores or self.memory.total_bytes <= 0 or "cpu" not in self.providers:
            raise InvalidValue("a machine has memory, a processor, and from one thread up to one a core")

    @property
    def is_arm(self) -> bool:
        return self.architecture.lower() in ("aarch64", "arm64")

    def has_extra(self, name: str) -> bool:
        """Are all its packages installed?"""
        packages = self.extras.get(name)
        return packages is not None and None not in packages.values()


def look(settings: Settings, environment: Mapping[str, str]) -> Machine:
    """This machine as it is now. Of secrets nothing but the names of variables; nothing is sent or written."""
    cores = available_cores()
    names = [row.api_key_env for row in PROVIDERS if row.api_key_env]
    return Machine(
        processor=processor(),
        architecture=platform.machine(),
        system=platform.platform(terse=True),
        python=platform.python_version(),
        cores=cores,
        threads=min(compute_threads(), cores),
        memory=memory(),
        disk=disk_of(settings.data_dir),
        runtime=RUNTIME,
        providers=available(),
        gpus=gpu_names(),
        keys=tuple(name for name in names if environment.get(name) or environment.get(f"{name}_FILE")),
        extras=installed_extras(),
    )


def disk_of(folder: Path) -> Disk:
    """Of a folder that may not be there yet. Nothing is left behind."""
    # Path.exists raises where a folder above is closed to this user.
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.exists(each))
    try:
        with TemporaryFile(dir=there):  # without a name; os.access tells root that it may write everywhere
            writable = True
    except OSError:
        writable = False
    return Disk(folder=folder, free_bytes=shutil.disk_usage(there).free, writable=writable)


def installed_extras(distribution: str = "nearfar") -> dict[str, dict[str, str | None]]:
    """By the metadata that was installed, without the tests' own; empty where there is none."""
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:
        return {}
    found: dict[str, dict[str, str | None]] = {}
    for match in filter(None, map(_REQUIREMENT.match, lines)):
        if match[2] != "dev":
            found.setdefault(match[2], {})[match[1]] = _version(match[1])
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
