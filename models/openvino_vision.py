"""Tiles encoded by OpenVINO, from the same graph file, where that is installed and measured faster on this machine.

One SmolVLM2-256M tile, fp32 graph: with AMX OpenVINO computes in bf16 and takes 160 ms where ONNX Runtime's int8 takes
244 (two Xeon cores); with AVX2 alone it takes 1,631 ms where ONNX Runtime takes 1,342 and its int8 881 (two Zen 3
cores). So nobody can say beforehand, and the first load on a machine measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from models.errors import Unavailable
from models.machine import Remembered, compute_threads, processor
from models.onnx_model import OnnxModel

Floats = npt.NDArray[np.float32]
VisionBackend = Literal["auto", "onnxruntime", "openvino"]
FACT = "vision backend"
ROUNDS = 3
GAIN = 1.1  # times faster, to be worth a second runtime in memory
LEAST_COSINE = 0.999  # of each image token with ONNX Runtime's


class OpenVinoEncoder:
    """The vision graph compiled for the CPU. Raises Unavailable without OpenVINO or where it refuses the graph."""

    def __init__(self, graph: Path, *, threads: int = 0) -> None:
        try:
            import openvino

            core: Any = openvino.Core()
            options = {"INFERENCE_NUM_THREADS": threads or compute_threads(), "PERFORMANCE_HINT": "LATENCY"}
            self._compiled = core.compile_model(core.read_model(graph), "CPU", options)
        except ModuleNotFoundError as error:
            raise Unavailable("OpenVINO is not installed: pip install 'nearfar[openvino]'") from error
        except RuntimeError as error:
            raise Unavailable(f"OpenVINO does not take {graph.name}: {str(error).splitlines()[0][:200]}") from error
        self._inputs = {name for port in self._compiled.inputs for name in port.names}

    def __call__(self, pixels: Floats) -> Floats:
        """[tile, 3, height, width] -> image features [tile, image token, hidden]."""
        feeds: dict[str, npt.NDArray[Any]] = {"pixel_values": pixels[np.newaxis]}
        if "pixel_attention_mask" in self._inputs:
            feeds["pixel_attention_mask"] = np.ones((1, len(pixels), *pixels.shape[2:]), dtype=bool)
        return np.array(self._compiled(feeds)[0], dtype=np.float32)


def use_fastest(model: OnnxModel, backend: VisionBackend, remembered: Remembered, *, threads: int = 0) -> None:
    """Give the model OpenVINO's encoder where `backend` asks for it, or where `auto` finds it faster and no worse.

    What `auto` found is remembered for this graph, processor, number of threads and pair of versions. Raises
    Unavailable where `openvino` is asked for and cannot be had.
    """
    if backend == "onnxruntime":
        return
    graph = model.bundle.graph("vision_encoder")
    if backend == "openvino":
        model.other_encoder = OpenVinoEncoder(graph, threads=threads)
        return
    try:
        found_for = {
            "graph": model.bundle.manifest.files[model.bundle.manifest.graphs["vision_encoder"].file].sha256,
            "processor": processor(),
            "threads": threads or compute_threads(),
            "execution": model.execution,
            "versions": [version("openvino"), version("onnxruntime")],
        }
        known = remembered.get(FACT, found_for)
        if known != "onnxruntime":
            encoder = OpenVinoEncoder(graph, threads=threads)
            known = known or _faster(model, encoder)
            remembered.put(FACT, found_for, known)
    except (PackageNotFoundError, Unavailable):
        return
    if known == "openvino":
        model.other_encoder = encoder


def _faster(model: OnnxModel, encoder: Callable[[Floats], Floats]) -> str:
    side = model.bundle.manifest.processing.tile_px
    tile = np.random.default_rng(0).uniform(-1, 1, (1, 3, side, side)).astype(np.float32)
    ours, theirs = model.encode_tiles(tile), encoder(tile)  # both warm now
    cosine = (ours * theirs).sum(-1) / np.maximum(
        np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1), 1e-12
    )
    if not float(cosine.min()) >= LEAST_COSINE:
        return "onnxruntime"
    taken: dict[str, list[float]] = {"onnxruntime": [], "openvino": []}
    for _ in range(ROUNDS):
        for name, encode in (("onnxruntime", model.encode_tiles), ("openvino", encoder)):
            begun = time.perf_counter()
            encode(tile)
            taken[name].append(time.perf_counter() - begun)
    return "openvino" if min(taken["openvino"]) * GAIN < min(taken["onnxruntime"]) else "onnxruntime"
