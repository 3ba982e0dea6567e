"""The figures of a report and the claims that it checks, on inputs whose answers are known."""

from __future__ import annotations

from math import comb

import pytest

from comparisons.claims import checked
from comparisons.corruptions import Corruption
from comparisons.dataset import Media, Row
from comparisons.evidence import Case, Evidence
from comparisons.measures import Tolerance
from comparisons.pairs import Outcome
from comparisons.report import chosen, differs, figures, severities
from comparisons.statistics import median_interval

SMALL, LARGE, FAR = "local/smolvlm2-256m@int8", "local/smolvlm2-2.2b@int8", "anthropic/claude-sonnet-5-5"


def case(number: int, answers: dict[str, Outcome], *slices: str, corrupted: bool = False) -> Case:
    return Case(
        case_id=str(number),
        sha256=None,
        prompt=None,
        task="vqa",
        references=("red",),
        slices=slices,
        is_corrupted=corrupted,
        answers={target: (answer,) for target, answer in answers.items()},
    )


def evidence(*cases: Case, runs_on: str = "cpu") -> Evidence:
    targets = tuple(dict.fromkeys(target for each in cases for target in each.answers))
    versions = {target: ({"runs_on": runs_on},) for target in targets}
    return Evidence(targets=targets, cases=cases, versions=versions, settings=(), left_out={})


def answer(right: bool, **more: float | None) -> Outcome:
    return Outcome(ok=True, text="red" if right else "blue", score=float(right), **more)  # type: ignore[arg-type]


def status(claim: str, found: Evidence) -> tuple[str, str]:
    (each,) = [each for each in checked(found) if claim in each.claim]
    assert (each.needs is None) == (each.status in ("holds", "does not hold"))
    return each.status, each.result


@pytest.mark.parametrize(
    ("n", "rank"), [(6, 1), (8, 1), (9, 2), (20, 6), (100, 40), (1000, 469), (1024, 481), (10_000, 4902)]
)
def test_the_interval_of_a_median_has_the_ranks_of_the_sign_test(n: int, rank: int) -> None:
    found = median_interval([float(place) for place in range(n, 0, -1)])
    assert found is not None
    assert (found.low, found.high, found.value) == (rank, n + 1 - rank, (n + 1) / 2)
    outside = 2 * sum(comb(n, k) for k in range(rank)) / 2**n
    assert outside <= 0.05 < outside + 2 * comb(n, rank) / 2**n


def test_five_samples_have_no_interval_and_none_have_none() -> None:
    assert median_interval([1.0] * 5) is None
    assert median_interval([]) is None


def test_a_failure_is_not_right_and_has_no_time_and_corrupted_copies_count_apart() -> None:
    fast, slow = answer(True, total_ms=10.0, usd=0.001), answer(False, total_ms=30.0, usd=0.003)
    failed = Outcome(ok=False, score=0.0, error_type="too_slow")
    clean = [case(place, {FAR: each}) for place, each in enumerate((fast, slow, failed))]
    worse = [case(9, {FAR: slow}, "corruption=blur-3", corrupted=True)]
    found = figures(FAR, [*clean, *worse])
    assert (found.inputs, found.failed) == (3, 1)
    assert found.accuracy
    assert (found.accuracy.n, found.accuracy.value) == (3, pytest.approx(1 / 3))
    assert found.total_ms
    assert (found.total_ms.n, found.total_ms.value, found.total_ms.low) == (2, 20.0, None)
    assert found.usd_per_1000
    assert found.usd_per_1000.value == pytest.approx(2.0)
    shares = {each.severity: each.accuracy for each in severities(evidence(*clean, *worse))}
    assert {level: (share.n, share.value) for level, share in shares.items()} == {
        0: (3, pytest.approx(1 / 3)),
        3: (1, 0.0),
    }


def test_what_differs_comes_first_and_form_alone_is_no_difference() -> None:
    same = case(0, {SMALL: Outcome(ok=True, text="Red."), LARGE: Outcome(ok=True, text="red")})
    other = case(1, {SMALL: Outcome(ok=True, text="red"), LARGE: Outcome(ok=False, error_type="too_slow")})
    assert (differs(same), differs(other)) == (False, True)
    assert [each.case_id for each in chosen([same, other], 2)] == ["1", "0"]


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [(True, False, "holds"), (False, True, "does not hold"), (True, True, "undecided")],
)
def test_a_model_three_times_larger_is_beaten_or_not(small: bool, large: bool, expected: str) -> None:
    found = evidence(*(case(place, {SMALL: answer(small), LARGE: answer(large)}) for place in range(60)))
    word, text = status("three times", found)
    assert word == expected
    assert "n = 60" in text
    assert status("three times", evidence(case(0, {SMALL: answer(True)})))[0] == "untested"


def test_a_cache_is_judged_by_what_the_answers_cost_without_it() -> None:
    cached = answer(True, usd=0.01, cached_tokens=900, prompt_tokens=1000, cache_saved_usd=0.03)
    fresh = answer(True, usd=0.04, cached_tokens=0, prompt_tokens=1000, cache_saved_usd=0.0)
    word, text = status("prompt cache", evidence(case(0, {FAR: cached}), case(1, {FAR: fresh})))
    assert word == "does not hold"
    assert "75% less" in text
    assert "n = 1 of 2" in text
    assert "90% of their prompt tokens" in text
    assert status("prompt cache", evidence(case(0, {FAR: fresh})))[0] == "untested"


def test_a_gpu_is_not_needed_where_the_large_model_answered_without_one() -> None:
    here = [case(0, {LARGE: answer(True, process_peak_bytes=6e9, total_ms=900.0, load_ms=5000.0)})]
    assert status("16 GB", evidence(*here))[0] == "does not hold"
    assert status("16 GB", evidence(*here, runs_on="cuda"))[0] == "untested"
    word, text = status("Ten minutes", evidence(*here))
    assert (word, "5.9 s" in text) == ("in part", True)
    late = [case(0, {LARGE: answer(True, total_ms=900.0, load_ms=700_000.0)})]
    assert status("Ten minutes", evidence(*late))[0] == "does not hold"


def test_a_row_comes_back_from_a_run_file_as_it_is_scored() -> None:
    picture = Media(source=b"x", corruption=Corruption(kind="blur", severity=3), seed="7")
    row = Row(
        row_id="a#blur-3",
        prompt="How long?",
        images=(picture,),
        references=("10",),
        measure="number",
        tolerance=Tolerance(relative=0.1),
        slices=("corruption=blur-3",),
    )
    again = Row.from_shown(row.shown)
    assert again.is_corrupted
    assert [row.score(text) for text in ("10.5", "12")] == [again.score(text) for text in ("10.5", "12")]
    assert (again.row_id, again.slices, again.task) == (row.row_id, row.slices, row.task)
