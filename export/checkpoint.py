"""A SmolVLM or Idefics3 checkpoint folder, loaded and checked. Reads safetensors alone: no pickle, no remote code."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration

from export.checkpoint_files import (
    CheckpointError,
    StoredWeight,
    check_config,
    is_weight,
    read_json,
    sha256_together,
    stored_weights,
    weight_files,
)
from models.adopt import read_processing, read_stop_tokens, read_tokenizer
from models.bundle import Shapes
from models.images import ImageProcessing
from models.prompt import IMAGE, PromptRenderer
from models.tokenizer import TextTokenizer

MODEL_CLASSES = {"smolvlm": SmolVLMForConditionalGeneration, "idefics3": Idefics3ForConditionalGeneration}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
LARGE_PARAMETERS = 10**9  # from here on weights stay as they lie on disk, memory-mapped
ADAPTER_SETTINGS = "adapter_config.json"
RECORD = "training.json"  # beside it, where this package trained it: its base by hash, and how it was trained
LORA_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
LORA_SETTINGS = {  # those that are read, and those that matter in training alone
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "rank_pattern", "lora_dropout",
    "layers_to_transform", "layers_pattern", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "auto_mapping", "peft_version", "qalora_group_size", "eva_config",
}  # fmt: skip
LORA_VALUES = {  # the other ways to begin (pissa, olora, corda, loftq) change the checkpoint too
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"), "bias": ("none",),
    "megatron_core": ("megatron.core",),
}  # fmt: skip


class FullTileEmbeddings(nn.Module):
    """Patch embeddings of full square tiles: patch number i has position i.

    Replaces the module that transformers loads. From 4.55.1 to at least 4.57.6 that one multiplies the fractional
    coordinates by 1 - 1e-6, which moves every patch but the first one row and one column back (0, 0, 1, 2, ...), unlike
    what all models were trained with: https://github.com/huggingface/transformers/issues/41190
    """

    def __init__(self, loaded: Any) -> None:
        super().__init__()
        self.patch_embedding: nn.Conv2d = loaded.patch_embedding
        self.position_embedding: nn.Embedding = loaded.position_embedding

    def forward(self, pixel_values: torch.Tensor, patch_attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[tile, 3, height, width] -> [tile, patch, hidden]. The mask of a full tile says nothing and is not read."""
        patches: torch.Tensor = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return patches + self.position_embedding.weight


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A loaded checkpoint, with what the runtime must know about it.

    The model computes in float32. From LARGE_PARAMETERS on the text model's weights are the files' own, memory-mapped
    in the precision they have there, and each module widens its own only while it runs.
    """

    folder: Path
    model: Any  # SmolVLMForConditionalGeneration or Idefics3ForConditionalGeneration
    tokenizer: TextTokenizer
    prompts: PromptRenderer
    shapes: Shapes
    processing: ImageProcessing
    weights_sha256: str  # of the weight files together, an adapter's included


def load_checkpoint(folder: Path, adapter: Path | None = None, *, precision: torch.dtype | None = None) -> Checkpoint:
    """Load and check a folder in the hub's layout, with the PEFT LoRA adapter of another folder merged into it.

    With `precision` every weight has that, as training wants it. Raises CheckpointError where either is not what it
    should be, or cannot be exported.
    """
    config = read_json(folder, "config.json")
    check_config(config, folder)
    weights = weight_files(folder)
    stored = stored_weights(weights)
    loaded_in = precision or _precision(stored)
    model = _load_model(MODEL_CLASSES[config["model_type"]], folder, loaded_in, stored)
    if adapter is not None:
        _check_base(adapter, folder, weights)
        weights += _merge_adapter(model, adapter, folder)
    if precision is None and loaded_in != torch.float32:
        model.model.vision_model.float()  # these two are traced, which wants plain modules, and are small
        model.model.connector.float()
        _widen_while_running(model)
    vision = model.model.vision_model
    vision.embeddings = FullTileEmbeddings(vision.embeddings)
    settings = "preprocessor_config.json"
    tile_px = model.config.vision_config.image_size
    processing = read_processing(read_json(folder, settings), folder / settings, tile_px)
    tokenizer = read_tokenizer(folder)
    if IMAGE not in tokenizer.special_tokens() or tokenizer.marker(IMAGE) != model.config.image_token_id:
        raise CheckpointError(f"{folder}: {IMAGE} in tokenizer.json is not config.json's image_token_id")
    shapes = _shapes(model, tokenizer, folder)
    return Checkpoint(
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        prompts=PromptRenderer.from_folder(folder, tokenizer, shapes.image_tokens_per_tile),
        shapes=shapes,
        processing=processing,
        weights_sha256=sha256_together(weights),
    )


def _precision(stored: Mapping[str, StoredWeight]) -> torch.dtype:
    """What to load the weights in."""
    kinds = {weight.kind for weight in stored.values()}
    large = sum(math.prod(weight.shape) for weight in stored.values()) >= LARGE_PARAMETERS
    return DTYPES[kinds.pop()] if large and len(kinds) == 1 else torch.float32


def _load_model(model_class: Any, folder: Path, precision: torch.dtype, stored: Mapping[str, StoredWeight]) -> Any:
    try:
        model, report = model_class.from_pretrained(
            folder, dtype=precision, use_safetensors=True, local_files_only=True, trust_remote_code=False,
            attn_implementation="sdpa", output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # transformers and safetensors raise many kinds for damaged files
        raise CheckpointError(f"{folder} does not load: {str(error).splitlines()[0][:300]}") from error
    if report["mismatched_keys"]:
        name = min(report["mismatched_keys"])
        found, expected = list(stored[name].shape), list(model.get_parameter(name).shape)
        raise CheckpointError(f"{folder}: {name} has shape {found}, config.json asks for {expected}")
    # Buffers of older versions, such as inv_freq, may be left over. A weight without a place is another architecture.
    unread = list(filter(is_weight, report["unexpected_keys"]))
    for what, names in (("missing", report["missing_keys"]), ("unknown to config.json", unread)):
        if names:
            raise CheckpointError(f"{folder}: {len(names)} weights are {what}, the first is {min(names)}")
    return model.eval()


def _widen_while_running(model: nn.Module) -> None:
    """Let each module that holds weights in half precision have them in float32 while it runs, and then no longer.

    Such modules hold no others, so they run one after another and share one room: memory that is new for each of them
    made a forward pass several times as slow.
    """

    def widen(module: nn.Module, _inputs: Any) -> None:
        start = 0
        for weight in module.parameters(recurse=False):
            end = start + weight.numel()
            narrow[weight] = weight.data
            weight.data = room[start:end].view(weight.shape).copy_(weight.data)
            start = end

    def restore(module: nn.Module, _inputs: Any, _output: Any) -> None:
        for weight in module.parameters(recurse=False):
            weight.data = narrow.pop(weight)

    narrow: dict[nn.Parameter, torch.Tensor] = {}
    largest = 0
    for module in model.modules():
        weights = list(module.parameters(recurse=False))
        if any(weight.dtype != torch.float32 for weight in weights):
            largest = max(largest, sum(weight.numel() for weight in weights))
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(restore)
    room = torch.empty(largest)


def _check_base(adapter: Path, folder: Path, weights: list[Path]) -> None:
    """Raises CheckpointError where the adapter's record names other weights. Adapters made elsewhere have no record."""
    if not (adapter / RECORD).is_file():
        return
    base = read_json(adapter, RECORD).get("base")
    if not isinstance(base, dict) or not isinstance(base.get("sha256"), str):
        raise CheckpointError(f"{adapter / RECORD} does not name its base")
    own = sha256_together(weights)
    if base["sha256"] != own:
        trained = f"{base.get('name')} ({base['sha256'][:12]})"
        raise CheckpointError(f"{adapter} was trained on {trained}, and {folder.name} ({own[:12]}) is another base")


