"""The embedded model: a toy SmolVLM trained on drawn scenes, its bundles, and the scripts that made it."""

from pathlib import Path

SAMPLES = Path(__file__).resolve().parent / "samples"
# By target suffix; the first is the default.
BUNDLES = {f"tiny-scenes@{recipe}": Path(__file__).resolve().parent / "bundles" / recipe for recipe in ("int8", "fp32")}
