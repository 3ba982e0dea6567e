"""A bundle's stored answer: played at first load, remembered, and missed by graphs that compute otherwise here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from models.bundle import MANIFEST, Bundle, sha256_of
from models.errors import BundleError
from models.loaded_model import LoadedModel
from models.machine import Processor, Remembered, processor
from models.onnx_model import OnnxModel
from models.quality import Case, observe
from models.replay import FILE, ReplayFailed, check_replay, write_replay
from models.tiny_scenes import BUNDLES

INT8 = Bundle.read(BUNDLES["tiny-scenes@int8"])


def play(folder: Path) -> object:
    return check_replay(OnnxModel(Bundle.read(folder)), Remembered(None))


@pytest.mark.parametrize("target", BUNDLES)
def test_the_embedded_bundles_do_here_what_they_did_where_they_were_made(target: str) -> None:
    model = LoadedModel.load(BUNDLES[target])
    found = check_replay(model.onnx, Remembered(None))
    assert found is not None
    assert found.cosine > 0.999
    assert found.kl < 0.01


def test_an_export_stores_a_replay_that_it_passes(exported: dict[str, Bundle]) -> None:
    bundle = exported["int8"]
    assert bundle.manifest.replay == FILE
    assert play(bundle.folder)


def test_what_passed_is_remembered_for_bundle_and_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, remembered = OnnxModel(INT8), Remembered(tmp_path / "machine.json")
    assert check_replay(model, remembered)
    assert check_replay(model, remembered) is None
    assert check_replay(OnnxModel(Bundle.read(BUNDLES["tiny-scenes@fp32"])), remembered)
    monkeypatch.setattr("models.replay.processor", lambda: Processor("another", ("avx2",)))
    assert check_replay(model, remembered)


def test_other_features_than_stored_are_refused_with_the_figure(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(INT8.folder, tmp_path / "changed"))
    with np.load(folder / FILE) as stored:
        arrays = dict(stored)
    np.savez(folder / FILE, **arrays | {"features": -arrays["features"]})
    remembered = Remembered(tmp_path / "machine.json")
    for _ in range(2):  # a failure is not remembered
        with pytest.raises(ReplayFailed, match=r"cosine of its image features is -0\.99\d\d, at least 0\.99"):
            check_replay(OnnxModel(Bundle.read(folder)), remembered)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04"])
def test_a_damaged_replay_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(INT8.folder, tmp_path / "changed"))
    (folder / FILE).write_bytes(content)
    with pytest.raises(BundleError, match=r"replay\.npz is no replay"):
        play(folder)


def with_even_weights(source: Bundle, folder: Path, level: int) -> Path:
    """The bundle with every quantized vision weight at plus or minus its column's mean, stored as +-`level`.

    The same function for every level. At 64 no pair of products leaves 16 bits: 2 * 255 * 64 < 32768; at 127 most do.
    """
    shutil.copytree(source.folder, folder)
    path = folder / source.manifest.graphs["vision_encoder"].file
    graph = onnx.load(path)
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type == "DynamicQuantizeMatMul":
            weights, scales = (constants[name] for name in node.input[1:3])
            codes = numpy_helper.to_array(weights).astype(np.int32)
            even = (np.where(codes < 0, -1, 1) * level).astype(np.int8)
            weights.CopyFrom(numpy_helper.from_array(even, weights.name))
            mean = numpy_helper.to_array(scales) * np.abs(codes).mean(0) / level
            scales.CopyFrom(numpy_helper.from_array(mean.astype(np.float32), scales.name))
    onnx.save(graph, path)
    return folder


@pytest.fixture
def even_weights(tmp_path: Path) -> Callable[[int], Path]:
    """A function of the level: a bundle of even weights whose replay was made with those that fit into 7 bits."""
    small = with_even_weights(INT8, tmp_path / "64", 64)
    with np.load(small / FILE) as stored:
        ids = stored["ids"].tolist()
    side = INT8.manifest.processing.tile_px
    pixels = np.random.default_rng(3).integers(0, 256, (1, 3, side, side)).astype(np.float32) / 127.5 - 1
    model = OnnxModel(Bundle.read(small))
    case: Case = observe(model, ids, pixels, tokens=1)
    write_replay(case, model, small)

    def make(level: int) -> Path:
        folder = with_even_weights(INT8, tmp_path / f"even{level}", level)
        shutil.copyfile(small / FILE, folder / FILE)
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in manifest["files"]:
            manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return folder

    return make


def test_full_range_weights_that_saturate_on_this_processor_are_caught(even_weights: Callable[[int], Path]) -> None:
    assert play(even_weights(64))
    full, (_, sets) = even_weights(127), processor()
    saturates = "avx2" in sets and not {"avx512_vnni", "avx_vnni"} & set(sets)
    if saturates:
        with pytest.raises(ReplayFailed, match=r"computes wrongly on this processor .* image features is 0\.\d+"):
            LoadedModel.load(full)
    else:
        assert LoadedModel.load(full)
