"""Draws the sample pictures and their questions: `python -m models.tiny_scenes.make_samples` rewrites `samples/`.

Every answer is read off the drawn scene, so it is true by construction; a question that the scene does not settle is an
error. The seeds were picked by eye. None of these scenes was trained on: training never writes the number, and its
scenes come from other seeds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from models import tiny_scenes
from models.tiny_scenes import scenes
from models.tiny_scenes.scenes import Scene, Thing

FOLDER = tiny_scenes.SAMPLES


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row: the seed fixes the picture, `answer` reads the truth off its scene."""

    name: str
    seed: int
    longest_px: int
    question: str
    answer: Callable[[Scene], str]

    @property
    def file(self) -> str:
        return f"{self.name}.png"


def the_only(scene: Scene, kind: str = "", color: str = "") -> Thing:
    """The one thing of that kind or colour. Raises ValueError where there is none or more than one."""
    (thing,) = (
        thing for thing in scene.things if thing.kind == (kind or thing.kind) and thing.color == (color or thing.color)
    )
    return thing


SAMPLES = (
    Sample(
        name="red-circle", seed=306, longest_px=160, question="What color is the circle?",
        answer=lambda scene: the_only(scene, "circle").color,
    ),
    Sample(
        name="three-shapes", seed=211, longest_px=160, question="How many shapes are there?",
        answer=lambda scene: str(len(scene.things)),
    ),
    Sample(
        name="square-and-star", seed=585, longest_px=160, question="Is there a green square?",
        answer=lambda scene: "yes" if the_only(scene, "square").color == "green" else "no",
    ),
    Sample(
        name="three-digits", seed=57, longest_px=192, question="What number is written?",
        answer=lambda scene: scene.number,
    ),
    Sample(
        name="dark-ground", seed=687, longest_px=160, question="Which shape is yellow?",
        answer=lambda scene: the_only(scene, color="yellow").kind,
    ),
    # Wider than 256 px: `detail=auto` cuts it into two tiles.
    Sample(name="wide", seed=5267, longest_px=320, question="Describe the image.", answer=scenes.caption),
)  # fmt: skip


def draw(sample: Sample) -> tuple[Image.Image, Scene]:
    """The picture, drawn at twice its size and halved for soft edges, and the scene on it."""
    scene = scenes.draw_scene(
        random.Random(sample.seed), held_out=True, number=sample.name == "three-digits", side_px=2 * sample.longest_px
    )
    width, height = scene.image.size
    return scene.image.resize((width // 2, height // 2), Image.Resampling.BOX), scene


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    rows = []
    for sample in SAMPLES:
        image, scene = draw(sample)
        image.save(FOLDER / sample.file, optimize=True)
        rows.append({"file": sample.file, "question": sample.question, "answer": sample.answer(scene)})
    (FOLDER / "samples.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
