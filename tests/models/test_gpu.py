"""What only a GPU shows: the same answers through the CUDA execution provider."""

from __future__ import annotations

import pytest

from models.errors import Unavailable
from models.onnx_model import OnnxModel, execution_providers
from models.tiny_scenes.evaluate import BundleRunner, cases
from serving.settings import embedded_bundles


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
    runner = BundleRunner(embedded_bundles()["tiny-scenes@fp32"])
    questions = list(cases(20, {"color", "count", "number"}))
    on_cpu = [runner.answer(case) for case in questions]
    runner.model = OnnxModel(runner.bundle, provider="cuda")
    assert [runner.answer(case) for case in questions] == on_cpu
