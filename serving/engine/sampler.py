"""Logits -> a token id. Settings become one function; greedy needs no random state."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from models.request import GenerationSettings

Sampler = Callable[[npt.NDArray[np.float32]], int]


def make_sampler(settings: GenerationSettings) -> Sampler:
    """A sampler over logits [vocabulary]: temperature first, then the `top_k` likeliest, then the top-p nucleus.

    Without a seed, fresh entropy. The nucleus is the smallest set of likeliest tokens whose probability reaches `top_p`
    (Holtzman et al. 2020).
    """
    if settings.temperature == 0:
        return lambda logits: int(np.argmax(logits))
    random = np.random.default_rng(settings.seed)

    def sample(logits: npt.NDArray[np.float32]) -> int:
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the likeliest to -inf, which is right
            scaled = (logits.astype(np.float64) - logits.max()) / settings.temperature
        order = np.argsort(-scaled, kind="stable")
        if settings.top_k:
            order = order[: settings.top_k]
        weights = np.exp(scaled[order])
        probabilities = weights / weights.sum()
        if settings.top_p < 1:
            # Keep every token before which the mass is still short of top_p: at least one.
            kept = int(np.searchsorted(np.cumsum(probabilities), settings.top_p)) + 1
            order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
        return int(order[random.choice(len(order), p=probabilities)])

    return sample