def _merge_adapter(model: Any, folder: Path, base: Path) -> list[Path]:
    """Add scale * B A to each matrix that the adapter names; returns the adapter's files. https://arxiv.org/abs/2106.09685

    Raises CheckpointError for anything that is not understood, rather than merge a part of an adapter.
    """
    settings, file = folder / ADAPTER_SETTINGS, folder / "adapter_model.safetensors"
    config = _adapter_config(folder)
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {file.name}; adapters stored as pickle are refused")
    stored_weights([file])
    factors = load_file(file)
    bases = f"the adapter's base is {config.get('base_model_name_or_path')}, this is {base.name}"
    for name in sorted(factors):
        found = LORA_FACTOR.fullmatch(name)
        module = dict(model.named_modules()).get(found["module"]) if found else None
        b, a = factors.get(name.replace(".lora_A.", ".lora_B.")), factors.get(name.replace(".lora_B.", ".lora_A."))
        if not isinstance(module, nn.Linear) or a is None or b is None:
            raise CheckpointError(
                f"{file}: {name} belongs to no linear layer of the checkpoint, or lacks its other half; {bases}"
            )
        if module.weight is model.get_input_embeddings().weight:
            raise CheckpointError(f"{file}: {name} would change the embeddings, which the checkpoint ties to it")
        if a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != module.weight.shape:
            shape = list(module.weight.shape)
            raise CheckpointError(f"{file}: {name} does not fit a weight of shape {shape}; {bases}")
        if found and found["factor"] == "A":
            rank = math.sqrt(len(a)) if config.get("use_rslora") else len(a)
            change = config["lora_alpha"] / rank * (b.float() @ a.float())
            module.weight.data = (module.weight.data.float() + change).to(module.weight.dtype)
    return [settings, file]


def _adapter_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder, ADAPTER_SETTINGS)
    if config.get("peft_type") != "LORA" or not isinstance(config.get("lora_alpha"), int | float):
        raise CheckpointError(f"{folder / ADAPTER_SETTINGS} describes no LoRA adapter")
    for key, value in config.items():
        if value and key not in LORA_SETTINGS and value not in LORA_VALUES.get(key, ()):
            raise CheckpointError(f"{folder / ADAPTER_SETTINGS}: {key} = {str(value)[:60]} is not understood")
    return config


def _shapes(model: Any, tokenizer: TextTokenizer, folder: Path) -> Shapes:
    text, vision = model.config.text_config, model.config.vision_config
    patches_per_side, scale = vision.image_size // vision.patch_size, model.config.scale_factor
    if patches_per_side % scale:
        raise CheckpointError(f"{patches_per_side} patches a side cannot be merged {scale} by {scale}")
    return Shapes(
        hidden_size=text.hidden_size,
        layers=text.num_hidden_layers,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab_size=model.lm_head.out_features,
        max_positions=text.max_position_embeddings,
        image_tokens_per_tile=(patches_per_side // scale) ** 2,
        image_token_id=model.config.image_token_id,
        stop_token_ids=read_stop_tokens(model.generation_config.to_dict(), tokenizer, folder),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
