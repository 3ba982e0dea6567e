"""Exports of the embedded checkpoint and of other shapes: gates, graph layout, hashes, all or nothing."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest

from export import bundling, decoders, graphs, verify
from export.bundling import export_bundle
from export.folders import hashes, share_files
from export.quantize import RECIPES
from models.bundle import Bundle
from models.errors import BadRequest, NearfarError
from models.onnx_model import OnnxModel
from models.quality import QualityGateFailed
from models.tiny_scenes import BUNDLES

SIZE_BOUNDS = {"fp32": 18_000_000, "fp16": 9_500_000, "int8": 12_000_000, "int8-fast": 12_000_000, "int4": 12_000_000}


@pytest.mark.parametrize("recipe", SIZE_BOUNDS)
def test_the_embedded_model_passes_the_gate_of(exported: dict[str, Bundle], recipe: str) -> None:
    manifest, gate = exported[recipe].manifest, RECIPES[recipe].gate  # type: ignore[index]
    quality = manifest.quality
    assert quality["kl_meaningful"]
    assert quality["text"]["kl_meaningful"]
    if gate.max_logit_error is not None:
        assert quality["max_logit_error"] <= gate.max_logit_error
    if gate.max_mean_kl is not None:
        assert quality["mean_kl"] <= gate.max_mean_kl
        assert quality["text"]["mean_kl"] <= gate.max_mean_kl
    assert quality["top1_agreement"] > 0.9
    assert quality["vision_cosine_mean"] > 0.999
    assert sum(entry.bytes for entry in manifest.files.values()) <= SIZE_BOUNDS[recipe]


@pytest.mark.parametrize(("recipe", "suffix"), [("fp32", ""), ("fp16", "_fp16"), ("int8", "_int8"), ("int4", "_q4")])
def test_files_have_the_published_layout(exported: dict[str, Bundle], recipe: str, suffix: str) -> None:
    bundle = exported[recipe]
    names = {name for name in bundle.manifest.files if name.startswith("onnx/")}
    assert names == {
        f"onnx/{graph}{suffix}.onnx" for graph in ("vision_encoder", "embed_tokens", "decoder_model_merged")
    }
    config = json.loads((bundle.folder / "config.json").read_text())
    text = config["text_config"]
    assert (text["num_hidden_layers"], text["num_key_value_heads"], text["head_dim"]) == (4, 2, 32)
    assert config["transformers.js_config"] == {"use_external_data_format": {}}
    on_disk = {path.relative_to(bundle.folder).as_posix() for path in bundle.folder.rglob("*") if path.is_file()}
    assert on_disk == {*bundle.manifest.files, "manifest.json"}
    assert "training_state.pt" not in on_disk


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8", "int4"])
def test_inputs_and_outputs_have_the_published_names_and_dimensions(exported: dict[str, Bundle], recipe: str) -> None:
    bundle = exported[recipe]
    vision, embed, decoder = (signature(bundle, name) for name in bundle.manifest.graphs)
    assert vision == {
        "pixel_values": ("tensor(float)", ["batch_size", "num_images", 3, 64, 64]),
        "pixel_attention_mask": ("tensor(bool)", ["batch_size", "num_images", 64, 64]),
        "image_features": ("tensor(float)", ["num_tiles", 16, 192]),
    }
    assert embed == {
        "input_ids": ("tensor(int64)", ["batch_size", "sequence_length"]),
        "inputs_embeds": ("tensor(float)", ["batch_size", "sequence_length", 192]),
    }
    kind = "tensor(float16)" if recipe == "fp16" else "tensor(float)"
    cache = (kind, ["batch_size", 2, "past_sequence_length", 32])
    grown = (kind, ["batch_size", 2, "total_sequence_length", 32])
    assert decoder == {
        "inputs_embeds": ("tensor(float)", ["batch_size", "sequence_length", 192]),
        "attention_mask": ("tensor(int64)", ["batch_size", "total_sequence_length"]),
        "position_ids": ("tensor(int64)", ["batch_size", "sequence_length"]),
        "num_logits_to_keep": ("tensor(int64)", []),
        "logits": ("tensor(float)", ["batch_size", "num_logits", bundle.manifest.shapes.vocab_size]),
        **{f"past_key_values.{i}.{kind}": cache for i in range(4) for kind in ("key", "value")},
        **{f"present.{i}.{kind}": grown for i in range(4) for kind in ("key", "value")},
    }


def signature(bundle: Bundle, name: Any) -> dict[str, tuple[str, list[Any]]]:
    session = ort.InferenceSession(str(bundle.graph(name)), providers=["CPUExecutionProvider"])
    items = (*session.get_inputs(), *session.get_overridable_initializers(), *session.get_outputs())
    return {item.name: (item.type, item.shape) for item in items}


def test_the_number_of_logits_is_what_was_asked_for(exported: dict[str, Bundle]) -> None:
    session = ort.InferenceSession(
        str(exported["fp32"].graph("decoder_model_merged")), providers=["CPUExecutionProvider"]
    )
    feeds: dict[str, Any] = {"attention_mask": np.ones((1, 5), np.int64), "position_ids": np.arange(5)[None]}
    feeds["inputs_embeds"] = np.random.default_rng(0).normal(size=(1, 5, 192)).astype(np.float32)
    for item in session.get_inputs():
        if item.name.startswith("past"):
            feeds[item.name] = np.zeros((1, 2, 0, 32), np.float32)
    rows = {
        keep: session.run(["logits"], feeds | {"num_logits_to_keep": np.array(keep, np.int64)})[0] for keep in (0, 1, 3)
    }
    assert rows[0].shape[1] == 5
    np.testing.assert_allclose(rows[1], rows[0][:, -1:], atol=1e-4)
    np.testing.assert_allclose(rows[3], rows[0][:, -3:], atol=1e-4)
    np.testing.assert_array_equal(session.run(["logits"], feeds)[0], rows[1])  # left out, it is 1


def test_quantized_matrices_multiply_in_int8(exported: dict[str, Bundle]) -> None:
    for recipe in ("int8", "int4"):
        nodes = onnx.load(exported[recipe].graph("decoder_model_merged")).graph.node
        products = [node for node in nodes if node.op_type == "MatMulNBits"]
        assert not [node for node in nodes if node.op_type == "MatMul"]
        for node in products:
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            assert attributes["accuracy_level"] == 4
            assert attributes["K"] % attributes["block_size"] == 0


ONE_PROMPT = (verify.Extent(math.inf, 1, ("low",), 2, 1),)


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4"])
def test_a_broken_graph_leaves_nothing_behind(
    tmp_path: Path, embedded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    def broken(checkpoint: Any, **options: Any) -> Any:
        decoder = graphs.build_decoder(checkpoint, **options)
        scale = next(value for name, value in decoder.graph.initializers.items() if "final_norm" in name)
        scale.const_value = onnx_ir.tensor(-scale.const_value.numpy(), name=scale.name)  # every logit changes its sign
        return decoder

    monkeypatch.setattr(decoders, "build_decoder", broken)
    monkeypatch.setattr(decoders, "calibrate", lambda *_, **__: {})
    with pytest.raises(QualityGateFailed, match=r"is [\d.]+.*at most 0\.\d+ is allowed"):
        export_bundle(embedded_checkpoint, recipe=recipe, out=tmp_path / "out", show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_keeps_the_bundle_that_was_there(
    tmp_path: Path, embedded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("the old one")
    monkeypatch.setattr(decoders, "draw_cases", lambda *_, **__: [])
    monkeypatch.setattr(decoders, "verify", lambda *_, **__: (_ for _ in ()).throw(QualityGateFailed("no")))
    with pytest.raises(QualityGateFailed):
        export_bundle(embedded_checkpoint, recipe="fp32", out=out, show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "manifest.json").read_text() == "the old one"


def test_a_bundle_replaces_a_bundle(tmp_path: Path, embedded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "EXTENTS", ONE_PROMPT)
    monkeypatch.setattr(decoders, "verify", lambda *_, **__: {})
    monkeypatch.setattr(decoders, "check", lambda *_: None)
    for name in ("one", "two"):
        manifest = export_bundle(
            embedded_checkpoint, recipe="fp32", out=tmp_path / "out", name=name, show_progress=False,
            license="Apache-2.0", notice="drawn by hand",
        )  # fmt: skip
    assert Bundle.load(tmp_path / "out").manifest == manifest
    assert (manifest.name, manifest.source.license, manifest.notice) == ("two", "Apache-2.0", "drawn by hand")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_four_bits_give_way_to_eight_until_the_gate_is_passed(
    tmp_path: Path, embedded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def passes_at_the_second(*_: Any) -> None:
        tries.append(1)
        if len(tries) < 2:
            raise QualityGateFailed("mean_kl is 0.4 nats, at most 0.2 is allowed")

    monkeypatch.setattr(decoders, "check", passes_at_the_second)
    monkeypatch.setattr(decoders, "verify", lambda *_, **__: {})
    monkeypatch.setattr(verify, "EXTENTS", ONE_PROMPT)
    monkeypatch.setattr(decoders, "calibrate", lambda *_, **__: {})
    manifest = export_bundle(embedded_checkpoint, recipe="int4", out=tmp_path / "out", show_progress=False)
    assert manifest.graphs["decoder_model_merged"].weights.endswith("; lm_head in 8 bits; attn in 8 bits")
    bits = {}
    for node in onnx.load(tmp_path / "out" / "onnx" / "decoder_model_merged_q4.onnx").graph.node:
        if node.op_type == "MatMulNBits":
            bits[node.name] = next(attribute.i for attribute in node.attribute if attribute.name == "bits")
    assert {name for name in bits if bits[name] == 8} == {name for name in bits if "lm_head" in name or "attn" in name}


@pytest.mark.parametrize("recipe", ["int8-fast", "fp16"])
def test_large_graphs_keep_their_weights_beside_them(
    tmp_path: Path, embedded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.setattr(graphs, "EXTERNAL_DATA_BYTES", 1_000_000)
    monkeypatch.setattr(verify, "EXTENTS", ONE_PROMPT)
    manifest = export_bundle(embedded_checkpoint, recipe=recipe, out=tmp_path / "out", show_progress=False)
    beside = {name.removeprefix("onnx/") for name in manifest.files if name.endswith("_data")}
    large = {entry.file.removeprefix("onnx/") for name, entry in manifest.graphs.items() if name != "embed_tokens"}
    assert beside == {f"{name}_data" for name in large}
    assert sum(manifest.files[f"onnx/{name}"].bytes for name in large) < 500_000
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(config["transformers.js_config"]["use_external_data_format"]) == large
    OnnxModel(Bundle.load(tmp_path / "out"))


def test_a_graph_that_became_small_holds_the_weights_that_were_beside_a_large_one(tmp_path: Path) -> None:
    weight = onnx_ir.tensor(np.arange(400_000, dtype=np.float32), name="weight")
    value = onnx_ir.Value(
        name="weight", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=weight.shape, const_value=weight
    )
    graph = onnx_ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 17})
    (tmp_path / "large").mkdir()
    onnx_ir.save(onnx_ir.Model(graph, ir_version=10), tmp_path / "large" / "a.onnx", external_data="a.onnx_data")
    graphs.save_graph(onnx_ir.load(tmp_path / "large" / "a.onnx"), tmp_path / "b.onnx")
    shutil.rmtree(tmp_path / "large")
    assert np.array_equal(
        onnx_ir.load(tmp_path / "b.onnx").graph.initializers["weight"].const_value.numpy(), weight.numpy()
    )


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    tmp_path: Path, embedded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(bundling.shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    with pytest.raises(NearfarError, match=r"needs about \d+ MB of disk, .* has 10 MB free"):
        export_bundle(embedded_checkpoint, recipe="fp32", out=tmp_path / "out", show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_to_its_end_leaves_nothing(tmp_path: Path, embedded_checkpoint: Path) -> None:
    code = (
        "import resource, sys; from serving.cli import app; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000,) * 2); app(sys.argv[1:])"
    )
    asked = ["export", str(embedded_checkpoint), "--recipe", "fp32", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "cannot be written: File too large" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_says_what_making_it_took(exported: dict[str, Bundle]) -> None:
    taken = exported["fp32"].manifest.export
    assert taken is not None
    assert taken.seconds > 0
    assert taken.peak_bytes > 15_000_000  # the weights alone


def test_a_folder_that_is_no_bundle_is_not_replaced(tmp_path: Path, embedded_checkpoint: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(BadRequest, match="no earlier export"):
        export_bundle(embedded_checkpoint, recipe="fp32", out=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("model_type", "recipe", "text"),
    [
        ("idefics3", "fp32", {}),
        ("smolvlm", "int8", {"tie_word_embeddings": True, "num_key_value_heads": 8}),
        ("smolvlm", "q4f16", {"head_dim": 32}),
        ("smolvlm", "int4", {"num_key_value_heads": 2, "hidden_size": 144, "num_attention_heads": 6, "head_dim": 32}),
        ("idefics3", "fp32", {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layer_interval": 4}),
    ],
)
def test_other_shapes_export(
    tmp_path: Path,
    other_checkpoint: Callable[[str, dict[str, Any]], Path],
    model_type: str,
    recipe: str,
    text: dict[str, Any],
) -> None:
    source = other_checkpoint(model_type, text)
    manifest = export_bundle(source, recipe=recipe, out=tmp_path / "out", show_progress=False)
    assert manifest.name == "source"
    assert manifest.processing.auto_tile_px == manifest.processing.tile_px == 90
    assert (manifest.shapes.image_tokens_per_tile, manifest.shapes.max_positions) == (9, 640)
    # Random weights: nothing can be said of KL, and the manifest says that rather than a figure.
    assert manifest.quality["mean_kl"] is None
    assert not manifest.quality["kl_meaningful"]
    proxy = manifest.quality.get("proxy")
    assert (proxy is not None) == (recipe in ("int8", "int4"))
    assert proxy is None or proxy["mean_kl_is"].startswith("not of this bundle")
    assert manifest.quality.get("calibration", "none").startswith("none")
    assert manifest.quality["vision_cosine_mean"] > 0.99
    model = OnnxModel(Bundle.load(tmp_path / "out"), threads=1)
    assert model.decode(model.embed([0, 1]), model.new_cache(4)).shape == (manifest.shapes.vocab_size,)
    assert model.encode_tiles(np.zeros((5, 3, 90, 90), np.float32)).shape == (5, 9, manifest.shapes.hidden_size)


def test_a_file_that_a_bundle_beside_it_has_too_lies_on_disk_once(tmp_path: Path) -> None:
    base, tuned, broken = tmp_path / "base", tmp_path / "tuned", tmp_path / "broken"
    for folder in (base, tuned, broken):
        shutil.copytree(BUNDLES["tiny-scenes@fp32"], folder)
    (tuned / "onnx" / "decoder_model_merged.onnx").write_bytes(b"another decoder")
    (base / "tokenizer.json").write_text("no longer what its manifest says")
    (broken / "manifest.json").write_text("{")
    share_files(tuned, hashes(tuned), tmp_path)
    once = {path.name for path in tuned.rglob("*") if path.is_file() and path.stat().st_nlink > 1}
    assert {"vision_encoder.onnx", "embed_tokens.onnx", "replay.npz"} <= once
    assert not {"decoder_model_merged.onnx", "tokenizer.json"} & once
    assert hashes(tuned).keys() == hashes(broken).keys()
    assert (tuned / "tokenizer.json").read_bytes() == (broken / "tokenizer.json").read_bytes()
