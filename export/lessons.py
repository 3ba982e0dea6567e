"""A question with its right answer becomes what a model learns from: ids, targets and tiles, as serving makes them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from export.checkpoint import Checkpoint
from models.errors import BadRequest, NearfarError
from models.expand import Expansion, expand
from models.images import Detail, ImageProcessing, decode_image, tile_frame, tile_image
from models.quality import Floats
from models.request import AnswerRequest, GenerationSettings

END_OF_TURN = "<end_of_utterance>"
NOT_LEARNT = -100  # the target that torch's cross-entropy leaves out


class Example(Protocol):
    """A question, its files read when it is asked for, and what is right. The first reference is learnt."""

    @property
    def row_id(self) -> str: ...

    @property
    def references(self) -> tuple[str, ...]: ...

    def request(self, settings: GenerationSettings, detail: Detail) -> AnswerRequest:
        """Raises BadRequest and its kin."""
        ...


class Lesson(NamedTuple):
    """One example. `targets` are the ids of the answer, and NOT_LEARNT at the prompt."""

    ids: list[int]
    targets: list[int]
    pixels: Floats  # [tile, 3, height, width]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Makes lessons of examples with a checkpoint's own tokenizer, template and tiles."""

    checkpoint: Checkpoint
    processing: ImageProcessing
    detail: Detail

    def read(self, example: Example) -> Lesson:
        """Raises BadRequest that names the row: a file that cannot be read, no answer, more than the context holds."""
        try:
            return self._read(example)
        except NearfarError as error:
            raise BadRequest(f"row {example.row_id}: {error.message}") from error

    def _read(self, example: Example) -> Lesson:
        if not example.references or not example.references[0].strip():
            raise BadRequest("reference: is missing, and there is nothing else to learn from")
        checkpoint, processing = self.checkpoint, self.processing
        request = example.request(GenerationSettings(), self.detail)
        shown = Expansion(frame_edge_px=processing.tile_px, page_edge_px=processing.longest_edge)
        request = expand(request, shown)
        tiled = []
        for part in request.images:
            image = decode_image(part.data).image
            tiled.append(
                tile_frame(image, processing) if part.is_frame else tile_image(image, request.detail, processing)
            )
        prompt = checkpoint.prompts.ids(request.messages, [picture.grid for picture in tiled])
        answer = [*checkpoint.tokenizer.encode_literal(f" {example.references[0].strip()}"), self._end]
        most, length = checkpoint.shapes.max_positions, len(prompt) + len(answer)
        if length > most:
            raise BadRequest(f"question and answer are {length} tokens, the model has {most} positions")
        none = np.empty((0, 3, processing.tile_px, processing.tile_px), np.float32)
        return Lesson(
            ids=prompt + answer,
            targets=[NOT_LEARNT] * len(prompt) + answer,
            pixels=np.concatenate([none, *(picture.pixels for picture in tiled)]),
        )

    @property
    def _end(self) -> int:
        tokenizer = self.checkpoint.tokenizer
        if END_OF_TURN in tokenizer.special_tokens():
            return tokenizer.marker(END_OF_TURN)
        return self.checkpoint.shapes.stop_token_ids[0]


class Lessons(Dataset[Lesson]):
    """Examples read when their turn comes: pictures are held as files, not as tiles."""

    def __init__(self, examples: Sequence[Example], reader: Reader) -> None:
        self._examples, self._reader = examples, reader

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Lesson:
        return self._reader.read(self._examples[index])

    def check(self, *, show_progress: bool) -> None:
        """Read every one of them once: what is wrong is told before anything is trained. Raises BadRequest."""
        hidden = not show_progress or not len(self)
        for index in tqdm(range(len(self)), desc="read", unit="row", file=sys.stderr, disable=hidden):
            self[index]


def collate(lessons: Sequence[Lesson]) -> dict[str, torch.Tensor]:
    """What the model's forward takes: ids and targets padded to the right, and where no row has one no pictures.

    Tiles are [row, tile, 3, height, width]; rows of fewer tiles end in tiles of zeros, which transformers leaves out.
    """
    length, tiles = max(len(each.ids) for each in lessons), max(len(each.pixels) for each in lessons)
    batch: dict[str, Any] = {
        "input_ids": torch.zeros(len(lessons), length, dtype=torch.long),
        "attention_mask": torch.zeros(len(lessons), length, dtype=torch.long),
        "labels": torch.full((len(lessons), length), NOT_LEARNT),
    }
    for row, each in enumerate(lessons):
        batch["input_ids"][row, : len(each.ids)] = torch.tensor(each.ids)
        batch["attention_mask"][row, : len(each.ids)] = 1
        batch["labels"][row, : len(each.ids)] = torch.tensor(each.targets)
    if tiles:
        batch["pixel_values"] = torch.zeros(len(lessons), tiles, *lessons[0].pixels.shape[1:])
        for row, each in enumerate(lessons):
            batch["pixel_values"][row, : len(each.pixels)] = torch.from_numpy(each.pixels)
    return batch
