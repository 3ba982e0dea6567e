"""A bundle is checked to the byte before anything of it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from models.bundle import Bundle, sha256_of
from models.errors import BundleError
from models.onnx_model import OnnxModel
from models.tiny_scenes import BUNDLES


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLES["tiny-scenes@int8"], folder)
    return folder


def edit_manifest(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def vision(folder: Path) -> Path:
    return next((folder / "onnx").glob("vision_encoder*.onnx"))


def test_the_embedded_bundles_load_and_keep_their_size_limits() -> None:
    int8, fp32 = (Bundle.load(folder) for folder in BUNDLES.values())
    assert (int8.target, fp32.target) == ("local/tiny-scenes@int8", "local/tiny-scenes@fp32")
    for loaded, limit in ((int8, 12e6), (fp32, 18e6)):
        assert sum(file.stat().st_size for file in loaded.folder.rglob("*") if file.is_file()) <= limit
        assert 3_000_000 <= loaded.manifest.shapes.parameters <= 4_500_000


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.load(tmp_path)


def test_a_changed_byte_is_found(bundle: Path) -> None:
    tokenizer = bundle / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("red", "rot", 1))
    with pytest.raises(BundleError, match=r"tokenizer\.json does not match"):
        Bundle.load(bundle)


def test_a_missing_file_is_named(bundle: Path) -> None:
    vision(bundle).unlink()
    with pytest.raises(BundleError, match=r"vision_encoder.* is missing"):
        Bundle.load(bundle)


def test_an_unknown_format_is_refused(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(format=2))
    with pytest.raises(BundleError, match="format"):
        Bundle.load(bundle)


@pytest.mark.parametrize("recipe", ["fp32", "int8-fast", "q4f16", "quantized", "int8.b32_lm-head"])
def test_a_recipe_has_any_plain_name(bundle: Path, recipe: str) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(recipe=recipe))
    assert Bundle.load(bundle).target == f"local/tiny-scenes@{recipe}"


@pytest.mark.parametrize("recipe", ["", "INT8", "a/b", "a@b", "-q4", "q4 ", "q" * 41])
def test_a_recipe_that_no_target_name_could_hold_is_refused(bundle: Path, recipe: str) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(recipe=recipe))
    with pytest.raises(BundleError, match=r"manifest\.json: recipe"):
        Bundle.load(bundle)


def test_a_missing_graph_an_unknown_field_and_an_unhashed_replay_are_named(bundle: Path) -> None:
    whole = (bundle / "manifest.json").read_text()
    for change, reason in (
        (lambda manifest: manifest["graphs"].pop("embed_tokens"), "embed_tokens is missing"),
        (lambda manifest: manifest["processing"].update(tile=1), r"processing\.tile"),
        (lambda manifest: manifest.update(replay="other.npz"), r"other\.npz has no hash"),
    ):
        (bundle / "manifest.json").write_text(whole)
        edit_manifest(bundle, change)
        with pytest.raises(BundleError, match=reason):
            Bundle.load(bundle)


def test_a_link_that_leaves_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    shutil.move(bundle / "tokenizer.json", outside)
    (bundle / "tokenizer.json").symlink_to(outside)
    with pytest.raises(BundleError, match="outside"):
        Bundle.load(bundle)


def test_external_data_outside_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    graph = vision(bundle)
    model = onnx.load(graph)
    (tmp_path / "weights").write_bytes(b"\0" * 10_000_000)
    tensor = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    onnx.external_data_helper.set_external_data(tensor, "../../weights", 0, len(tensor.raw_data))
    tensor.ClearField("raw_data")
    graph.write_bytes(model.SerializeToString())

    def accept(manifest: dict[str, dict[str, dict[str, object]]]) -> None:
        entry = manifest["files"][f"onnx/{graph.name}"]
        entry.update(bytes=graph.stat().st_size, sha256=sha256_of(graph))

    edit_manifest(bundle, accept)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="does not load"):
        OnnxModel(Bundle.load(bundle))


def test_the_prompt_step_runs_in_its_own_graph_over_the_same_cache(tmp_path: Path) -> None:
    folders = {recipe: BUNDLES[f"tiny-scenes@{recipe}"] for recipe in ("fp32", "int8")}
    both = Path(shutil.copytree(folders["fp32"], tmp_path / "both"))
    file = both / "onnx" / "decoder_prompt.onnx"
    shutil.copyfile(folders["int8"] / "onnx" / "decoder_model_merged_int8.onnx", file)

    def name_it(manifest: dict[str, Any]) -> None:
        manifest["files"]["onnx/decoder_prompt.onnx"] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        manifest["graphs"]["decoder_prompt"] = {"file": "onnx/decoder_prompt.onnx", "weights": "int8"}

    edit_manifest(both, name_it)
    models = {name: OnnxModel(Bundle.load(folder)) for name, folder in {**folders, "both": both}.items()}
    embeds = models["fp32"].embed([5, 4, 3, 2, 1, 0])
    prompt = {name: model.decode(embeds[:, :5], model.new_cache(6)) for name, model in models.items()}
    np.testing.assert_array_equal(prompt["both"], prompt["int8"])
    assert np.abs(prompt["both"] - prompt["fp32"]).max() > 0
    # The next token is the other graph's, behind what the prompt's graph left in the cache.
    caches = {name: models[name].new_cache(6) for name in ("int8", "both")}
    for name, cache in caches.items():
        models[name].decode(embeds[:, :5], cache)
    expected = models["fp32"].decode(embeds[:, 5:], caches["int8"])
    np.testing.assert_array_equal(models["both"].decode(embeds[:, 5:], caches["both"]), expected)


def test_a_prompt_graph_with_another_cache_is_refused(bundle: Path) -> None:
    file = bundle / "onnx" / "decoder_prompt.onnx"
    model = onnx.load(BUNDLES["tiny-scenes@fp32"] / "onnx" / "decoder_model_merged.onnx")
    for item in model.graph.input:
        if item.name.startswith("past"):
            item.name = f"{item.name}.other"
    onnx.save(model, file)

    def name_it(manifest: dict[str, Any]) -> None:
        manifest["files"]["onnx/decoder_prompt.onnx"] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        manifest["graphs"]["decoder_prompt"] = {"file": "onnx/decoder_prompt.onnx", "weights": "float32"}

    edit_manifest(bundle, name_it)
    with pytest.raises(BundleError, match=r"decoder_prompt\.onnx"):
        OnnxModel(Bundle.load(bundle))
