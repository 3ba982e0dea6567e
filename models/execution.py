"""Where graphs are computed: ONNX Runtime's execution providers as rows; what sessions are told of the processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import onnxruntime as ort

from models.bundle import Bundle
from models.errors import Unavailable
from models.machine import Processor, compute_threads

ExecutionProvider = Literal["auto", "cpu", "cuda", "coreml", "directml", "openvino", "qnn"]
RUNTIME = f"onnxruntime {ort.__version__}"
CPU = "CPUExecutionProvider"
SPINNING_FROM_BYTES = 50_000_000
FASTMATH = "mlas.enable_gemm_fastmath_arm64_bfloat16"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One execution provider. `plugin`: the module with a library of its own, which is not built into onnxruntime.

    `tested`: our tests have run on it. The options are the provider's, `session` the session's attributes it asks for.
    """

    runtime_name: str
    comes_with: str
    plugin: str | None = None
    tested: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    session: Mapping[str, Any] = field(default_factory=dict)

    @property
    def available(self) -> bool:
        """Has the installed onnxruntime got it? Whether the machine has the device shows when a session is made."""
        return self.runtime_name in ort.get_available_providers() or bool(self.plugin and find_spec(self.plugin))


# Options: onnxruntime.ai/docs/execution-providers (read 2026-11). All but the CPU's own are untested: no such device
# was at hand, and those tests that are marked gpu have not run on one.
ROWS: Mapping[ExecutionProvider, Row] = {
    "cpu": Row(runtime_name=CPU, comes_with="every onnxruntime", tested=True),
    "cuda": Row(
        runtime_name="CUDAExecutionProvider", comes_with="onnxruntime-gpu in the place of onnxruntime (Dockerfile.gpu)"
    ),
    "coreml": Row(
        runtime_name="CoreMLExecutionProvider",
        comes_with="onnxruntime on macOS",
        options={"ModelFormat": "MLProgram", "MLComputeUnits": "ALL"},
    ),
    "directml": Row(
        runtime_name="DmlExecutionProvider",
        comes_with="onnxruntime-directml in the place of onnxruntime, on Windows",
        session={"enable_mem_pattern": False},  # it takes no session with memory patterns
    ),
    "openvino": Row(
        runtime_name="OpenVINOExecutionProvider",
        comes_with="onnxruntime-openvino in the place of onnxruntime (vision alone: NEARFAR_VISION_BACKEND)",
    ),
    "qnn": Row(
        runtime_name="QNNExecutionProvider",
        comes_with="onnxruntime-qnn beside onnxruntime, on a Snapdragon",
        plugin="onnxruntime_qnn",
    ),
}


def available() -> tuple[ExecutionProvider, ...]:
    """What the installed onnxruntime has."""
    return tuple(name for name, row in ROWS.items() if row.available)


def refusal(choice: ExecutionProvider, there: Sequence[ExecutionProvider]) -> str | None:
    """Why that choice cannot be had where these are there, in one line; None where it can."""
    if choice == "auto" or choice in there:
        return None
    return (
        f"execution_provider {choice} is not in the installed {RUNTIME}, which has {', '.join(there)}; "
        f"{choice} comes with {ROWS[choice].comes_with}"
    )


def chosen(choice: ExecutionProvider) -> ExecutionProvider:
    """The provider behind a choice; `auto` is CUDA where this onnxruntime has it, else the CPU.

    Raises Unavailable for one that it has not, with what it has.
    """
    if why := refusal(choice, available()):
        raise Unavailable(why)
    if choice == "auto":
        return "cuda" if ROWS["cuda"].available else "cpu"
    return choice


def runs_on_gpu(choice: ExecutionProvider) -> bool:
    """Whether sessions will be made for an NVIDIA GPU. Raises nothing: what is absent is told when they are."""
    return choice in ("auto", "cuda") and ROWS["cuda"].available


def untested(choice: ExecutionProvider) -> str | None:
    """What a user of that choice must know; None where our tests have run on it. Raises Unavailable."""
    provider = chosen(choice)
    return None if ROWS[provider].tested else f"computed through {provider}, on which nearfar is untested"


def spins(model_bytes: int) -> bool:
    """Whether threads wait for each other spinning, within a run.

    On two Zen 3 cores a SmolVLM2-256M token takes a fifth less time with it (100 tokens/s against 80, context 128). But
    tiny-scenes, whose runs are short, loses the core that HTTP needs: 8 clients, 66 requests/s without, 33 with it.
    """
    return model_bytes >= SPINNING_FROM_BYTES


def fastmath(bundle: Bundle, cpu: Processor) -> bool:
    """Whether float32 products may be made of bfloat16 factors: on Arm with those instructions, for quantized recipes.

    Only with a replay, which is compared with float32 at the first load: what it spoils does not get past that. The
    kernels of 8-bit products (KleidiAI's among them) ONNX Runtime chooses by itself.
    """
    return "bf16" in cpu.instruction_sets and bundle.manifest.replay is not None and bundle.manifest.recipe != "fp32"


def session_options(bundle: Bundle, cpu: Processor, *, threads: int = 0) -> ort.SessionOptions:
    """Of every session of that bundle on this processor. `threads` 0: as many as it has fast cores."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or compute_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong comes back as an exception
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins(bundle.model_bytes))))
    options.add_session_config_entry("session.force_spinning_stop", "1")  # behind a run nobody waits
    options.add_session_config_entry(FASTMATH, str(int(fastmath(bundle, cpu))))
    return options


def open_session(path: Path, options: ort.SessionOptions, provider: ExecutionProvider) -> ort.InferenceSession:
    """A graph through that provider; operators it has no kernel for stay on the CPU. Raises the runtime's kinds."""
    row = ROWS[provider]
    for name, value in row.session.items():
        setattr(options, name, value)
    if row.plugin is None or row.runtime_name in ort.get_available_providers():
        behind = [] if provider == "cpu" else [CPU]
        return ort.InferenceSession(str(path), options, providers=[(row.runtime_name, dict(row.options)), *behind])
    _register(row)
    devices = [each for each in ort.get_ep_devices() if each.ep_name == row.runtime_name]
    if not devices:
        raise Unavailable(f"{row.plugin} finds no device of {provider} on this machine")
    options.add_provider_for_devices(devices, dict(row.options))
    return ort.InferenceSession(str(path), options)


def _register(row: Row) -> None:
    """Have ONNX Runtime load a plugin's library, once a process."""
    assert row.plugin
    if not any(each.ep_name == row.runtime_name for each in ort.get_ep_devices()):
        ort.register_execution_provider_library(row.runtime_name, import_module(row.plugin).get_library_path())


assert set(ROWS) | {"auto"} == set(get_args(ExecutionProvider))
