"""What is counted, what fits, and that a process stays within what was counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.bundle import Bundle
from models.catalog import ROWS
from models.errors import ContextLengthExceeded, Unavailable
from models.kv_cache import padded
from models.memory import (
    GB,
    PROCESS_BYTES,
    Need,
    default_budget,
    fit,
    need,
    need_of,
    need_of_row,
    plan,
    table,
    total_bytes,
)
from models.onnx_model import OnnxModel
from models.tiny_scenes import BUNDLES

README = Path(__file__).parents[2] / "models" / "README.md"
PEAK = """
import json, sys
from pathlib import Path
import numpy as np
import serving.app  # what is counted is a service's process
from models.loaded_model import LoadedModel
from models.onnx_model import POSITIONS_PER_STEP, in_batches
model = LoadedModel.load(Path(sys.argv[1]), context=int(sys.argv[2])).onnx
side, positions = model.bundle.manifest.processing.tile_px, model.shapes.max_positions
for batch in in_batches(np.zeros((17, 3, side, side), np.float32)):
    model.encode_tiles(batch)
cache = model.new_cache(positions)
prompt = model.embed([3] * (positions - 8))
for start in range(0, prompt.shape[1], POSITIONS_PER_STEP):
    model.decode(prompt[:, start : start + POSITIONS_PER_STEP], cache)
model.decode(model.embed([3]), cache)
status = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def peak_bytes(folder: Path, context: int) -> int:
    """Of a process that loads the bundle, encodes a picture and fills one sequence of that many positions."""
    command = [sys.executable, "-c", PEAK, str(folder), str(context)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(run.stdout) * 1024


@pytest.mark.parametrize("target", BUNDLES)
def test_a_process_stays_within_what_was_counted(target: str) -> None:
    need = need_of(Bundle.read(BUNDLES[target]))
    counted, peak = total_bytes([need], 1, need.max_positions), peak_bytes(BUNDLES[target], need.max_positions)
    assert peak <= counted
    assert counted <= 2 * peak


def a_need(**changes: int) -> Need:
    plain = {
        "weights": 1000, "vision_step": 50, "prompt_step": 10, "scores_per_position": 0, "cache_per_position": 1,
        "tile_pixels": 0, "tokens_per_tile": 64, "features": 0, "max_positions": 8192,
    }  # fmt: skip
    return Need(**(plain | changes))


def test_slots_give_way_first_and_then_the_context() -> None:
    need = a_need()
    base, slot = total_bytes([need], 0, 8192), padded(8192)
    assert fit([need], base + 4 * slot) == (4, 8192, base + 4 * slot)
    assert fit([need], base + 4 * slot - 1).slots == 3
    assert fit([need], base + slot - 1) == (1, 8128, base + padded(8128))
    assert fit([need], base + padded(2048)).context == 2048
    with pytest.raises(Unavailable, match="too large"):
        fit([need], base + padded(2048) - 1)


def test_models_share_steps_and_pictures_but_neither_weights_nor_slots() -> None:
    small = a_need(max_positions=1024, tile_pixels=7, features=1)
    large = a_need(weights=5000, vision_step=900, cache_per_position=3, tile_pixels=10, features=2)
    slots = padded(1024) + 3 * padded(8192)
    assert total_bytes([small, large], 2, 8192) == PROCESS_BYTES + 6000 + 3 + 910 + 2 * slots + 10 * 8192 // 64
    assert total_bytes([small, large], 8, 8192) == PROCESS_BYTES + 6000 + 3 + 910 + 8 * slots + 10 * 8 * 17


def test_the_first_that_fit_together_share_the_budget_and_the_others_have_it_alone() -> None:
    small, large = a_need(), a_need(weights=10**6)
    both = total_bytes([small, small], 2, 8192)
    assert plan([small, small], both) == [fit([small, small], both)] * 2
    budget = total_bytes([large], 1, 8192)
    assert plan([large, small, large], budget) == [fit([large, small], budget)] * 2 + [fit([large], budget)]
    with pytest.raises(Unavailable, match="too large"):
        plan([small, large], both)


def test_a_model_may_be_given_less_context_than_it_was_trained_for() -> None:
    model = OnnxModel(Bundle.load(BUNDLES["tiny-scenes@int8"]), context=128)
    assert model.shapes.max_positions == 128
    with pytest.raises(ContextLengthExceeded, match="the model has 128"):
        model.new_cache(129)


def test_a_refusal_shows_its_sum() -> None:
    with pytest.raises(Unavailable) as caught:
        fit([need_of_row(ROWS["smolvlm2-2.2b"], "int4")], 2 * GB)
    assert caught.value.message.startswith("too large for the memory budget of 2.00 GB: 2.")
    for term in (
        "GB weights",
        "GB activations",
        "GB image features",
        "GB one sequence of 2048 positions",
        "GB the process itself = ",
    ):
        assert term in caught.value.message


def test_a_half_precision_cache_takes_half() -> None:
    row = ROWS["smolvlm2-256m"]
    assert need_of_row(row, "fp16").cache_per_position * 2 == need_of_row(row, "fp32").cache_per_position == 46_080


def test_float16_factors_count_as_the_float32_that_a_cpu_makes_of_them() -> None:
    row = ROWS["smolvlm2-256m"]
    half, full = (need(row.shape, row.graph_bytes(recipe).values()).weights for recipe in ("fp16", "fp32"))
    assert half < 0.6 * full  # their files
    assert 0.9 * full < need_of_row(row, "fp16").weights < full  # all but the rows that are looked up


def test_the_readme_has_the_table_of_the_formula() -> None:
    assert table() in README.read_text()


def test_the_default_budget_is_what_this_machine_has_free() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    assert 0 < default_budget() < total


def test_a_damaged_configuration_is_one_line(tmp_path: Path) -> None:
    folder = BUNDLES["tiny-scenes@int8"]
    for content in ("", "[]", json.dumps({"text_config": {}})):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(Unavailable, match=r"config\.json"):
            need_of(Bundle(tmp_path, Bundle.read(folder).manifest))
