"""The measures on numbers that can be checked by hand, and the gates at their bounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from models.quality import Differences, Gate, QualityGateFailed, check, summary


def quality(**changed: Any) -> dict[str, Any]:
    return {"mean_kl": 0.02, "max_logit_error": 0.5, **changed}


def test_kl_entropy_and_agreement_of_two_coins() -> None:
    found = Differences()
    fair, biased = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    found.add_logits(biased.astype(np.float32), fair.astype(np.float32) + 7)  # a constant changes no probability
    assert found.kl == pytest.approx([0.25 * math.log(0.5) + 0.75 * math.log(1.5)], abs=1e-6)
    assert found.entropy == pytest.approx([-0.25 * math.log(0.25) - 0.75 * math.log(0.75)], abs=1e-6)
    assert found.same_top == [False]


def test_cosine_is_per_image_token() -> None:
    found = Differences()
    found.add_features(np.array([[[1, 0], [0, 2]]], np.float32), np.array([[[2, 0], [3, 0]]], np.float32))
    assert found.cosine == pytest.approx([1, 0])


def test_even_answers_count_as_random_weights() -> None:
    for spread, meaningful in ((0.1, False), (8.0, True)):
        found = Differences(prompts=1, cosine=[1.0])
        logits = np.random.default_rng(0).normal(size=552).astype(np.float32) * np.float32(spread)
        found.add_logits(logits, logits)
        figures = summary(found, 552, reference="torch", inputs="coins")
        assert figures["kl_meaningful"] is meaningful
        assert (figures["mean_kl"] is not None) is meaningful


def test_a_figure_at_its_bound_passes() -> None:
    check(quality(), Gate(max_mean_kl=0.02, max_logit_error=0.5))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"mean_kl": 0.0201}, "mean_kl is 0.0201 nats, at most 0.02 is allowed"),
        ({"max_logit_error": 0.6}, "max_logit_error is 0.6, at most 0.5 is allowed"),
        ({"mean_kl": math.nan}, "mean_kl is nan"),
        ({"max_logit_error": math.nan, "mean_kl": None}, "no numbers"),
        ({"max_logit_error": math.inf, "mean_kl": None}, "no numbers"),
    ],
)
def test_a_figure_past_its_bound_names_both(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(QualityGateFailed, match=text):
        check(quality(**changed), Gate(max_mean_kl=0.02, max_logit_error=0.5))


def test_features_that_turned_away_fail_unless_the_weights_are_random() -> None:
    gate = Gate(max_mean_kl=0.02, min_vision_cosine=0.999)
    check(quality(vision_cosine_mean=0.9991, kl_meaningful=True), gate)
    check(quality(vision_cosine_mean=0.9, kl_meaningful=False, mean_kl=None), gate)
    with pytest.raises(QualityGateFailed, match=r"vision_cosine_mean is 0\.99, at least 0\.999 is asked for"):
        check(quality(vision_cosine_mean=0.99, kl_meaningful=True), gate)


def test_figures_over_text_pass_the_same_gate() -> None:
    check(quality(text=quality()), Gate(max_mean_kl=0.02))
    with pytest.raises(QualityGateFailed, match=r"mean_kl is 0\.5"):
        check(quality(text=quality(mean_kl=0.5)), Gate(max_mean_kl=0.02))


def test_kl_of_random_weights_is_not_asked_for() -> None:
    check(quality(mean_kl=None, max_logit_error=3.0), Gate(max_mean_kl=0.02))
