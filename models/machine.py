"""What this machine is, and what was once found out about it: a file of small facts that outlive the process."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm")


class Processor(NamedTuple):
    """Its name, and of its instruction sets those that inference kernels choose by."""

    name: str
    instruction_sets: tuple[str, ...]


@cache
def processor() -> Processor:
    """From /proc/cpuinfo; elsewhere what Python's platform module says, without instruction sets."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", facts.get("Features", "")).split()
    name = facts.get("model name") or platform.processor() or platform.machine()
    return Processor(name, tuple(each for each in INSTRUCTION_SETS if each in flags))


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    name, instruction_sets = processor()
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "instruction_sets": list(instruction_sets),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def available_memory_bytes() -> int | None:
    """What a process may still take: the system's estimate, bounded by a container's limit. None: not known here."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    with suppress(OSError, ValueError):  # no cgroup v2 here, or "max": no limit
        group = Path("/sys/fs/cgroup")
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        return max(0, left if found is None else min(found, left))
    return found


def process_peak_bytes() -> int:
    """The largest resident set this process has had, memory-mapped files included.

    Of Linux's two figures VmHWM, since a process is born with its parent's ru_maxrss. macOS counts in bytes.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Give the system what was freed, where there is a glibc: what lies below a block in use it would keep for itself.

    Without it, a process that had dropped 1.9 GB of a model and its slots kept them once out of three times.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


class Remembered:
    """Facts in one JSON file, each under what it was found for: a changed processor, version or file asks anew.

    A file that is damaged or cannot be written is the same as none: nothing here is worth failing for.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def get(self, what: str, found_for: Mapping[str, Any]) -> Any:
        """The fact, or None."""
        return self._read().get(_key(what, found_for))

    def put(self, what: str, found_for: Mapping[str, Any], fact: Any) -> None:
        """Keep a fact, over an earlier one. Of two processes at once, the later one's file stays."""
        if self._file is None:
            return
        beside = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(self._read() | {_key(what, found_for): fact}, indent=1))
            beside.replace(self._file)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._file.read_text()) if self._file else {}
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def _key(what: str, found_for: Mapping[str, Any]) -> str:
    return f"{what} {hashlib.sha256(json.dumps(found_for, sort_keys=True).encode()).hexdigest()}"
