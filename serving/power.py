"""Counters of energy that this machine has: the processor's, by RAPL, and an NVIDIA GPU's, by NVML."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

POWERCAP = Path("/sys/class/powercap")
MAX_PACKAGE_W = 1000.0  # no processor takes more; how soon a counter may come round again follows from it


class NoMeter(Exception):
    """Energy cannot be read, and the message says why."""


class Meter(Protocol):
    """Energy since some moment. Steps in time below `resolution_s` are not told apart; read it more often than every
    `longest_gap_s`, or a turn of the counter may go unseen.
    """

    @property
    def method(self) -> Literal["rapl", "nvml"]: ...

    @property
    def measures(self) -> str: ...

    @property
    def resolution_s(self) -> float: ...

    @property
    def longest_gap_s(self) -> float: ...

    def read_j(self) -> float:
        """Joules, which never fall. Raises NoMeter."""
        ...


@dataclass
class _Zone:
    """One RAPL counter, in microjoules, which begins again at `range_uj`."""

    file: Path
    range_uj: int
    last_uj: int
    total_uj: int = 0

    def read_uj(self) -> int:
        now = _number(self.file)
        step = now - self.last_uj
        self.total_uj += step if step >= 0 else step + self.range_uj
        self.last_uj = now
        return self.total_uj


class Rapl:
    """The counters of Linux' powercap folder: all processor packages, and their memory where it is apart.

    A package's own parts (cores, graphics) are in its sum already, and `psys` is the sum of more than the processor.
    https://www.kernel.org/doc/html/latest/power/powercap/powercap.html
    """

    method: Literal["rapl"] = "rapl"
    resolution_s = 0.001

    def __init__(self, root: Path = POWERCAP) -> None:
        """Raises NoMeter where there is none, or where it may not be read."""
        zones = [(_text(file), file.parent) for file in sorted(root.glob("intel-rapl:*/name"))]
        chosen = [(name, folder) for name, folder in zones if name.startswith("package") or name == "dram"]
        if not chosen:
            raise NoMeter(f"there are no RAPL counters in {root}")
        self._zones = [
            _Zone(folder / "energy_uj", _number(folder / "max_energy_range_uj"), _number(folder / "energy_uj"))
            for _, folder in chosen
        ]
        self.longest_gap_s = min(zone.range_uj for zone in self._zones) / 1e6 / MAX_PACKAGE_W
        self.measures = f"RAPL counters of {', '.join(name for name, _ in chosen)}"

    def read_j(self) -> float:
        return sum(zone.read_uj() for zone in self._zones) / 1e6


class NvmlLibrary(Protocol):
    """What is used of pynvml. Anything may raise its NVMLError."""

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...

    def nvmlDeviceGetName(self, handle: Any) -> str: ...

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:
        """Millijoules since the driver was loaded; Volta and newer."""
        ...


class Nvml:
    """The counters of all GPUs of this machine: which of them works is not known here, and idling is subtracted."""

    method: Literal["nvml"] = "nvml"
    resolution_s = 0.1  # how often the driver renews the counter; NVIDIA does not say
    longest_gap_s = math.inf

    def __init__(self, library: NvmlLibrary) -> None:
        """Raises NoMeter where there is no GPU, or it has no counter."""
        self._library = library
        try:
            library.nvmlInit()
            self._handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
            names = [library.nvmlDeviceGetName(handle) for handle in self._handles]
        except Exception as error:
            raise NoMeter(f"NVML: {error}") from error
        if not names:
            raise NoMeter("NVML knows no GPU")
        self.measures = f"NVML counters of {', '.join(names)}"
        self.read_j()

    def read_j(self) -> float:
        try:
            return sum(map(self._library.nvmlDeviceGetTotalEnergyConsumption, self._handles)) / 1000
        except Exception as error:
            raise NoMeter(f"NVML: {error}") from error


class Meters(NamedTuple):
    """The counters of what computes answers here. Without any, `lacks` says why; with some, what they leave out."""

    meters: tuple[Meter, ...]
    lacks: str


def find_meters(*, gpu: bool, powercap: Path = POWERCAP) -> Meters:
    """`gpu`: models run on one, and without its counter a figure would leave out the most of it."""
    found: list[Meter] = []
    lacks = []
    try:
        found.append(Rapl(powercap))
    except NoMeter as error:
        lacks.append(f"the processor is not measured: {error}")
    if gpu:
        try:
            found.append(Nvml(_nvml_library()))
        except NoMeter as error:
            return Meters((), f"the GPU is not measured: {error}")
    return Meters(tuple(found), "; ".join(lacks))


def gpu_names() -> tuple[str, ...]:
    """The NVIDIA GPUs of this machine; none without the extra `gpu`, which brings NVML."""
    try:
        library = _nvml_library()
        library.nvmlInit()
        handles = map(library.nvmlDeviceGetHandleByIndex, range(library.nvmlDeviceGetCount()))
        return tuple(map(library.nvmlDeviceGetName, handles))
    except Exception:  # NVML's own kinds, all straight from Exception
        return ()


def _nvml_library() -> NvmlLibrary:
    try:
        import pynvml
    except ImportError as error:
        raise NoMeter('pip install "nearfar[gpu]"') from error
    return cast("NvmlLibrary", pynvml)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError as error:
        raise NoMeter(f"{file}: {error.strerror}") from error


def _number(file: Path) -> int:
    try:
        return int(_text(file))
    except ValueError as error:
        raise NoMeter(f"{file} holds no number") from error
