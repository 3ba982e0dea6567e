"""The 256M shape exported in a process of its own: its memory, and the sizes of what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from export.exact_shapes import write_checkpoint
from models.bundle import Bundle
from models.memory import need_of, total_bytes
from tests.models.test_memory import peak_bytes


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("recipe", "decoder_bytes", "embeddings_bytes"),
    # 134.6 million weights in the decoder, 28.4 million in the embeddings; scales and the rotary tables come on top.
    [("fp32", 538_000_000, 113_500_000), ("int8", 139_000_000, 28_500_000)],
)
def test_the_256m_shape_exports_in_bounded_memory(
    tmp_path: Path, recipe: str, decoder_bytes: int, embeddings_bytes: int
) -> None:
    write_checkpoint("smolvlm2-256m", tmp_path / "source")
    command = [sys.executable, "-m", "serving.cli", "export", str(tmp_path / "source"), "--recipe", recipe]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--json"], capture_output=True, text=True, timeout=1100
    )
    assert done.returncode == 0, done.stderr[-1000:]
    manifest = Bundle.load(tmp_path / "out").manifest
    assert json.loads(done.stdout)["export"] == manifest.export.model_dump()  # type: ignore[union-attr]
    assert manifest.export is not None
    assert manifest.export.peak_bytes < 5_000_000_000
    assert manifest.shapes.parameters == 256_484_928
    sizes = {graph: manifest.files[entry.file].bytes for graph, entry in manifest.graphs.items()}
    assert decoder_bytes <= sizes["decoder_model_merged"] <= 1.05 * decoder_bytes
    assert embeddings_bytes <= sizes["embed_tokens"] <= 1.01 * embeddings_bytes
    assert manifest.quality["vision_cosine_mean"] > 0.999
    assert manifest.quality["mean_kl"] is None  # of random weights
    need, context = need_of(Bundle.read(tmp_path / "out")), 2048
    assert peak_bytes(tmp_path / "out", context) <= total_bytes([need], 1, context)
