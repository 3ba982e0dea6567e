"""Execution providers: what is chosen, what is refused and why; what sessions are told of the processor."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

from models.bundle import Bundle
from models.errors import Unavailable
from models.execution import CPU, FASTMATH, ROWS, chosen, open_session, session_options, untested
from models.machine import Processor, compute_threads
from models.onnx_model import OnnxModel
from models.tiny_scenes import BUNDLES

ARM = Processor("Neoverse-V1", ("asimd", "asimddp", "i8mm", "bf16"))
BOARD = Processor("Raspberry Pi 5 Model B Rev 1.0", ("asimd", "asimddp"))
INT8 = BUNDLES["tiny-scenes@int8"]


def has(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """An onnxruntime that has those providers and the CPU's."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [*names, CPU])


def test_every_provider_s_name_is_one_that_onnxruntime_knows() -> None:
    assert {row.runtime_name for row in ROWS.values()} <= set(ort.get_all_providers())


@pytest.mark.parametrize("choice", [name for name in ROWS if name != "cpu"])
def test_a_provider_that_is_absent_is_refused_in_one_line_with_what_is_there(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch)
    with pytest.raises(Unavailable) as caught:
        OnnxModel(Bundle.load(INT8), provider=choice)  # type: ignore[arg-type]
    message = caught.value.message
    assert (
        f"execution_provider {choice} is not in the installed onnxruntime {ort.__version__}, which has cpu;" in message
    )
    assert ROWS[choice].comes_with in message  # type: ignore[index]
    assert "\n" not in message


def test_auto_is_cuda_where_it_is_there_and_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch)
    assert (chosen("auto"), untested("auto")) == ("cpu", None)
    has(monkeypatch, "CUDAExecutionProvider", "CoreMLExecutionProvider")
    assert chosen("auto") == "cuda"
    assert chosen("cpu") == "cpu"
    assert untested("coreml") == "computed through coreml, on which nearfar is untested"


@pytest.mark.parametrize("choice", ["coreml", "directml", "openvino"])
def test_a_provider_comes_before_the_cpu_with_its_options(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS[choice]  # type: ignore[index]
    asked = []
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *given, **named: asked.append((given, named)))
    has(monkeypatch, row.runtime_name)
    options = ort.SessionOptions()
    open_session(Path("graph.onnx"), options, choice)  # type: ignore[arg-type]
    assert asked == [(("graph.onnx", options), {"providers": [(row.runtime_name, row.options), CPU]})]
    assert options.enable_mem_pattern == (choice != "directml")


def test_a_plugin_is_registered_once_and_gets_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch)
    plugin = ModuleType("onnxruntime_qnn")
    plugin.__spec__ = importlib.machinery.ModuleSpec("onnxruntime_qnn", None)
    plugin.get_library_path = lambda: "libqnn.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", plugin)
    devices, registered, sessions = [], [], []
    npu = SimpleNamespace(ep_name="QNNExecutionProvider")

    def register(name: str, library: str) -> None:
        registered.append((name, library))
        devices.append(npu)

    monkeypatch.setattr("onnxruntime.get_ep_devices", lambda: devices)
    monkeypatch.setattr("onnxruntime.register_execution_provider_library", register)
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *given, **named: sessions.append((given, named)))
    given: list[object] = []
    options = SimpleNamespace(add_provider_for_devices=lambda found, settings: given.append((found, settings)))
    assert chosen("qnn") == "qnn"
    for _ in range(2):
        open_session(Path("graph.onnx"), options, "qnn")
    assert registered == [("QNNExecutionProvider", "libqnn.so")]
    assert given == [([npu], {})] * 2
    assert sessions == [(("graph.onnx", options), {})] * 2


def test_a_plugin_without_a_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch)
    plugin = ModuleType("onnxruntime_qnn")
    plugin.get_library_path = lambda: "libqnn.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", plugin)
    monkeypatch.setattr("onnxruntime.get_ep_devices", list)
    monkeypatch.setattr("onnxruntime.register_execution_provider_library", lambda name, library: None)
    with pytest.raises(Unavailable, match="onnxruntime_qnn finds no device of qnn"):
        open_session(Path("graph.onnx"), ort.SessionOptions(), "qnn")


@pytest.mark.parametrize(
    ("target", "cpu", "expected"),
    [("tiny-scenes@int8", ARM, "1"), ("tiny-scenes@int8", BOARD, "0"), ("tiny-scenes@fp32", ARM, "0")],
)
def test_bfloat16_products_are_for_quantized_bundles_on_processors_that_have_them(
    target: str, cpu: Processor, expected: str
) -> None:
    bundle = Bundle.read(BUNDLES[target])
    assert bundle.manifest.replay
    assert session_options(bundle, cpu).get_session_config_entry(FASTMATH) == expected


def test_without_a_replay_to_check_them_there_are_no_bfloat16_products() -> None:
    bundle = Bundle.read(INT8)
    unchecked = Bundle(INT8, bundle.manifest.model_copy(update={"replay": None}))
    assert session_options(unchecked, ARM).get_session_config_entry(FASTMATH) == "0"


def test_threads_are_those_that_are_set_or_one_a_fast_core() -> None:
    bundle = Bundle.read(INT8)
    assert session_options(bundle, BOARD, threads=3).intra_op_num_threads == 3
    assert session_options(bundle, BOARD).intra_op_num_threads == compute_threads()


def test_a_session_takes_arm_s_options_and_its_answers_are_known_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    # A runtime without those kernels ignores the key: what is computed here stays the same.
    plain = OnnxModel(Bundle.load(INT8))
    monkeypatch.setattr("models.onnx_model.processor", lambda: ARM)
    on_arm = OnnxModel(Bundle.load(INT8))
    assert (plain.execution, on_arm.execution) == ("cpu", "cpu, bfloat16 products")
    assert np.array_equal(plain.embed([1, 2]), on_arm.embed([1, 2]))
