"""A stored prompt with what float32 made of it, played again where a bundle is loaded for the first time.

The same graphs can compute otherwise on another processor: x86 with AVX2 and without VNNI adds products of 8-bit
numbers in pairs, in 16 bits, where weights that fill their 8 bits can saturate, silently. Exports choose weights that
cannot; this is the check that a bundle does on this machine what it did where it was measured.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from models.bundle import MANIFEST, Bundle, sha256_of
from models.errors import BundleError
from models.execution import RUNTIME
from models.machine import Remembered, processor
from models.onnx_model import OnnxModel
from models.quality import Case, cosines, log_softmax, observe

Halves = npt.NDArray[np.float16]

FILE = "replay.npz"
FACT = "replay"
LEAST_COSINE = 0.999  # of the image features with float32's, on average
# Rounding differs a little from kernel to kernel: twice as far from float32 as where the bundle was made is no failure.
LEEWAY = 2.0
MOST_KL = 0.1  # nats at one position; larger where the recipe itself was further off


class ReplayFailed(BundleError):
    """On this machine the graphs do not give what they are to give. The message has the figure."""

    type = "replay_failed"

    def __init__(self, message: str, bundle: Bundle) -> None:
        super().__init__(message)
        self.manifest, self.folder = bundle.manifest, bundle.folder


class Distance(NamedTuple):
    """From float32: mean cosine of the image features, and KL of the last position's logits in nats."""

    cosine: float
    kl: float


class Replay(NamedTuple):
    """What the file holds. float16 is fine enough: half a step of 8-bit pixels is 8 times coarser."""

    ids: npt.NDArray[np.int32]  # [position]
    pixels: Halves  # [tile, channel, height, width]
    features: Halves  # [tile, image token, hidden]
    logits: Halves  # [vocabulary]
    bounds: npt.NDArray[np.float32]  # least cosine, most KL

    def distance(self, model: OnnxModel) -> Distance:
        """Run the prompt, and compare."""
        seen = observe(model, self.ids.tolist(), self.pixels.astype(np.float32), tokens=1)
        expected, got = log_softmax(self.logits.astype(np.float32)), log_softmax(seen.logits[0])
        kl = float((np.exp(expected) * (expected - got)).sum())
        return Distance(float(cosines(self.features.astype(np.float32), seen.features).mean()), kl)


def write_replay(case: Case, model: OnnxModel, folder: Path) -> None:
    """Store the case's prompt and its reference, with bounds by how far the model is from it on this machine."""
    pixels, features, logits = (array.astype(np.float16) for array in (case.pixels, case.features, case.logits[0]))
    replay = Replay(np.array(case.ids, np.int32), pixels, features, logits, bounds=np.zeros(2, np.float32))
    cosine, kl = replay.distance(model)
    bounds = np.array([min(LEAST_COSINE, 1 - LEEWAY * (1 - cosine)), max(MOST_KL, LEEWAY * kl)], np.float32)
    np.savez_compressed(folder / FILE, **replay._replace(bounds=bounds)._asdict())


def check_replay(model: OnnxModel, remembered: Remembered) -> Distance | None:
    """Play a bundle's replay on this machine unless it has passed here before; None where it was not played.

    Raises ReplayFailed. What passed is remembered for the bundle, processor, runtime and vision encoder.
    """
    manifest = model.bundle.manifest
    if manifest.replay is None:
        return None
    found_for = {
        "bundle": sha256_of(model.bundle.folder / MANIFEST),
        "processor": processor(),
        "runtime": RUNTIME,
        "encoder": type(model.other_encoder).__name__,
        "execution": model.execution,
    }
    if remembered.get(FACT, found_for):
        return None
    replay = _read(model.bundle.folder / manifest.replay)
    least_cosine, most_kl = replay.bounds.tolist()
    found = replay.distance(model)
    if not (found.cosine >= least_cosine and found.kl <= most_kl):
        raise ReplayFailed(
            f"{model.bundle.target} computes wrongly on this processor ({processor().name}): the cosine of its image "
            f"features is {found.cosine:.4f}, at least {least_cosine:.4f} is right; KL is {found.kl:.2g}, "
            f"at most {most_kl:.2g} is",
            model.bundle,
        )
    remembered.put(FACT, found_for, found._asdict())
    return found


def _read(path: Path) -> Replay:
    try:
        # np.load closes no path that is no zip.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            return Replay(**{name: stored[name] for name in Replay._fields})
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} is no replay: {error}") from error
