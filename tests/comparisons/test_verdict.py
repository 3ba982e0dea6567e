from __future__ import annotations

from comparisons.results import ArmResult
from comparisons.verdict import FIGURES, tradeoff, verdict
from models.errors import UpstreamError
from models.events import Cost, Egress, Memory, Timings

CLOUD = {
    "egress": Egress(left_device=True, bytes_sent=2345, destination="api.example.com:443"),
    "cost": Cost(usd=0.00056, basis="list"),
    "timings": Timings(ttft_ms=300.0, total_ms=400.0, tokens_per_second=50.0),
    "memory": Memory(),
}


def result(finish, target, text="red", *, order=0, contended=False, correct=None, **changes):
    return ArmResult(
        target=target,
        order=order,
        contended=contended,
        text=text,
        finished=finish(target, **changes),
        error=None,
        correct=correct,
    )


def failure(target):
    return ArmResult(
        target=target,
        order=0,
        contended=False,
        text=None,
        finished=None,
        error=UpstreamError("far is down"),
        correct=None,
    )


def test_the_tradeoff_is_against_the_first_target(finish):
    found = tradeoff([result(finish, "local/a"), result(finish, "far/b", **CLOUD), failure("far/c")])
    assert found.baseline == "local/a"
    assert list(found.per_target) == ["far/b", "far/c"]
    far = found.per_target["far/b"]
    assert far.difference["total_ms"] == 390.0
    assert far.ratio["total_ms"] == 40.0
    assert far.difference["bytes_sent"] == 2345
    assert far.difference["usd"] == 0.00056


def test_a_figure_missing_on_either_side_is_null_and_no_ratio_is_taken_of_zero(finish):
    found = tradeoff([result(finish, "local/a"), result(finish, "far/b", **CLOUD), failure("far/c")])
    far, failed = found.per_target["far/b"], found.per_target["far/c"]
    assert far.difference["model_bytes"] is None
    assert far.ratio["usd"] is None
    assert far.ratio["bytes_sent"] is None
    assert dict(failed.difference) == dict(failed.ratio) == dict.fromkeys(FIGURES)


def test_one_input_is_never_decided_and_its_text_names_speed_agreement_egress_and_cost(finish):
    found = verdict([result(finish, "local/a", correct=True), result(finish, "far/b", "Red.", correct=True, **CLOUD)])
    assert found.choice == "undecided"
    assert found.text == (
        "On this input local/a was 40 times as fast as far/b (10 ms against 400 ms); both gave the same answer; "
        "local/a and far/b were right. "
        "2,345 bytes of request left this device for api.example.com:443, at a cost of $0.00056."
    )
    assert found.reasons == (
        "one input is no ground for a choice",
        "local/a: 10 ms, right, nothing left the process, $0",
        "far/b: 400 ms, right, 2,345 bytes left for api.example.com:443, $0.00056",
    )


def test_without_a_hosted_arm_the_verdict_says_so(finish):
    slower = Timings(total_ms=23.0)
    found = verdict([result(finish, "local/a", "blue"), result(finish, "local/b", timings=slower)])
    assert "local/a was 2.3 times as fast as local/b (10 ms against 23 ms); the answers differ" in found.text
    sentence = "There was no hosted arm: all targets ran in this process and sent nothing, at a cost of $0."
    assert found.text.endswith(sentence)


NEAR = {
    "egress": Egress(left_device=False, bytes_sent=812, destination="127.0.0.1:9001"),
    "cost": Cost(usd=None, basis="no price is known for near"),
}


def test_an_endpoint_on_loopback_is_another_process_and_may_have_been_paid(finish):
    found = verdict([result(finish, "local/a"), result(finish, "near/b", **NEAR)])
    assert found.text.endswith(
        " 812 bytes of request went to another process on this device, over HTTP, at an unknown price."
    )
    assert found.reasons[-1].endswith("812 bytes to another process on this device, over HTTP, price unknown")
    assert "no hosted" not in found.text


def test_bytes_to_loopback_and_bytes_that_left_are_told_apart(finish):
    found = verdict([result(finish, "near/a", **NEAR), result(finish, "far/b", **CLOUD)])
    assert found.text.endswith(
        " 2,345 bytes of request left this device for api.example.com:443 and 812 bytes of request went to another "
        "process on this device, over HTTP, at a cost of at least $0.00056, not all prices being known."
    )


def test_bytes_that_were_not_measured_are_unknown_and_not_0(finish):
    egress = Egress(left_device=False, bytes_sent=None, destination="127.0.0.1:9001")
    found = verdict([result(finish, "local/a"), result(finish, "near/b", **{**NEAR, "egress": egress})])
    assert " An unknown number of bytes of request went to another process" in found.text
    more = verdict([result(finish, "near/a", **NEAR), result(finish, "near/b", **{**NEAR, "egress": egress})])
    assert " At least 812 bytes of request went to another process" in more.text


def test_contended_timings_are_said_to_be_no_measurement(finish):
    found = verdict([result(finish, "local/a", contended=True), result(finish, "local/b", contended=True)])
    assert "timings are no measurement" in found.text
    assert "times as fast" not in found.text


def test_right_and_wrong_targets_are_named(finish):
    found = verdict([result(finish, "local/a", "x", correct=False), result(finish, "local/b", correct=True)])
    assert "about as fast as" in found.text
    assert "local/b was right and local/a was wrong" in found.text


def test_failed_arms_are_named_and_claim_nothing_about_egress(finish):
    found = verdict([failure("far/a"), result(finish, "local/b")])
    assert found.text == (
        "On this input only local/b answered, in 10 ms; far/a failed. "
        "No hosted arm answered: all targets that did ran in this process, at a cost of $0. "
        "What failed targets were sent is not counted."
    )
    assert "far/a failed: far is down" in found.reasons
    assert verdict([failure("far/a"), failure("far/b")]).text == (
        "No target answered: far/a and far/b failed. What failed targets were sent is not counted."
    )


def test_an_unknown_price_is_said_to_be_unknown(finish):
    unknown = {**CLOUD, "cost": Cost(usd=None, basis="none")}
    assert "at an unknown price" in verdict([result(finish, "local/a"), result(finish, "far/b", **unknown)]).text
    found = verdict([result(finish, "far/a", **CLOUD), result(finish, "far/b", **unknown)])
    assert "at a cost of at least $0.00056, not all prices being known" in found.text
