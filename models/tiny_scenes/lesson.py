"""Draws a data set for fine-tuning: `python -m models.tiny_scenes.lesson FOLDER` writes pictures and `lesson.jsonl`.

It teaches a colour and a shape that tiny-scenes never saw. Rows of the slice `new=yes` ask about them; the others
repeat what the model knows, so that it does not forget that. Every answer is read off the drawn scene.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.tiny_scenes import scenes

FILE = "lesson.jsonl"
# What is asked about the new things, as often as it stands here.
KINDS_OF_NEW = ("color", "shape", "color", "shape", "presence", "count")


def questions(new: int, known: int, seed: int) -> Iterator[tuple[scenes.Scene, dict[str, Any]]]:
    """Scenes, each with one row about it: first those about the new things."""
    rng = random.Random(f"lesson:{seed}")
    for number in range(new + known):
        is_new = number < new
        kind = KINDS_OF_NEW[number % len(KINDS_OF_NEW)] if is_new else list(scenes.ASKERS)[number % len(scenes.ASKERS)]
        while True:
            palette, number_drawn = (scenes.EXTENDED, False) if is_new else (scenes.TRAINED, kind == "number" or None)
            scene = scenes.draw_scene(rng, palette=palette, number=number_drawn)
            pair = scenes.ASKERS[kind](scene, rng)
            if pair is not None and (not is_new or _names_the_new(pair)):
                break
        slices = {"new": "yes" if is_new else "no", "kind": kind}
        row = {"id": number + 1, "image": f"{number + 1:05}.png", "prompt": pair[0], "reference": pair[1]}
        yield scene, row | {"measure": "exact", "slices": slices}


def _names_the_new(pair: scenes.Question) -> bool:
    return any(name in " ".join(pair) for name in (scenes.NEW_COLOR, scenes.NEW_SHAPE))


def write_lesson(folder: Path, *, new: int, known: int, seed: int) -> Path:
    """Write pictures and rows, and return the file of the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for scene, row in questions(new, known, seed):
        scene.image.save(folder / row["image"])
        rows.append(json.dumps(row))
    (folder / FILE).write_text("\n".join(rows) + "\n")
    return folder / FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--new", type=int, default=625, help="rows about the new colour and shape")
    parser.add_argument("--known", type=int, default=2000, help="rows that repeat what the model knows")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    print(write_lesson(arguments.pop("folder"), **arguments))


if __name__ == "__main__":
    main()
