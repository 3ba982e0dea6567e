"""What this machine is, and what was once found out about it: a file of small facts that outlive the process."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Set
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# Those that inference kernels choose by; of Arm's, asimddp are dot products, i8mm and bf16 matrices of those numbers.
INSTRUCTION_SETS = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve2", "sme2",
)  # fmt: skip
# macOS' names of the same, and of what else is asked of it.
_SYSCTL_SETS = {
    "hw.optional.neon": "asimd",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME2": "sme2",
}
_SYSCTL_NAME, _SYSCTL_FAST_CORES = "machdep.cpu.brand_string", "hw.perflevel0.logicalcpu"
CPUS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")
# A core with less than this share of the fastest one's capacity gets no thread: all wait for the slowest piece of a
# product. Not measured: `threads` sets another number.
LEAST_CAPACITY = 0.5


class Processor(NamedTuple):
    """Its name, and of its instruction sets those that inference kernels choose by."""

    name: str
    instruction_sets: tuple[str, ...]


@cache
def processor() -> Processor:
    """From /proc/cpuinfo or macOS' sysctl; elsewhere what Python's platform module says, without instruction sets."""
    cpuinfo = Path("/proc/cpuinfo")
    return processor_of(cpuinfo.read_text() if cpuinfo.exists() else "", _sysctl())


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


def processor_of(cpuinfo: str, sysctl: Mapping[str, str]) -> Processor:
    """The same from these texts. Sets count that all cores have; Arm gives no name, but the board's or each part's."""
    facts: dict[str, list[str]] = {}
    for name, _, value in (line.partition(":") for line in cpuinfo.splitlines()):
        facts.setdefault(name.strip(), []).append(value.strip())
    listed = [set(flags.split()) for flags in facts.get("flags", facts.get("Features", []))]
    sets = (
        set.intersection(*listed) if listed else {_SYSCTL_SETS[key] for key in _SYSCTL_SETS if sysctl.get(key) == "1"}
    )
    parts = dict.fromkeys(zip(facts.get("CPU implementer", []), facts.get("CPU part", []), strict=False))
    named = [*facts.get("model name", [])[:1], sysctl.get(_SYSCTL_NAME), *facts.get("Model", [])]
    named += [" ".join([platform.machine(), *map("/".join, parts)]) if parts else platform.processor()]
    name = next((each for each in named if each), platform.machine())
    return Processor(name, tuple(each for each in INSTRUCTION_SETS if each in sets))


@cache
def _sysctl() -> Mapping[str, str]:
    """What macOS says of its processor; nothing elsewhere. It leaves out the names that it does not know."""
    if sys.platform != "darwin":
        return {}
    command = ["/usr/sbin/sysctl", *_SYSCTL_SETS, _SYSCTL_NAME, _SYSCTL_FAST_CORES]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in said)}


def available_cores() -> int:
    """Cores this process may run on. A container's quota of processor time does not show in it."""
    return len(_allowed_cores()) or os.cpu_count() or 1


def _allowed_cores() -> Set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else frozenset()


def compute_threads() -> int:
    """Threads of a model unless set otherwise: one a core, where cores differ (big.LITTLE, Apple) one a fast core."""
    fast = _sysctl().get(_SYSCTL_FAST_CORES, "")
    return int(fast) if fast.isdecimal() else fast_cores(_allowed_cores()) or available_cores()


def fast_cores(allowed: Set[int], cpus: Path = CPUS) -> int:
    """How many of these cores have half the capacity of the fastest of them or more; all, where none is told."""
    capacities = []
    for core in allowed:
        try:
            capacities.append(int((cpus / f"cpu{core}" / "cpu_capacity").read_text()))
        except (OSError, ValueError):
            return len(allowed)
    return sum(each >= LEAST_CAPACITY * max(capacities) for each in capacities)


class Memory(NamedTuple):
    """Of the machine, in bytes, as this process may use it. None: not known here, or no limit."""

    total_bytes: int
    free_bytes: int | None  # the system's estimate, bounded by what is left of the limit
    limit_bytes: int | None  # of the control group


def memory() -> Memory:
    """As the system tells it now."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free: int | None = None
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    memberships = ""
    with suppress(OSError):
        memberships = Path("/proc/self/cgroup").read_text()
    limit, left = _tightest(memberships, CGROUPS)
    if left is not None:
        free = left if free is None else min(free, left)
    return Memory(total, free, limit if limit is not None and limit < total else None)


def _tightest(memberships: str, root: Path) -> tuple[int | None, int | None]:
    """Limit, and what is left of it, of the control group where least is left; version 2 and version 1."""
    found = []
    for line in memberships.splitlines():
        _, kinds, path = line.split(":", 2)
        base, (most, used, idle) = root, ("memory.max", "memory.current", "inactive_file")
        if "memory" in kinds.split(","):
            base = root / "memory"
            most, used, idle = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        elif kinds:
            continue
        # A container sees its own group as the root of all; elsewhere each group above bounds those in it.
        for folder in {base / Path(path.strip("/")), *(base / each for each in Path(path.strip("/")).parents), base}:
            with suppress(OSError, ValueError):  # no such folder, or "max": no limit
                bound, usage = (int((folder / name).read_text()) for name in (most, used))
                # Pages of files that nobody uses count as used, and go when memory is wanted.
                stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                found.append((max(0, bound - usage + int(stat.get(idle, 0))), bound))
    left, limit = min(found, default=(None, None))
    return limit, left


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
