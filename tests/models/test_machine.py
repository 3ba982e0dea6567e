"""Facts about a machine are found once, and asked for anew when what they were found for has changed."""

from __future__ import annotations

from pathlib import Path

from models.machine import Remembered, processor


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
