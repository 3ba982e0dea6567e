"""Facts about a machine are found once, and asked for anew when what they were found for has changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from models.machine import Processor, Remembered, _tightest, fast_cores, memory, process_peak_bytes, processor_of
from models.machine import processor as this_processor


def test_a_fact_outlives_the_process_and_belongs_to_what_it_was_found_for(tmp_path: Path) -> None:
    file = tmp_path / "new" / "machine.json"
    Remembered(file).put("vision", {"graph": "a"}, "openvino")
    assert Remembered(file).get("vision", {"graph": "a"}) == "openvino"
    assert Remembered(file).get("vision", {"graph": "b"}) is None
    assert Remembered(file).get("replay", {"graph": "a"}) is None
    assert [path.name for path in file.parent.iterdir()] == ["machine.json"]


def test_a_damaged_file_or_a_folder_that_cannot_be_written_is_the_same_as_none(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    for damage in ("[1]", "{", ""):
        file.write_text(damage)
        assert Remembered(file).get("vision", {}) is None
    Remembered(file).put("vision", {}, 1)
    assert Remembered(file).get("vision", {}) == 1
    Remembered(file / "inside a file").put("vision", {}, 1)
    Remembered(None).put("vision", {}, 1)
    assert Remembered(None).get("vision", {}) is None


def test_the_processor_has_a_name() -> None:
    assert this_processor().name


PI_5 = """processor	: 0
Features	: fp asimd evtstrm aes crc32 atomics asimdhp asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU part	: 0xd0b

processor	: 1
Features	: fp asimd evtstrm aes crc32 atomics asimdhp asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU part	: 0xd0b

Revision	: d04170
Model		: Raspberry Pi 5 Model B Rev 1.0
"""
GRAVITON_3 = "Features\t: fp asimd asimddp sve i8mm bf16\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
BIG_LITTLE = """Features	: fp asimd asimddp i8mm bf16
CPU implementer	: 0x41
CPU part	: 0xd4d

Features	: fp asimd asimddp
CPU implementer	: 0x41
CPU part	: 0xd05
"""
M2 = {
    "machdep.cpu.brand_string": "Apple M2",
    "hw.optional.neon": "1",
    "hw.optional.arm.FEAT_DotProd": "1",
    "hw.optional.arm.FEAT_I8MM": "1",
    "hw.optional.arm.FEAT_BF16": "1",
    "hw.optional.arm.FEAT_SME2": "0",
}
XEON = "model name\t: Xeon\nflags\t: fpu avx2 avx512f avx512_vnni amx_int8\n"


def test_processors_are_told_by_name_and_by_the_sets_that_all_their_cores_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr("platform.processor", lambda: "")
    assert processor_of(PI_5, {}) == Processor("Raspberry Pi 5 Model B Rev 1.0", ("asimd", "asimddp"))
    assert processor_of(GRAVITON_3, {}) == Processor("aarch64 0x41/0xd40", ("asimd", "asimddp", "i8mm", "bf16"))
    assert processor_of(BIG_LITTLE, {}) == Processor("aarch64 0x41/0xd4d 0x41/0xd05", ("asimd", "asimddp"))
    assert processor_of("", M2) == Processor("Apple M2", ("asimd", "asimddp", "i8mm", "bf16"))
    assert processor_of(XEON, {}) == Processor("Xeon", ("avx2", "avx512f", "avx512_vnni", "amx_int8"))
    assert processor_of("", {}) == Processor("aarch64", ())


def test_slow_cores_get_no_thread(tmp_path: Path) -> None:
    for core, capacity in enumerate([160, 160, 160, 160, 498, 498, 1024, 1024]):
        (tmp_path / f"cpu{core}").mkdir()
        (tmp_path / f"cpu{core}" / "cpu_capacity").write_text(f"{capacity}\n")
    assert fast_cores({*range(8)}, tmp_path) == 2
    assert fast_cores({0, 1, 2}, tmp_path) == 3
    assert fast_cores({4, 6}, tmp_path) == 1
    assert fast_cores({6, 7, 8}, tmp_path) == 3  # not told of one
    assert fast_cores(set(), tmp_path) == 0


def group(folder: Path, names: tuple[str, str], limit: object, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(stat)


def test_the_tightest_control_group_bounds_memory_in_both_versions(tmp_path: Path) -> None:
    two, one = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group(tmp_path / "new" / "box", two, "max", 900, "inactive_file 0\n")
    group(tmp_path / "new" / "box" / "inner", two, 1000, 900, "anon 1\ninactive_file 300\n")
    assert _tightest("0::/box/inner\n", tmp_path / "new") == (1000, 400)
    assert _tightest("0::/box\n", tmp_path / "new") == (None, None)
    group(tmp_path / "old" / "memory", one, 2**63 - 4096, 900, "total_inactive_file 0\n")
    group(tmp_path / "old" / "memory" / "box", one, 5000, 4500, "total_inactive_file 0\n")
    assert _tightest("5:cpu,cpuacct:/\n4:memory:/box\n0::/\n", tmp_path / "old") == (5000, 500)
    # In a container the group's path is that of the host, and what is mounted is its own.
    group(tmp_path / "own", two, 700, 100, "inactive_file 0\n")
    assert _tightest("0::/system.slice/docker-1.scope\n", tmp_path / "own") == (700, 600)
    assert _tightest("", tmp_path) == (None, None)


def test_memory_is_this_machine_s() -> None:
    found = memory()
    lines = Path("/proc/meminfo").read_text().splitlines()
    assert found.total_bytes == next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    assert found.free_bytes is not None
    assert 0 < found.free_bytes < found.total_bytes


def test_a_child_s_peak_is_its_own_and_not_its_parent_s() -> None:
    held = bytearray(400_000_000)  # touched, so it counts
    code = "from models.machine import process_peak_bytes as peak; print(peak())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process_peak_bytes() >= len(held) > int(child.stdout) > 1_000_000
