"""Blind comparisons over HTTP: nothing tells who is who before the vote, everything after it; the leaderboard."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from models.errors import UpstreamError
from models.tiny_scenes import SAMPLES
from serving.targets import Target, Targets
from tests.serving.conftest import RunningService, events_of, process, running, server_of
from tests.serving.test_cli import assert_fails, nearfar
from tests.serving.test_streams import Script

INT8, FP32 = "local/tiny-scenes@int8", "local/tiny-scenes@fp32"
QUESTION = {"prompt": "What color is the circle?", "blind": "true"}
TELLING = (
    "int8",
    "fp32",
    "tiny",
    "local/",
    "far/",
    "_ms",
    "usd",
    "token",
    "bytes_sent",
    "destination",
    "egress",
    "order",
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("votes")


@pytest.fixture(scope="module")
def service(data_dir: Path) -> Iterator[RunningService]:
    with running(data_dir=data_dir) as started:
        yield started.ready()


@pytest.fixture
def own(service: RunningService) -> httpx2.Client:
    return service.client


def compare(client: httpx2.Client, image: bytes, **fields: str) -> dict[str, Any]:
    answer = client.post("/compare", files={"image": image}, data={**QUESTION, **fields})
    assert answer.status_code == 200, answer.text
    compared: dict[str, Any] = answer.json()
    return compared


def vote(client: httpx2.Client, name: str, winner: str = "a", voter: str = "anna", **more: Any) -> httpx2.Response:
    return client.post(f"/compare/{name}/vote", json={"winner": winner, "voter": voter}, **more)


def scripted(service: RunningService, *scripts: Script) -> None:
    """Let the service offer these targets beside its own."""
    own = [target for target in service.services.targets() if target.kind == "local"]
    more = [Target(answerer=script, kind="hosted", model="one") for script in scripts]
    service.services._targets = Targets([*own, *more])


def test_before_the_vote_nothing_tells_who_is_who(own: httpx2.Client, red_circle: bytes) -> None:
    plain = own.post("/compare", files={"image": red_circle}, data={**QUESTION, "reference": "red"})
    name = plain.json()["id"]
    streamed = own.post("/compare", files={"image": red_circle}, data={**QUESTION, "stream": "true"})
    again = [own.get(path) for path in (f"/compare/{name}", f"/compare/{name}?voter=anna", "/compare")]
    exports = [own.get("/compare/export", params={"format": form}) for form in ("jsonl", "csv")]
    for response in (plain, streamed, *again, exports[0]):
        assert response.status_code == 200
        assert not [word for word in TELLING if word in response.text.lower().replace("max_tokens", "")]
    heading, *rows = exports[1].text.splitlines()
    assert heading.startswith("id,")
    assert rows
    assert not [word for word in TELLING[:4] for row in rows if word in row.lower()]
    told = {*plain.headers, *streamed.headers, *plain.headers.values(), *streamed.headers.values()}
    assert not [word for word in TELLING for each in told if word in each.lower()]
    assert plain.json()["results"] == [{"side": side, "ok": True, "text": "red"} for side in "ab"]
    assert {"events", "versions", "tradeoff", "verdict"}.isdisjoint(again[0].json())
    assert own.get("/compare", params={"target": INT8}).json()["comparisons"] == []
    assert own.get("/compare", params={"correct": True}).json()["comparisons"] == []


def test_the_command_line_hides_it_too(own: httpx2.Client, data_dir: Path, red_circle: bytes) -> None:
    name = compare(own, red_circle)["id"]
    listed = nearfar("records", "list", "--limit", "1", NEARFAR_DATA_DIR=str(data_dir), COLUMNS="200")
    shown = nearfar("records", "show", name, NEARFAR_DATA_DIR=str(data_dir))
    for run in (listed, shown):
        assert run.returncode == 0, run.stderr
        assert "red" in run.stdout
        assert "tiny-scenes" not in run.stdout
    assert "side a" in listed.stdout
    asked = (str(SAMPLES / "red-circle.png"), QUESTION["prompt"])
    assert_fails(nearfar("replay", name, *asked, NEARFAR_DATA_DIR=str(data_dir)), 1, "once it was voted on")
    vote(own, name)
    assert nearfar("replay", name, *asked, NEARFAR_DATA_DIR=str(data_dir)).returncode == 0


def test_the_vote_shows_everything_and_opens_the_record(own: httpx2.Client, red_circle: bytes) -> None:
    name = compare(own, red_circle, reference="red")["id"]
    opened = vote(own, name, "both_bad").json()
    assert opened["vote"] == {"winner": "both_bad", "voter": "anna"}
    assert set(opened["sides"].values()) == {INT8, FP32}
    assert [result["target"] for result in opened["results"]] == [opened["sides"]["a"], opened["sides"]["b"]]
    assert all(result["correct"] and result["timings"]["total_ms"] > 0 for result in opened["results"])
    assert opened["verdict"]["choice"] == "undecided"
    assert opened["votes"] == {"a": 0, "b": 0, "tie": 0, "both_bad": 1}
    kept = own.get(f"/compare/{name}", params={"voter": "anna"}).json()
    assert {"vote": opened["vote"], **kept} == opened
    assert "sides" not in own.get(f"/compare/{name}", params={"voter": "ben"}).json()
    assert own.get(f"/compare/{name}").json()["sides"] == opened["sides"]


def test_neither_verdict_nor_break_even_counts_what_is_still_hidden(tmp_path: Path, red_circle: bytes) -> None:
    with running(data_dir=tmp_path) as service:
        client = service.ready().client
        name = compare(client, red_circle, reference="red")["id"]

        def counted() -> tuple[int, int]:
            named = {"targets": f"{INT8},{FP32}"}
            verdict = client.get("/verdict", params=named).json()
            return verdict.get("n", 0), len(client.post("/break-even", json={"measured": True}).json()["measured"])

        assert counted() == (0, 0)
        vote(client, name)
        assert counted() == (1, 2)


def test_a_voter_votes_once_and_others_may_too(own: httpx2.Client, red_circle: bytes) -> None:
    name = compare(own, red_circle)["id"]
    assert vote(own, name, "a").status_code == 200
    again = vote(own, name, "b")
    assert (again.status_code, again.json()["error"]["type"]) == (409, "conflict")
    assert vote(own, name, "b", voter="ben").json()["votes"] == {"a": 1, "b": 1, "tie": 0, "both_bad": 0}


def test_what_cannot_be_voted_on_is_one_clear_error(own: httpx2.Client, red_circle: bytes) -> None:
    seen = own.post("/compare", files={"image": red_circle}, data={"prompt": "What color is it?"}).json()["id"]
    blind = compare(own, red_circle)["id"]
    for response, status in (
        (vote(own, "cmp_0123456789abcdef"), 404),
        (vote(own, "no%00such"), 404),
        (vote(own, seen), 409),
        (vote(own, blind, winner="c"), 422),
        (vote(own, blind, voter=""), 422),
        (vote(own, blind, voter="x" * 65), 422),
        (vote(own, blind, voter="a\nb"), 422),
        (own.post(f"/compare/{blind}/vote", json={"winner": "a"}), 422),
        (own.post(f"/compare/{blind}/vote", json={"winner": "a", "voter": "x", "weight": 2}), 422),
        (own.post(f"/compare/{blind}/vote", content="{"), 415),
    ):
        assert response.status_code == status, response.text
        assert response.json()["error"]["message"]
    assert "sides" not in own.get(f"/compare/{blind}").json()


def test_both_sides_are_told_in_step_and_only_when_both_have_answered(service: RunningService) -> None:
    fast = Script(("x" * 300,), name="far/fast")
    slow = Script((0.6, *("y" * 10 for _ in range(20))), name="far/slow")
    scripted(service, fast, slow)
    for _ in range(4):  # either may run first, and on either side
        body = {"prompt": "x", "blind": True, "stream": True, "targets": ["far/fast", "far/slow"]}
        asked_at, pieces = time.monotonic(), []
        with service.client.stream("POST", "/compare", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: ") and '"side"' in line:
                    pieces.append((time.monotonic() - asked_at, json.loads(line.removeprefix("data: "))))
        deltas = [(at, piece) for at, piece in pieces if set(piece) == {"side", "text"}]
        assert deltas[0][0] > 0.6
        said: dict[str, str] = {"a": "", "b": ""}
        for (_, left), (_, right) in zip(deltas[0:100:2], deltas[1:100:2], strict=True):
            assert (left["side"], right["side"]) == ("a", "b")
            assert len(left["text"]) == len(right["text"])
        for _, piece in deltas:
            said[piece["side"]] += piece["text"]
        assert set(said.values()) == {"x" * 300, "y" * 200}
    scripted(service)


def test_a_side_that_fails_tells_no_name_and_cannot_be_voted_on(service: RunningService) -> None:
    own = service.client
    scripted(service, Script((UpstreamError("far/broken answered 503"),), name="far/broken"))
    body = {"prompt": "x", "blind": True, "targets": ["far/broken", INT8]}
    plain = own.post("/compare", json=body)
    streamed = own.post("/compare", json={**body, "stream": True})
    scripted(service)
    for response in (plain, streamed):
        assert response.status_code == 200
        assert not [word for word in (*TELLING, "503", "broken", "upstream") if word in response.text.lower()]
    assert [event for event, _ in events_of(streamed.text)][-1] == "comparison"
    answered = plain.json()
    assert answered["votable"] is False
    assert [result["error"]["type"] for result in answered["results"] if not result["ok"]] == ["no_answer"]
    assert vote(own, answered["id"]).status_code == 409
    kept = own.get(f"/compare/{answered['id']}").json()
    assert "far/broken" in [result["target"] for result in kept["results"]]


def test_each_target_is_on_either_side_and_the_sides_tell_nothing_of_the_order(
    own: httpx2.Client, red_circle: bytes
) -> None:
    seen: Counter[tuple[str, int]] = Counter()
    for _ in range(16):
        opened = vote(own, compare(own, red_circle)["id"]).json()
        seen[opened["sides"]["a"], opened["results"][0]["order"]] += 1
    assert {target for target, _ in seen} == {INT8, FP32}
    assert {order for _, order in seen} == {0, 1}


def test_of_three_targets_each_pair_has_its_turn(tmp_path: Path) -> None:
    with running(data_dir=tmp_path) as service:
        scripted(service.ready(), Script(("one",), name="far/one"))
        drawn = Counter[frozenset[str]]()
        for _ in range(6):
            body = {"prompt": "x", "blind": True, "max_tokens": 2, "targets": [INT8, FP32, "far/one"]}
            opened = vote(service.client, service.client.post("/compare", json=body).json()["id"]).json()
            drawn[frozenset(opened["sides"].values())] += 1
    assert sorted(drawn.values()) == [2, 2, 2]


def test_one_target_or_no_records_cannot_be_blind(own: httpx2.Client, red_circle: bytes) -> None:
    alone = own.post("/compare", files={"image": red_circle}, data={**QUESTION, "targets": INT8})
    assert (alone.status_code, alone.json()["error"]["param"]) == (400, "targets")
    with running(records=False) as service:
        off = service.ready().client.post("/compare", files={"image": red_circle}, data=QUESTION)
    assert (off.status_code, off.json()["error"]["param"]) == (400, "blind")


def test_votes_and_leaderboard_are_each_keys_own(tmp_path: Path, red_circle: bytes) -> None:
    with running(data_dir=tmp_path, api_keys=("one", "two")) as service:
        client = service.ready().client
        mine, other = {"x-api-key": "one"}, {"x-api-key": "two"}
        name = client.post("/compare", files={"image": red_circle}, data=QUESTION, headers=mine).json()["id"]
        assert vote(client, name).status_code == 401
        assert vote(client, name, headers=other).status_code == 404
        assert vote(client, name, headers=mine).status_code == 200
        assert client.get("/leaderboard", headers=other).json()["votes"] == 0
        assert client.get("/leaderboard", headers=mine).json()["votes"] == 1


def test_the_leaderboard_joins_votes_and_figures_and_the_command_prints_it(tmp_path: Path, red_circle: bytes) -> None:
    with running(data_dir=tmp_path) as service:
        client = service.ready().client
        assert client.get("/leaderboard").json()["targets"] == []
        for winner in ("fp32", "fp32", "tie", "both_bad"):
            name = compare(client, red_circle)["id"]
            # What the voter sees does not tell; a test may look at what is kept.
            record = service.services.records.store().get(name)
            assert record
            side = "ab"[[arm.target for arm in record.arms].index(FP32)] if winner == "fp32" else winner
            assert vote(client, name, side).status_code == 200
        board = client.get("/leaderboard").json()
        first, second = board["targets"]
        assert (board["method"], board["votes"], board["comparisons"]) == ("wilson", 4, 3)
        assert (first["target"], first["wins"], first["losses"], first["ties"], first["both_bad"]) == (FP32, 2, 0, 1, 1)
        assert first["share"]["value"] == pytest.approx(2.5 / 3, abs=1e-4)
        assert first["share"]["low"] < 0.5 < first["share"]["high"] <= 1
        assert (second["target"], second["share"]["value"]) == (INT8, pytest.approx(0.5 / 3, abs=1e-4))
        assert first["medians"]["usd"] == {"value": 0, "n": 4}
        assert first["medians"]["total_ms"]["value"] > 0
        assert first["left_device"] is False
    run = nearfar("leaderboard", "--json", NEARFAR_DATA_DIR=str(tmp_path))
    assert (run.returncode, json.loads(run.stdout)) == (0, board)
    table = nearfar("leaderboard", NEARFAR_DATA_DIR=str(tmp_path), COLUMNS="200").stdout
    assert "2-0-1" in table
    assert "4 votes on 3 comparisons" in table


def test_a_service_that_is_killed_while_votes_come_keeps_each_one_that_it_confirmed(
    tmp_path: Path, red_circle: bytes
) -> None:
    confirmed: list[tuple[str, str]] = []
    with process("tiny-scenes@int8", "tiny-scenes@fp32", data_dir=tmp_path) as client:
        names = [compare(client, red_circle)["id"] for _ in range(8)]

        def vote_on_all(voter: str) -> None:
            with httpx2.Client(base_url=client.base_url, timeout=30, trust_env=False) as own:
                for round_ in range(200):
                    for name in names:
                        try:
                            given = vote(own, name, voter=f"{voter}{round_}")
                        except httpx2.TransportError:
                            return
                        confirmed.append((name, f"{voter}{round_}")) if given.status_code == 200 else None

        threads = [threading.Thread(target=vote_on_all, args=(voter,)) for voter in ("anna", "ben")]
        for thread in threads:
            thread.start()
        while len(confirmed) < 30:
            time.sleep(0.01)
        server_of(client).kill()
        for thread in threads:
            thread.join()
    with process("tiny-scenes@int8", "tiny-scenes@fp32", data_dir=tmp_path) as client:
        kept = sum(sum(client.get(f"/compare/{name}").json()["votes"].values()) for name in names)
        assert len(confirmed) <= kept <= len(confirmed) + 2
        assert all(vote(client, name, voter=voter).status_code == 409 for name, voter in confirmed)
        assert vote(client, names[0], voter="after").status_code == 200
