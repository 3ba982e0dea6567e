"""What only a GPU shows: the same answers through the CUDA execution provider."""

from __future__ import annotations

import pytest

from models.errors import Unavailable
from models.loaded_model import LoadedModel
from models.onnx_model import execution_providers
from models.tiny_scenes import BUNDLES
from models.tiny_scenes.evaluate import answer, cases


def test_cuda_is_asked_for_in_vain_with_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(Unavailable, match="onnxruntime-gpu"):
        execution_providers("cuda")
    assert execution_providers("auto") == ["CPUExecutionProvider"]


def test_cuda_comes_before_the_cpu_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: both)
    assert execution_providers("auto") == execution_providers("cuda") == both
    assert execution_providers("cpu") == ["CPUExecutionProvider"]


@pytest.mark.gpu
def test_cuda_answers_as_the_cpu_does() -> None:
    folder = BUNDLES["tiny-scenes@fp32"]
    cpu, cuda = (LoadedModel.load(folder, provider=provider) for provider in ("cpu", "cuda"))
    for case in cases(20, {"color", "count", "number"}):
        assert answer(cuda, case) == answer(cpu, case)
