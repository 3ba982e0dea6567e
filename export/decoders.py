"""A recipe's decoders, written and measured one after another until one passes the gate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from export.checkpoint import Checkpoint
from export.graphs import build_decoder, save_graph
from export.quantize import DecoderPlan, RecipePlan, quantize_decoder
from export.rounding import INPUTS, Rounded, calibrate
from export.verify import draw_cases, text_cases, verify
from models.bundle import Bundle, GraphEntry, Manifest
from models.onnx_model import OnnxModel
from models.quality import RANDOM_ENTROPY_SHARE, Case, QualityGateFailed, log_softmax


class DecoderWriter:
    """Writes decoders of one checkpoint into a bundle's folder. What was calibrated for one serves the next."""

    def __init__(self, checkpoint: Checkpoint, plan: RecipePlan, folder: Path, draft: Manifest, progress: bool) -> None:
        self._checkpoint, self._plan, self._folder, self._draft = checkpoint, plan, folder, draft
        self._progress = progress
        self._cases = draw_cases(checkpoint, draft.processing, show_progress=progress)
        self._texts = text_cases(checkpoint)
        self._trained = not _random([*self._cases, *self._texts])
        self._calibrated: dict[int, Mapping[str, Rounded]] = {}

    def first_that_passes(self) -> Manifest:
        """Write the recipe's first decoder that passes its gate; returns the draft with graphs and quality filled in.

        Raises the last one's QualityGateFailed where none passes.
        """
        for decoder in self._plan.decoders:
            try:
                return self._measured(decoder)
            except QualityGateFailed as error:
                failed = error
        raise failed

    def _measured(self, decoder: DecoderPlan) -> Manifest:
        words = self._plan.in_words() | decoder.in_words()
        graphs = {
            graph: GraphEntry(file=f"onnx/{self._plan.file(graph)}", weights=text) for graph, text in words.items()
        }
        measured = self._draft.model_copy(update={"graphs": graphs})
        built = build_decoder(self._checkpoint)
        quantize_decoder(built, decoder, self._calibration(decoder))
        save_graph(built, self._folder / graphs["decoder_model_merged"].file)
        del built
        model = OnnxModel(Bundle(self._folder, measured))
        quality = verify(self._cases, self._texts, model, self._plan.gate, show_progress=self._progress)
        if decoder.bits == 4:
            quality["calibration"] = INPUTS if self._trained else "none: of random weights nothing can be learnt"
        return measured.model_copy(update={"quality": quality})

    def _calibration(self, decoder: DecoderPlan) -> Mapping[str, Rounded]:
        if decoder.bits != 4 or not self._trained:
            return {}
        if decoder.block not in self._calibrated:
            self._calibrated[decoder.block] = calibrate(
                self._checkpoint, self._draft.processing, bits=4, block=decoder.block, show_progress=self._progress
            )
        return self._calibrated[decoder.block]


def _random(cases: Sequence[Case]) -> bool:
    """Whether the reference spreads its answers as random weights do."""
    shares = log_softmax(np.concatenate([case.logits for case in cases]))
    entropy = float(-(np.exp(shares) * shares).sum(-1).mean())
    return entropy >= RANDOM_ENTROPY_SHARE * math.log(shares.shape[-1])
