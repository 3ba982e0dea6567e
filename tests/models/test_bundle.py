"""A bundle is checked to the byte before anything of it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

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
        (lambda manifest: manifest.update(replay="replay.npz"), r"replay\.npz has no hash"),
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
