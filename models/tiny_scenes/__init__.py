"""The embedded model: a toy SmolVLM trained on drawn scenes, its bundles, and the scripts that made it."""
