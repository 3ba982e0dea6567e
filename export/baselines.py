"""Other systems as contestants of `nearfar bench`: transformers on torch, optimum-intel, and llama.cpp's own programs.

They run in this environment, on the same checkpoint (llama.cpp: on a GGUF file made from it), with the same threads.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from export.checkpoint import load_checkpoint
from models.errors import BadRequest, Unavailable
from models.machine import available_cores

RUN_WITHIN_S = 900
ENCODED = re.compile(r"(?:encoding done|slice encoded) in (\d+) ms")


class TorchContestant:
    """transformers' own model in float32 or bfloat16, eager, as a user would call it."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        torch.set_num_threads(available_cores())
        loaded = load_checkpoint(checkpoint)
        self._model = loaded.model.to(dtype).eval()
        self._dtype, self._tile_px, self._most = dtype, loaded.processing.tile_px, loaded.shapes.max_positions
        self.name = f"transformers {str(dtype).removeprefix('torch.')}"

    @torch.inference_mode()
    def vision(self, tiles: int) -> float | None:
        """One call for all tiles of a picture."""
        pixels = torch.rand(1, tiles, 3, self._tile_px, self._tile_px).mul(2).sub(1).to(self._dtype)
        begun = time.perf_counter()
        self._model.model.get_image_features(pixels)
        return time.perf_counter() - begun

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float | None:
        """The prompt with its cache, logits of the last position alone."""
        if tokens >= self._most:
            return None
        begun = time.perf_counter()
        self._prompt(tokens)
        return time.perf_counter() - begun

    @torch.inference_mode()
    def decode(self, context: int, tokens: int, rows: int = 1) -> float | None:
        """Greedy, one token at a time, of one row alone."""
        if rows > 1 or context + tokens >= self._most:
            return None
        past = self._prompt(context)
        token = torch.zeros(1, 1, dtype=torch.long)
        begun = time.perf_counter()
        for _ in range(tokens):
            answer = self._model(input_ids=token, past_key_values=past, use_cache=True)
            past, token = answer.past_key_values, answer.logits[:, -1:].argmax(-1)
        return time.perf_counter() - begun

    def service(self, slots: int) -> AbstractContextManager[str] | None:
        """It has none."""
        return None

    def _prompt(self, tokens: int) -> Any:
        ids = torch.zeros(1, tokens, dtype=torch.long)
        return self._model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def torch_contestants(checkpoint: Path) -> list[TorchContestant]:
    """transformers in float32 and in bfloat16."""
    return [TorchContestant(checkpoint, dtype) for dtype in (torch.float32, torch.bfloat16)]


class OptimumIntelContestant:
    """optimum-intel's own model over a folder that it exported for OpenVINO, as a user would call it."""

    def __init__(self, folder: Path) -> None:
        try:
            from optimum.intel import OVModelForVisualCausalLM  # not pinned here: it brings nncf and scikit-learn
        except ImportError as error:
            raise Unavailable(f"{folder.name} needs optimum-intel: pip install 'optimum-intel[openvino]'") from error
        if not (folder / "openvino_language_model.xml").is_file():
            raise BadRequest(f"{folder} was not exported by optimum-intel: it has no openvino_language_model.xml")
        threads = {"INFERENCE_NUM_THREADS": str(available_cores())}
        self._model = OVModelForVisualCausalLM.from_pretrained(folder, ov_config=threads)
        self._tile_px = int(self._model.config.vision_config.image_size)
        self._most = int(self._model.config.text_config.max_position_embeddings)
        self.name = f"optimum-intel {folder.name}"

    def vision(self, tiles: int) -> float | None:
        """One call for all tiles of a picture."""
        pixels = torch.rand(1, tiles, 3, self._tile_px, self._tile_px).mul(2).sub(1)
        begun = time.perf_counter()
        self._model.get_vision_embeddings(pixels, torch.zeros(1, 2, dtype=torch.long))
        return time.perf_counter() - begun

    def prefill(self, tokens: int) -> float | None:
        """The prompt with its cache. Its graph gives the logits of every position."""
        if tokens >= self._most:
            return None
        begun = time.perf_counter()
        self._run(torch.zeros(1, tokens, dtype=torch.long), tokens, None)
        return time.perf_counter() - begun

    def decode(self, context: int, tokens: int, rows: int = 1) -> float | None:
        """Greedy, one token at a time, of one row alone."""
        if rows > 1 or context + tokens >= self._most:
            return None
        answer = self._run(torch.zeros(1, context, dtype=torch.long), context, None)
        begun = time.perf_counter()
        for filled in range(context, context + tokens):
            token = answer.logits[:, -1:].argmax(-1)
            answer = self._run(token, filled + 1, answer.past_key_values)
        return time.perf_counter() - begun

    def service(self, slots: int) -> AbstractContextManager[str] | None:
        """It has none."""
        return None

    def _run(self, ids: torch.Tensor, filled: int, past: Any) -> Any:
        mask = torch.ones(1, filled, dtype=torch.long)
        return self._model.language_model(input_ids=ids, attention_mask=mask, past_key_values=past)


