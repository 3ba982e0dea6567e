"""Facts about a machine are found once, and asked for anew when what they were found for has changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from models.machine import Remembered, process_peak_bytes, processor


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
    assert processor().name


def test_a_child_s_peak_is_its_own_and_not_its_parent_s() -> None:
    held = bytearray(400_000_000)  # touched, so it counts
    code = "from models.machine import process_peak_bytes as peak; print(peak())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process_peak_bytes() >= len(held) > int(child.stdout) > 1_000_000
