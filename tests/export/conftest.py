"""Checkpoints to export: the embedded one, and small ones of random weights in other shapes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.bundle import Bundle

# Where the export extra is not installed, there is nothing to test but the export to MLX, which does without.
OTHERS = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_mlx.py"]
collect_ignore = [] if importlib.util.find_spec("optimum") else OTHERS
EMBEDDED = Path(__file__).parents[2] / "models" / "tiny_scenes" / "checkpoint"


@pytest.fixture(scope="session")
def embedded_checkpoint() -> Path:
    return EMBEDDED


class Exports(dict[str, Bundle]):
    """The embedded checkpoint's bundles by recipe, each exported when first asked for, loaded with hashes checked."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        super().__init__()
        self._checkpoint, self._folder = checkpoint, folder

    def __missing__(self, recipe: str) -> Bundle:
        from export.bundling import export_bundle

        out = self._folder / recipe
        export_bundle(
            self._checkpoint, recipe=recipe, out=out, name="tiny-scenes", auto_tile_px=256, show_progress=False
        )
        self[recipe] = Bundle.load(out)
        return self[recipe]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, embedded_checkpoint: Path) -> dict[str, Bundle]:
    return Exports(embedded_checkpoint, tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def other_checkpoint(tmp_path: Path, embedded_checkpoint: Path) -> Callable[[str, dict[str, Any]], Path]:
    """A function of model_type and changes to the text model's configuration."""
    return lambda model_type, text: _write_checkpoint(tmp_path / "source", embedded_checkpoint, model_type, text)


def _write_checkpoint(folder: Path, embedded: Path, model_type: str, text: dict[str, Any]) -> Path:
    """Random weights in another shape: 3 x 3 merged patches, other heads, a grid of at most 2 x 2 tiles."""
    import torch
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
    )

    shutil.copytree(embedded, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.pt", "*.jsonl"))
    old = json.loads((embedded / "config.json").read_text())
    kinds = {
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
        "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    }
    config_class, model_class = kinds[model_type]
    config = config_class(
        text_config={
            "model_type": "llama", "hidden_size": 80, "intermediate_size": 176, "num_hidden_layers": 2,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "rope_theta": 273768.0,
            "vocab_size": old["text_config"]["vocab_size"], "max_position_embeddings": 640, "pad_token_id": 2,
            "tie_word_embeddings": False, **text,
        },
        vision_config={
            "hidden_size": 48, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": 90, "patch_size": 10, "hidden_act": "gelu_pytorch_tanh",
        },
        scale_factor=3, image_token_id=old["image_token_id"], pad_token_id=2,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )  # fmt: skip
    torch.manual_seed(7)
    model_class(config).save_pretrained(folder)
    generation = json.loads((embedded / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation))
    settings = json.loads((embedded / "preprocessor_config.json").read_text())
    settings |= {"size": {"longest_edge": 180}, "max_image_size": {"longest_edge": 90}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_len": 9}))
    return folder
