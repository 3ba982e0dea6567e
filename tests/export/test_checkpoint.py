"""What is refused before anything is exported, and how a tile's patches are placed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export import checkpoint
from export.bundling import export_bundle
from export.checkpoint import load_checkpoint
from export.checkpoint_files import CheckpointError
from models.errors import BadRequest, NearfarError


@pytest.fixture
def copy(tmp_path: Path, embedded_checkpoint: Path) -> Path:
    folder = tmp_path / "source"
    shutil.copytree(embedded_checkpoint, folder, ignore=shutil.ignore_patterns("*.pt"))
    return folder


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl"])
def test_pickled_weights_are_refused_and_never_opened(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / "model.safetensors").rename(copy / name)
    with pytest.raises(CheckpointError, match="pickle"):
        export_bundle(copy, recipe="fp32", out=tmp_path / "out", show_progress=False)
    assert not (tmp_path / "out").exists()


def test_a_pickle_beside_safetensors_is_left_alone(copy: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert load_checkpoint(copy).shapes.layers > 0


def test_code_in_the_checkpoint_is_refused(copy: Path) -> None:
    change(copy / "config.json", auto_map={"AutoModel": "modeling.Model"})
    with pytest.raises(CheckpointError, match="remote code"):
        load_checkpoint(copy)


def test_another_architecture_is_refused(copy: Path) -> None:
    change(copy / "config.json", model_type="qwen2_vl")
    with pytest.raises(CheckpointError, match="qwen2_vl"):
        load_checkpoint(copy)


def test_a_shard_outside_the_folder_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"\.\./model\.safetensors"):
        load_checkpoint(copy)


def test_damaged_weights_are_one_line(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!")
    with pytest.raises(CheckpointError, match="does not load") as caught:
        load_checkpoint(copy)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda weights: weights.pop("model.connector.modality_projection.proj.weight"),
            "1 weights are missing, .*proj",
        ),
        (lambda weights: weights.update({"model.text_model.layers.9.mlp.up_proj.weight": torch.ones(2)}), "unknown to"),
        (
            lambda weights: weights.update({"lm_head.weight": torch.ones(7, 192)}),
            r"lm_head.weight has shape \[7, 192\]",
        ),
        (lambda weights: weights.update({"lm_head.weight": torch.ones(552, 192).to(torch.int8)}), "weights of type I8"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(
    copy: Path, tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    weights = load_file(copy / "model.safetensors")
    edit(weights)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as caught:
        export_bundle(copy, recipe="fp32", out=tmp_path / "out", show_progress=False)
    assert "\n" not in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", {"text_config": "llama"}, "only text models of type llama or smollm3"),
        ("config.json", {"image_token_id": 5}, "<image> in tokenizer.json is not config.json's image_token_id"),
        ("tokenizer.json", {"model": None}, r"tokenizer\.json does not load"),
        ("preprocessor_config.json", {"size": {"longest_edge": "large"}}, "is missing, or no number"),
        ("preprocessor_config.json", {"max_image_size": {"longest_edge": 96}}, "tiles of 96 px do not fit"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(copy: Path, name: str, content: dict[str, Any], message: str) -> None:
    change(copy / name, **content)
    with pytest.raises(NearfarError, match=message) as caught:
        load_checkpoint(copy)
    assert "\n" not in caught.value.message


def test_an_index_that_is_no_index_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text('{"weight_map": ["lm_head.weight"]}')
    with pytest.raises(CheckpointError, match="names no file"):
        load_checkpoint(copy)


def test_a_truncated_file_is_refused(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError, match="does not load"):
        load_checkpoint(copy)


def test_buffers_that_older_versions_stored_are_left_alone(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.vision_model.embeddings.position_ids"] = torch.arange(64)[None]
    weights["model.text_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert load_checkpoint(copy).shapes.layers == 4


def test_a_large_checkpoint_in_half_precision_computes_as_in_float32(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(copy / "model.safetensors")
    save_file(
        {name: weight.bfloat16() for name, weight in weights.items()}, copy / "model.safetensors", {"format": "pt"}
    )
    small = load_checkpoint(copy).model
    monkeypatch.setattr(checkpoint, "LARGE_PARAMETERS", 1)
    large = load_checkpoint(copy).model
    assert large.model.text_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert small.model.text_model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    ids, pixels = torch.tensor([[1, 2, *[large.config.image_token_id] * 16, 5]]), torch.rand(1, 1, 3, 64, 64)
    with torch.inference_mode():
        expected, got = (model(input_ids=ids, pixel_values=pixels).logits for model in (small, large))
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
    assert large.lm_head.weight.dtype == torch.bfloat16


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(tmp_path)


def test_an_unknown_recipe_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="int3"):
        export_bundle(copy, recipe="int3", out=tmp_path / "out")


def test_the_source_is_never_overwritten(copy: Path) -> None:
    for out in (copy, copy.parent):
        with pytest.raises(BadRequest, match="source"):
            export_bundle(copy, recipe="fp32", out=out, overwrite=True)
    assert (copy / "model.safetensors").is_file()


def test_patch_number_i_has_position_i(embedded_checkpoint: Path) -> None:
    embeddings = load_checkpoint(embedded_checkpoint).model.model.vision_model.embeddings
    nothing = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        seen = embeddings(nothing)[0] - embeddings.patch_embedding.bias
    torch.testing.assert_close(seen, embeddings.position_embedding.weight.detach())


LAYER = "model.text_model.layers.1.mlp.down_proj"
A, B = (f"base_model.model.{LAYER}.lora_{factor}.weight" for factor in "AB")


@pytest.fixture
def write_adapter(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a rank 2 adapter of one layer, changed as asked, and returns its folder."""

    def write(weights: dict[str, torch.Tensor] | None = None, **changed: object) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir()
        # As peft 0.17 writes it, defaults included.
        config: dict[str, object] = {
            "peft_type": "LORA", "r": 2, "lora_alpha": 6, "use_rslora": False, "use_dora": False, "bias": "none",
            "target_modules": ["down_proj"], "modules_to_save": None, "init_lora_weights": True, "alpha_pattern": {},
            "megatron_core": "megatron.core", "qalora_group_size": 16, "lora_dropout": 0.05, "fan_in_fan_out": False,
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config | changed))
        whole = {A: torch.arange(1024.0).view(2, 512) / 1e5, B: torch.ones(192, 2)} | (weights or {})
        save_file(whole, folder / "adapter_model.safetensors")
        return folder

    return write


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 2), (True, 6 / 2**0.5)])
def test_an_adapter_adds_its_scaled_product(
    embedded_checkpoint: Path, write_adapter: Callable[..., Path], rslora: bool, scale: float
) -> None:
    plain = load_checkpoint(embedded_checkpoint)
    merged = load_checkpoint(embedded_checkpoint, write_adapter(use_rslora=rslora))
    # Row r of A holds r * 512 + column, over 1e5, and B sums the two rows.
    expected = (2 * torch.arange(512.0) + 512) / 1e5 * scale
    change = merged.model.get_parameter(f"{LAYER}.weight") - plain.model.get_parameter(f"{LAYER}.weight")
    torch.testing.assert_close(change, expected.expand(192, 512), atol=1e-6, rtol=0)
    other = "model.text_model.layers.0.mlp.down_proj.weight"
    assert torch.equal(merged.model.get_parameter(other), plain.model.get_parameter(other))
    assert merged.weights_sha256 != plain.weights_sha256


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_dora": True}, "use_dora = True is not understood"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),
        ({"bias": "all"}, "bias = all"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "no LoRA adapter"),
        ({"weights": {"base_model.model.lm_head.weight": torch.ones(2)}}, "lm_head.weight belongs to no linear layer"),
        ({"weights": {A.replace("layers.1", "layers.9"): torch.ones(2, 512)}}, "layers.9.*belongs to no linear layer"),
        ({"weights": {A: torch.ones(2, 7)}}, r"does not fit a weight of shape \[192, 512\]"),
        ({"weights": {A.replace("down", "up"): torch.ones(2, 192)}}, "lacks its other half"),
    ],
)
def test_an_adapter_that_is_not_understood_is_refused(
    embedded_checkpoint: Path, write_adapter: Callable[..., Path], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(embedded_checkpoint, write_adapter(**changed))


def test_a_pickled_adapter_is_refused(embedded_checkpoint: Path, write_adapter: Callable[..., Path]) -> None:
    folder = write_adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        load_checkpoint(embedded_checkpoint, folder)
