"""A bundle ready to answer: its graphs, its tokenizer and its prompt renderer, put together in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.bundle import Bundle
from models.execution import ExecutionProvider
from models.machine import Remembered
from models.onnx_model import OnnxModel
from models.openvino_vision import VisionBackend, use_fastest
from models.prompt import PromptRenderer
from models.replay import check_replay
from models.tokenizer import TextTokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A checked bundle with everything that turns a request into ids and ids into text.

    `slots`: how many of its sequences memory allows at once; None: as many as run.
    """

    onnx: OnnxModel
    tokenizer: TextTokenizer
    renderer: PromptRenderer
    slots: int | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        threads: int = 0,
        provider: ExecutionProvider = "cpu",
        context: int | None = None,
        slots: int | None = None,
        vision: VisionBackend = "onnxruntime",
        remembered: Remembered | None = None,
    ) -> LoadedModel:
        """Check and open a bundle. `remembered` keeps what was found out about this machine. Raises BundleError."""
        bundle = Bundle.load(folder)
        tokenizer = TextTokenizer(folder / "tokenizer.json")
        renderer = PromptRenderer.from_folder(folder, tokenizer, bundle.manifest.shapes.image_tokens_per_tile)
        onnx = OnnxModel(bundle, threads=threads, provider=provider, context=context)
        remembered = remembered or Remembered(None)
        use_fastest(onnx, vision, remembered, threads=threads)
        check_replay(onnx, remembered)
        return cls(onnx=onnx, tokenizer=tokenizer, renderer=renderer, slots=slots)

    @property
    def bundle(self) -> Bundle:
        return self.onnx.bundle
