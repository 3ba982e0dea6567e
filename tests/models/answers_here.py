"""What the embedded bundles answer in the Python that runs this file, as JSON: test_aarch64.py runs it in two.

Of each bundle: who answered the bundled samples and what, and the last logits of its replay's prompt.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
from pathlib import Path

import numpy as np

from models.bundle import Bundle
from models.machine import processor
from models.onnx_model import OnnxModel
from models.quality import observe
from models.request import question
from models.tiny_scenes import BUNDLES, SAMPLES
from serving.once import infer_once
from serving.settings import Settings


def answers(folder: Path) -> list[tuple[str, str]]:
    """Target and text in the order of samples.json, as `nearfar infer --model FOLDER` gives them.

    The first load plays the bundle's replay. Where that fails the other bundle answers, and the target tells.
    """
    settings = Settings(models=(str(folder),))
    asked = json.loads((SAMPLES / "samples.json").read_text())
    requests = [question(each["question"], images=((SAMPLES / each["file"]).read_bytes(),)) for each in asked]
    found = [asyncio.run(infer_once(settings, os.environ, request, None)) for request in requests]
    return [(each["target"], each["text"]) for each in found]


def logits(folder: Path) -> list[float]:
    """[vocabulary], at the last position of the replay's prompt."""
    with np.load(folder / "replay.npz") as replay:
        ids, pixels = replay["ids"].tolist(), replay["pixels"].astype(np.float32)
    row: list[float] = observe(OnnxModel(Bundle.load(folder)), ids, pixels, tokens=1).logits[0].tolist()
    return row


if __name__ == "__main__":
    bundles = {name: {"answers": answers(folder), "logits": logits(folder)} for name, folder in BUNDLES.items()}
    print(json.dumps({"machine": platform.machine(), "sets": processor().instruction_sets, "bundles": bundles}))
