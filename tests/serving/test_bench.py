"""What the bench counts and what its page shows; the machine's speed is nothing that a test could hold."""

from __future__ import annotations

from functools import partial

import pytest
from rich.progress import Progress

from models.errors import Unavailable
from models.tiny_scenes import BUNDLES
from serving.bench.engine import LONGEST_S, BundleContestant, Scale, run_scales
from serving.bench.load import Limits, percentiles, run_load, text_question
from serving.bench.page import page_of
from serving.bench.request import overhead, picture_first_token, session_seconds
from serving.child import child_service


class Scripted:
    """A contestant whose times are given: a fake of another system, never of ours."""

    def __init__(self, name: str, times: list[float]) -> None:
        self.name, self._times, self.asked = name, list(times), 0

    def vision(self, tiles: int) -> float | None:
        self.asked += 1
        return self._times.pop(0)

    def prefill(self, tokens: int) -> float | None:
        return None

    def decode(self, context: int, tokens: int, rows: int = 1) -> float | None:
        return None

    def service(self, slots: int) -> None:
        return None


def test_the_first_run_warms_up_and_the_best_of_the_others_counts() -> None:
    near, far = Scripted("near", [9.0, 0.2, 0.1]), Scripted("far", [0.01, 0.4, 0.6])
    rows = run_scales([near, far], [Scale("vision", (2,))], rounds=2, progress=Progress(disable=True))
    assert rows == [
        {
            "kind": "vision",
            "size": 2,
            "unit": "ms per tile",
            "figures": {"near": {"best": 50.0, "worst": 100.0}, "far": {"best": 200.0, "worst": 300.0}},
            "ratio_to": {"near": 1.0, "far": 4.0},
        }
    ]


def test_a_contestant_that_is_too_slow_is_spared_the_larger_sizes() -> None:
    near, slow = Scripted("near", [1.0] * 4), Scripted("slow", [LONGEST_S + 1] * 2)
    rows = run_scales([near, slow], [Scale("vision", (1, 2))], rounds=1, progress=Progress(disable=True))
    assert [list(row["figures"]) for row in rows] == [["near", "slow"], ["near"]]
    assert slow.asked == 2


def test_what_a_contestant_cannot_do_leaves_no_row() -> None:
    rows = run_scales([Scripted("near", [])], [Scale("prefill", (8,))], rounds=1, progress=Progress(disable=True))
    assert rows == []


def test_a_bundle_is_measured_within_its_positions_alone() -> None:
    bundle = BundleContestant(BUNDLES["tiny-scenes@int8"])
    assert bundle.prefill(64)
    assert bundle.decode(64, 2)
    assert bundle.vision(5)
    assert bundle.prefill(1_000_000) is None
    assert bundle.decode(1_000_000, 2) is None
    assert Scale("rows", ()).figure(3, bundle.decode(64, 2, rows=3) or 0) > 0


def test_first_tokens_of_a_picture_and_what_stands_around_the_sessions_are_told() -> None:
    with child_service("--model", str(BUNDLES["tiny-scenes@fp32"])) as url:
        row = picture_first_token("near", url, 128)
        assert row["prompt_tokens"] > 16
        assert all(row[name] > 0 for name in ("new_ms", "again_ms", "behind_text_ms", "text_ms"))
        before = session_seconds(url)
        beside = overhead(url)
        assert session_seconds(url) > before
        assert beside["request_ms"] > 0
        assert beside["decode_share"] < 1


def test_a_name_in_the_page_is_text() -> None:
    result = {
        "machine": {"processor": "<b>", "cores": 1, "instruction_sets": [], "system": "x"}, "date": "", "engine": [],
        "target": "</script><script>alert(1)</script>", "loads": [], "stages": {"total_ms": 1.0}, "pareto": [],
        "question": "", "first_token": [],
    }  # fmt: skip
    text = page_of(result)
    assert "<script>alert" not in text
    assert "<b>" not in text


def test_a_percentile_is_the_nearest_rank_and_none_where_it_would_be_one_request() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert percentiles(values) == {50: 50.5, 95: 95.0, 99: 99.0}
    assert percentiles(values[:20]) == {50: 90.5, 95: 99.0, 99: None}
    assert percentiles([7.0]) == {50: 7.0, 95: None, 99: None}
    assert percentiles([]) == {50: None, 95: None, 99: None}


def test_every_request_of_a_load_asks_something_else() -> None:
    ask = text_question(8)
    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


def test_a_request_that_is_refused_is_an_error_and_not_an_answer() -> None:
    with child_service("--model", str(BUNDLES["tiny-scenes@int8"])) as url:
        load = partial(run_load, "near", url, clients=2, limits=Limits(), progress=Progress(disable=True))
        found = load(lambda number: text_question(8)(number) if number % 2 else {"messages": []}, requests=6)
        assert (found.requests, found.errors, found.ttft_ms[95]) == (6, 3, None)
        assert found.tokens_per_second > 0
        assert load(text_question(8), requests=4, limits=Limits(ttft_ms=0.001)).goodput == 0
        with pytest.raises(Unavailable, match=r"every request to near failed: .*400"):
            load(lambda _: {"messages": []}, requests=2)
