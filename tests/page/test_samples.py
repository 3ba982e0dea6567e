"""The bundled sample pictures are what their script draws, and their answers are true."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from models.tiny_scenes.make_samples import FOLDER, SAMPLES, Sample, draw

ROWS = json.loads((FOLDER / "samples.json").read_text(encoding="utf-8"))


def test_the_list_names_every_sample_and_every_picture() -> None:
    assert [row["file"] for row in ROWS] == [sample.file for sample in SAMPLES]
    assert {path.name for path in FOLDER.glob("*.png")} == {row["file"] for row in ROWS}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_question_and_answer_are_those_of_the_drawn_scene(sample: Sample) -> None:
    row = next(row for row in ROWS if row["file"] == sample.file)
    image, scene = draw(sample)

    assert (row["question"], row["answer"]) == (sample.question, sample.answer(scene))
    with Image.open(FOLDER / sample.file) as saved:
        assert saved.size == image.size
        drawn, stored = np.asarray(image, dtype=np.int16), np.asarray(saved.convert("RGB"), dtype=np.int16)
    # Another FreeType may set an edge pixel otherwise; the picture is the same all the same.
    assert (np.abs(drawn - stored).max(axis=-1) > 16).mean() < 0.02


def test_all_samples_together_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 60_000
