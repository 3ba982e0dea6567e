"""Exact match of a tiny-scenes bundle on held-out scenes: `python -m models.tiny_scenes.evaluate BUNDLE`.

Held-out scenes come from other seeds and write only numbers that training never wrote. Rows marked `unseen phrasing`
ask in words that training never used. The bundle runs as it is served: its own template, tiles and quantized graphs.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from models.images import Detail, tile_image
from models.loaded_model import LoadedModel
from models.request import ImagePart, Message, TextPart
from models.tiny_scenes import scenes

HELD_OUT_SEED = "held-out"  # training seeds its scenes with "<number>:<step>", so no stream is shared
MAX_ANSWER_TOKENS = 64


class Case(NamedTuple):
    """One question about one scene. `row` is the table's line it counts in."""

    row: str
    scene: scenes.Scene
    question: str
    answer: str
    detail: Detail = "auto"
    text_first: bool = False


class Row(NamedTuple):
    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked


_KINDS = [name for name in scenes.ASKERS if name != "caption"]
# Row suffix, kinds, detail, text before the picture, unseen phrasing.
_VARIANTS: tuple[tuple[str, list[str], Detail, bool, bool], ...] = (
    ("", [*_KINDS, "caption"], "auto", False, False),
    (", unseen phrasing", [name for name in _KINDS if name != "json"], "auto", False, True),
    (", detail=high", ["color", "count", "number"], "high", False, False),
    (", text before picture", ["color", "count", "number"], "auto", True, False),
)


def cases(per_row: int, rows: Collection[str] | None = None) -> Iterator[Case]:
    """Held-out questions, `per_row` of every row of the table, or of the named ones. Each row has its own seed."""
    for suffix, kinds, detail, text_first, unseen in _VARIANTS:
        for kind in kinds:
            row = kind + suffix
            if rows is not None and row not in rows:
                continue
            rng = random.Random(f"{HELD_OUT_SEED}:{row}")
            asked = 0
            while asked < per_row:
                scene = scenes.draw_scene(rng, held_out=True, number=True if kind == "number" else None)
                pair = scenes.ASKERS[kind](scene, rng, unseen)
                # Counting is claimed up to four; five is trained so that four is not simply "many".
                if pair is None or (kind == "count" and pair[1] == "5"):
                    continue
                asked += 1
                yield Case(row, scene, *pair, detail, text_first)


def answer(model: LoadedModel, case: Case) -> str:
    """The greedy answer's text, stripped."""
    tiled = tile_image(case.scene.image, case.detail, model.bundle.manifest.processing)
    picture, text = ImagePart(data=b""), TextPart(text=case.question)
    message = Message(role="user", parts=(text, picture) if case.text_first else (picture, text))
    ids = model.renderer.ids([message], [tiled.grid])
    generated = model.onnx.greedy(ids, model.onnx.encode_tiles(tiled.pixels), MAX_ANSWER_TOKENS)
    return model.tokenizer.decode(generated).strip()


def evaluate(folder: Path, per_row: int, rows: Collection[str] | None = None) -> dict[str, Row]:
    """Exact match per row, answers compared to the letter."""
    model = LoadedModel.load(folder)
    table: dict[str, Row] = {}
    for case in tqdm(list(cases(per_row, rows)), unit="question", disable=None):
        before = table.get(case.row, Row(0, 0))
        table[case.row] = Row(before.right + (answer(model, case) == case.answer), before.asked + 1)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--per-row", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    table = evaluate(arguments.bundle, arguments.per_row)
    if arguments.json:
        print(json.dumps({name: {"exact_match": round(row.share, 4), "n": row.asked} for name, row in table.items()}))
        return
    for name, row in table.items():
        print(f"{name:36} {row.share:6.3f}  n={row.asked}")


if __name__ == "__main__":
    main()