class LlamaCppContestant:
    """llama-bench for text, llama-mtmd-cli for tiles; `programs` is the folder of both."""

    def __init__(self, programs: Path, model: Path, projector: Path | None) -> None:
        for file in (programs / "llama-bench", model, *([projector] if projector else [])):
            if not file.is_file():
                raise BadRequest(f"{file} is missing")
        self._programs, self._model, self._projector = programs, model, projector
        self.name = f"llama.cpp {model.stem}"
        self._vision_s: dict[int, float] = {}

    def vision(self, tiles: int) -> float | None:
        """The median of the tiles that the program cuts out of one square picture, as it reports them.

        Taken once: the program has no way to encode without answering.
        """
        if self._projector is None or tiles != 1:
            return None
        if tiles not in self._vision_s:
            with tempfile.TemporaryDirectory() as folder:
                picture = Path(folder, "square.png")
                noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
                Image.fromarray(noise).save(picture)
                options = ("--mmproj", str(self._projector), "--image", str(picture), "-p", "What is this?")
                told = self._run("llama-mtmd-cli", *options, "-n", "1", "--temp", "0")
            found = [int(milliseconds) for milliseconds in ENCODED.findall(told)]
            if not found:
                raise Unavailable("llama-mtmd-cli did not say how long a tile took")
            self._vision_s[tiles] = statistics.median(found) / 1000
        return self._vision_s[tiles]

    def prefill(self, tokens: int) -> float | None:
        """`-p tokens`."""
        return self._bench("-p", str(tokens), "-n", "0")

    def decode(self, context: int, tokens: int, rows: int = 1) -> float | None:
        """`-n tokens` at depth `context`; the program runs no rows together."""
        return None if rows > 1 else self._bench("-p", "0", "-n", str(tokens), "-d", str(context))

    @contextmanager
    def service(self, slots: int) -> Iterator[str]:
        """llama-server with that many slots of 4,096 positions. Its cache of prompts is as it comes: on."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        seeing = ["--mmproj", str(self._projector)] if self._projector else []
        command = [
            str(self._programs / "llama-server"), "-m", str(self._model), *seeing, "-t", str(available_cores()),
            "--host", "127.0.0.1", "--port", str(port), "-np", str(slots), "-c", str(4096 * slots),
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._wait_for(port, process)
            yield f"http://127.0.0.1:{port}"
        except OSError as error:
            raise Unavailable(f"llama-server failed: {error}") from error
        finally:
            process.terminate()
            process.wait()

    @staticmethod
    def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.2)
        raise Unavailable("llama-server does not start")

    def _bench(self, *options: str) -> float:
        told = self._run("llama-bench", *options, "-r", "1", "-o", "json", errors=subprocess.DEVNULL)
        return float(json.loads(told)[0]["avg_ns"]) / 1e9

    def _run(self, program: str, *options: str, errors: int = subprocess.STDOUT) -> str:
        command = [str(self._programs / program), "-m", str(self._model), "-t", str(available_cores()), *options]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, timeout=RUN_WITHIN_S, check=True, text=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable(f"{program} failed: {error}"[:300]) from error
        return done.stdout
