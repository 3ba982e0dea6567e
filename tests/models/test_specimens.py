"""The bundled pictures: each opens, is small, is unlike the others, and has its source and licence told."""

from __future__ import annotations

import io

from PIL import Image

from models.images import decode_image
from models.quality import SPECIMENS, SPECIMENS_FOLDER, prose

MAX_BYTES = 80_000


def test_there_are_ten_small_pictures_and_each_has_its_source_told() -> None:
    told = (SPECIMENS_FOLDER / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in SPECIMENS_FOLDER.iterdir() if path.suffix in (".jpg", ".png")}
    assert len(SPECIMENS) == 10
    assert files == {specimen.file for specimen in SPECIMENS}
    for specimen in SPECIMENS:
        assert len(specimen.read()) <= MAX_BYTES
        assert min(decode_image(specimen.read()).image.size) > 100
        assert f"| `{specimen.file}` |" in told
        assert specimen.question.endswith(("?", "."))


def test_the_pictures_differ_in_mode_and_shape() -> None:
    opened = [Image.open(io.BytesIO(specimen.read())) for specimen in SPECIMENS]
    assert {"RGB", "RGBA", "L", "P", "1"} <= {image.mode for image in opened}
    aspects = [image.width / image.height for image in opened]
    assert max(aspects) > 2.5
    assert min(aspects) < 0.34


def test_the_text_is_one_line_of_prose() -> None:
    assert "\n" not in prose()
    assert 180 < len(prose().split()) < 220
