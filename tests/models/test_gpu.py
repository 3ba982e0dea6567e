"""What only a GPU shows: the same answers through the CUDA execution provider."""

from __future__ import annotations

import pytest

from models.images import tile_image
from models.loaded_model import LoadedModel
from models.request import ImagePart, Message, TextPart
from models.tiny_scenes import BUNDLES
from models.tiny_scenes.held_out import Case, cases


def answer(model: LoadedModel, case: Case) -> list[int]:
    tiled = tile_image(case.scene.image, case.detail, model.bundle.manifest.processing)
    message = Message(role="user", parts=(ImagePart(data=b""), TextPart(text=case.question)))
    ids = model.renderer.ids([message], [tiled.grid])
    return model.onnx.greedy(ids, model.onnx.encode_tiles(tiled.pixels), 64)


@pytest.mark.gpu
def test_cuda_answers_as_the_cpu_does() -> None:
    folder = BUNDLES["tiny-scenes@fp32"]
    cpu, cuda = (LoadedModel.load(folder, provider=provider) for provider in ("cpu", "cuda"))
    for case in cases(20, {"color", "count", "number"}):
        assert answer(cuda, case) == answer(cpu, case)
