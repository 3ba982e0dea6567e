"""What must lie in a SmolVLM or Idefics3 checkpoint folder, told before any weight is read. Knows no torch.

Reads safetensors alone: no pickle, no remote code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from models.errors import NearfarError
from models.files import read_object

MODEL_TYPES = ("smolvlm", "idefics3")
TEXT_MODEL_TYPES = ("llama", "smollm3")
PRECISIONS = ("F32", "BF16", "F16")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class CheckpointError(NearfarError):
    """A checkpoint folder that cannot be exported. The message says what is wrong with which file."""

    status = 400
    type = "checkpoint_error"


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """One of the folder's JSON files, which must hold an object. Raises CheckpointError."""
    return read_object(folder, name, CheckpointError, otherwise="no checkpoint")


def model_name(folder: Path) -> str:
    """What a model of that folder is called unless somebody names it. Fetched, the commit stands behind an @."""
    return folder.name.partition("@")[0]


def check_config(config: dict[str, Any], folder: Path, text_types: Sequence[str] = TEXT_MODEL_TYPES) -> None:
    """Raises CheckpointError for a model of another kind, or one whose text model is of none of `text_types`."""
    if "auto_map" in config:
        raise CheckpointError(f"{folder}: its model is code of its own (auto_map), and remote code is never run")
    if "quantization_config" in config or "quantization" in config:  # the latter is MLX's
        raise CheckpointError(f"{folder} is quantized already: export the original weights")
    if config.get("model_type") not in MODEL_TYPES:
        known = " or ".join(MODEL_TYPES)
        raise CheckpointError(f"{folder}: model_type is {config.get('model_type')!r}, only {known} can be exported")
    text = config.get("text_config", {})
    if not isinstance(text, dict) or text.get("model_type", "llama") not in text_types:
        raise CheckpointError(f"{folder}: only text models of type {' or '.join(text_types)} can be exported")
    if "sliding_attention" in (text.get("layer_types") or ()):
        raise CheckpointError(f"{folder}: a text model with sliding attention cannot be exported")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files in name order. Raises CheckpointError where there are none, or not all that are named."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = read_json(folder, index.name).get("weight_map")
        names = set(map(str, named.values())) if isinstance(named, dict) else set()
        missing = [name for name in sorted(names) if Path(name).name != name or not (folder / name).is_file()]
        if missing or not names:
            raise CheckpointError(f"{index} names no file or one that is not there: {', '.join(missing)}")
        return [folder / name for name in sorted(names)]
    if any(True for pattern in PICKLED for _ in folder.glob(pattern)):
        raise CheckpointError(f"{folder} holds its weights as pickle, which can run code: convert them to safetensors")
    raise CheckpointError(f"{folder} has no model.safetensors")


class StoredWeight(NamedTuple):
    """What a safetensors header says of a weight."""

    kind: str
    shape: tuple[int, ...]


def is_weight(name: str) -> bool:
    """Buffers of older versions, such as inv_freq, are none."""
    return name.endswith((".weight", ".bias"))


def stored_weights(files: Sequence[Path]) -> dict[str, StoredWeight]:
    """Of all files, without buffers. Raises CheckpointError for a damaged file and for weights that are no floats."""
    found = {}
    for file in files:
        try:
            with safe_open(file, "np") as opened:
                for name in filter(is_weight, opened.keys()):
                    weight = opened.get_slice(name)
                    found[name] = StoredWeight(weight.get_dtype(), tuple(weight.get_shape()))
        except Exception as error:  # the library's own kind, straight from Exception, and OSError
            raise CheckpointError(f"{file} does not load: {str(error).splitlines()[0][:300]}") from error
    strange = sorted({weight.kind for weight in found.values()} - set(PRECISIONS))
    if strange:
        raise CheckpointError(f"{files[0].parent} has weights of type {', '.join(strange)}")
    return found


def sha256_together(files: Sequence[Path]) -> str:
    """Of the files' bytes one after another: by it exports of the same weights know each other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()
