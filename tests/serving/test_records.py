"""Kept comparisons over HTTP and on the command line: whole, apart for each key, exported, deleted; a full disk."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from typer.testing import CliRunner

from comparisons.database import database_url
from comparisons.store import Filter, Store
from serving.cli import app
from tests.postgres import PASSWORD, postgres
from tests.serving.conftest import events_of, running

INT8, FP32 = "local/tiny-scenes@int8", "local/tiny-scenes@fp32"
QUESTION = "What color is the circle?"
HEX = 16


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def own(data_dir: Path) -> Iterator[httpx2.Client]:
    with running(data_dir=data_dir) as service:
        yield service.ready().client


def compare(client: httpx2.Client, image: bytes, **fields: Any) -> dict[str, Any]:
    headers = {"x-api-key": fields.pop("key")} if "key" in fields else {}
    data = {"prompt": QUESTION, **fields}
    answer = client.post("/compare", files={"image": image}, data=data, headers=headers)
    assert answer.status_code == 200, answer.text
    compared: dict[str, Any] = answer.json()
    return compared


def test_a_comparison_is_found_again_as_it_was_answered(own: httpx2.Client, red_circle: bytes) -> None:
    answered = compare(own, red_circle, reference="red", seed="7", detail="low")
    kept = own.get(f"/compare/{answered['id']}").json()
    assert {name: kept[name] for name in answered} == answered
    assert (kept["task"], kept["reference"], kept["owner"]) == ("vqa", "red", None)
    assert (kept["settings"]["seed"], kept["settings"]["detail"], kept["settings"]["policy"]) == (
        7,
        "low",
        "local-only",
    )
    assert kept["created_at"].endswith("Z")
    picture = answered["results"][0]["images"][0]["sha256"]
    assert kept["input"]["files"] == [{"kind": "image", "sha256": picture, "bytes": len(red_circle)}]
    assert (kept["input"]["prompt"], kept["input"]["kept"]) == (None, False)
    thumbnail = base64.b64decode(kept["input"]["thumbnail"].removeprefix("data:image/webp;base64,"))
    with Image.open(io.BytesIO(thumbnail)) as image:
        assert image.size == (128, 128)


def test_it_tells_versions_and_every_event_with_its_time(own: httpx2.Client, red_circle: bytes) -> None:
    kept = own.get(f"/compare/{compare(own, red_circle)['id']}").json()
    for result in kept["results"]:
        events = kept["events"][result["target"]]
        assert "".join(text for _, kind, text in events if kind == "delta") == result["text"]
        assert [kind for _, kind, _ in events][-1] == "finished"
        times = [at_ms for at_ms, _, _ in events]
        assert times == sorted(times)
        assert times[-1] >= result["timings"]["total_ms"] * 0.9
    int8, fp32 = (kept["versions"][target] for target in (INT8, FP32))
    assert len(int8["model"]) == HEX
    assert int8["model"] != fp32["model"]
    assert int8["preprocessing"] == fp32["preprocessing"]
    assert (int8["prompt"], int8["source"]) == (fp32["prompt"], fp32["source"])
    assert (int8["recipe"], fp32["recipe"]) == ("int8", "fp32")
    assert int8["genai-prices"]


def test_a_streamed_comparison_is_kept_too(own: httpx2.Client, red_circle: bytes) -> None:
    data = {"prompt": QUESTION, "stream": "true"}
    events = events_of(own.post("/compare", files={"image": red_circle}, data=data).text)
    answered = json.loads(events[-1][1])
    kept = own.get(f"/compare/{answered['id']}").json()
    assert {name: kept[name] for name in answered} == answered


def test_the_judges_words_and_the_formulas_of_repeats_are_kept(own: httpx2.Client, red_circle: bytes) -> None:
    answered = compare(own, red_circle, repeats="2", judge=INT8)
    assert {"judge", "formulas"} <= answered.keys()
    kept = own.get(f"/compare/{answered['id']}").json()
    assert {name: kept[name] for name in answered} == answered


def test_failed_arms_are_kept_with_their_errors(own: httpx2.Client) -> None:
    answered = compare(own, b"no picture at all")
    kept = own.get(f"/compare/{answered['id']}").json()
    assert [result["error"]["type"] for result in kept["results"]] == ["invalid_request"] * 2
    assert kept["events"][INT8][-1][1] == "failed"
    assert kept["input"]["thumbnail"] is None


def test_the_list_is_the_newest_first_in_pages(own: httpx2.Client, red_circle: bytes) -> None:
    made = [compare(own, red_circle, targets=INT8)["id"] for _ in range(5)]
    first = own.get("/compare", params={"limit": 3}).json()
    second = own.get("/compare", params={"limit": 3, "cursor": first["next"]}).json()
    listed = [row["id"] for page in (first, second) for row in page["comparisons"]]
    assert listed[:5] == made[::-1]
    assert set(first["comparisons"][0]["results"][0]) == {
        "target", "ok", "text", "correct", "confidence", "total_ms", "usd",
    }  # fmt: skip
    assert 0 < first["comparisons"][0]["results"][0]["confidence"] <= 1
    assert "thumbnail" not in first["comparisons"][0]
    pictured = own.get("/compare", params={"limit": 1, "thumbnails": "true"}).json()["comparisons"][0]
    assert pictured.pop("thumbnail") == own.get(f"/compare/{made[-1]}").json()["input"]["thumbnail"]
    assert pictured == first["comparisons"][0]


def test_the_list_is_filtered(own: httpx2.Client, red_circle: bytes) -> None:
    right = compare(own, red_circle, targets=INT8, reference="red", task="ocr")["id"]
    wrong = compare(own, red_circle, targets=FP32, reference="blue", task="ocr")["id"]

    def found(**params: Any) -> list[str]:
        listed = own.get("/compare", params=params)
        assert listed.status_code == 200, listed.text
        return [row["id"] for row in listed.json()["comparisons"]]

    assert found(task="ocr") == [wrong, right]
    assert found(task="ocr", target=INT8) == [right]
    assert found(task="ocr", correct="false") == [wrong]
    at = own.get(f"/compare/{wrong}").json()["created_at"]
    assert wrong in found(task="ocr", since=at)
    assert found(since="2999-01-01T00:00:00+02:00") == []
    assert right not in found(until="2020-01-01")


@pytest.mark.parametrize(
    "params",
    [{"limit": 0}, {"limit": 201}, {"cursor": "nonsense"}, {"colour": "red"}, {"task": "poetry"}, {"since": "soon"},
     {"target": "a\x00b"}, {"correct": "perhaps"}],
    ids=str,
)  # fmt: skip
def test_a_wrong_question_about_records_is_422_and_names_the_field(own: httpx2.Client, params: dict[str, Any]) -> None:
    answer = own.get("/compare", params=params)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == next(iter(params))


@pytest.mark.parametrize("name", ["cmp_0000000000000000", "a%00b", "x" * 500, "%2e%2e"])
def test_an_unknown_comparison_is_404(own: httpx2.Client, name: str) -> None:
    assert own.get(f"/compare/{name}").status_code == 404
    assert own.delete(f"/compare/{name}").status_code == 404


def test_the_export_has_every_comparison_whole(own: httpx2.Client, red_circle: bytes) -> None:
    compare(own, red_circle, reference="red")
    answer = own.get("/compare/export")
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["id"] for line in lines] == [
        row["id"] for row in own.get("/compare", params={"limit": 200}).json()["comparisons"]
    ]
    assert lines[0] == own.get(f"/compare/{lines[0]['id']}").json()


def test_the_csv_has_a_row_for_each_arm_and_no_formula(own: httpx2.Client, red_circle: bytes) -> None:
    answered = compare(own, red_circle, reference="=1+1")
    answer = own.get("/compare/export", params={"format": "csv"})
    rows = [row for row in csv.DictReader(io.StringIO(answer.text)) if row["id"] == answered["id"]]
    assert [row["target"] for row in rows] == [INT8, FP32]
    assert [row["text"] for row in rows] == [result["text"] for result in answered["results"]]
    assert {row["correct"] for row in rows} == {"false"}
    assert {row["reference"] for row in rows} == {"'=1+1"}
    assert float(rows[0]["confidence"]) == answered["results"][0]["confidence"]


def test_a_deleted_comparison_is_gone(own: httpx2.Client, red_circle: bytes) -> None:
    made = compare(own, red_circle, targets=INT8)["id"]
    assert own.delete(f"/compare/{made}").status_code == 204
    assert own.get(f"/compare/{made}").status_code == 404
    assert own.delete(f"/compare/{made}").status_code == 404


def test_a_key_sees_its_own_comparisons_alone(tmp_path: Path, red_circle: bytes) -> None:
    with running(data_dir=tmp_path, api_keys=("first-key", "second-key"), models=("tiny-scenes",)) as service:
        client = service.ready().client
        made = {key: compare(client, red_circle, key=key)["id"] for key in ("first-key", "second-key")}
        for key, others in (("first-key", made["second-key"]), ("second-key", made["first-key"])):
            headers = {"x-api-key": key}
            assert [row["id"] for row in client.get("/compare", headers=headers).json()["comparisons"]] == [made[key]]
            assert len(client.get("/compare/export", headers=headers).text.splitlines()) == 1
            assert client.get(f"/compare/{others}", headers=headers).status_code == 404
            assert client.delete(f"/compare/{others}", headers=headers).status_code == 404
        for path in ("/compare", "/compare/export", f"/compare/{made['first-key']}"):
            assert client.get(path).status_code == 401


def test_inputs_are_kept_when_the_service_is_told_to(tmp_path: Path, red_circle: bytes) -> None:
    with running(data_dir=tmp_path, keep_inputs=True, models=("tiny-scenes",)) as service:
        made = compare(service.ready().client, red_circle)["id"]
        kept = service.client.get(f"/compare/{made}").json()["input"]
        assert (kept["prompt"], kept["kept"]) == (QUESTION, True)
        record = service.services.records.store().get(made)
        assert record
        assert record.input.files[0].data == red_circle


def test_without_it_the_question_is_nowhere_in_the_folder(
    data_dir: Path, own: httpx2.Client, red_circle: bytes
) -> None:
    compare(
        own, red_circle, prompt="Where is the zebra4711?", response_format='{"type": "choice", "choices": ["okapi"]}'
    )
    content = b"".join(path.read_bytes() for path in data_dir.glob("records*"))
    assert b"zebra4711" not in content
    assert red_circle[60:120] not in content


def test_switched_off_nothing_is_kept(tmp_path: Path, red_circle: bytes) -> None:
    with running(data_dir=tmp_path, records=False, models=("tiny-scenes",)) as service:
        made = compare(service.ready().client, red_circle)["id"]
        answer = service.client.get(f"/compare/{made}")
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == "records are switched off here"
    assert not list(tmp_path.glob("records*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that is a disk of twelve megabytes."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "none", tmp_path], capture_output=True, check=False
    ) if os.geteuid() == 0 else None  # fmt: skip
    if made is None or made.returncode:
        pytest.skip("only root may mount a disk")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_on_a_full_disk_a_comparison_is_503_and_everything_else_goes_on(small_disk: Path, red_circle: bytes) -> None:
    with running(data_dir=small_disk, models=("tiny-scenes",)) as service:
        client = service.ready().client
        made = compare(client, red_circle)["id"]
        (small_disk / "other").write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize))
        asked = {"files": {"image": red_circle}, "data": {"prompt": QUESTION}}
        refused = client.post("/compare", **asked)
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "the records cannot be written: the disk is full"
        streamed = client.post("/compare", files={"image": red_circle}, data={"prompt": QUESTION, "stream": "true"})
        assert streamed.status_code == 503
        assert client.get(f"/compare/{made}").status_code == 200
        assert made in [row["id"] for row in client.get("/compare").json()["comparisons"]]
        assert client.post("/infer", **asked).status_code == 200
        (small_disk / "other").unlink()
        assert client.post("/compare", **asked).status_code == 200


def test_records_live_in_postgresql_where_an_address_is_given(tmp_path: Path, red_circle: bytes) -> None:
    with postgres() as address, running(data_dir=tmp_path, database=address, models=("tiny-scenes",)) as service:
        client = service.ready().client
        made = compare(client, red_circle, reference="red")
        kept = client.get(f"/compare/{made['id']}").json()
        assert {name: kept[name] for name in made} == made
        assert len(client.get("/compare/export").text.splitlines()) == 1
        assert client.delete(f"/compare/{made['id']}").status_code == 204
        assert client.get("/compare").json() == {"comparisons": [], "next": None}
        shown = service.app.state.settings.effective()["database"].value
        assert PASSWORD not in shown
        assert PASSWORD not in repr(service.app.state.settings)
    assert not list(tmp_path.glob("records*"))


def nearfar(data_dir: Path, *arguments: str, status: int = 0) -> str:
    """What the command prints: on stdout where it succeeds, else on stderr."""
    run = CliRunner().invoke(app, arguments, env={"NEARFAR_DATA_DIR": str(data_dir), "COLUMNS": "200"})
    assert run.exit_code == status, run.stderr
    return run.stderr if status else run.stdout


def test_the_command_line_keeps_lists_shows_exports_and_deletes(tmp_path: Path) -> None:
    picture = "models/tiny_scenes/samples/red-circle.png"
    asked = ("compare", picture, QUESTION, "--reference", "red", "--targets", INT8, "--json")
    made, kept = json.loads(nearfar(tmp_path, *asked)), json.loads(nearfar(tmp_path, *asked, "--keep-inputs"))
    listed = json.loads(nearfar(tmp_path, "records", "list", "--right", "--json"))["comparisons"]
    assert [row["id"] for row in listed] == [kept["id"], made["id"]]
    assert json.loads(nearfar(tmp_path, "records", "list", "--wrong", "--json"))["comparisons"] == []
    assert "red" in nearfar(tmp_path, "records", "list")
    shown = json.loads(nearfar(tmp_path, "records", "show", kept["id"], "--json"))
    assert {name: shown[name] for name in kept} == kept
    assert QUESTION in nearfar(tmp_path, "records", "show", kept["id"])
    assert len(nearfar(tmp_path, "records", "export").splitlines()) == 2
    assert nearfar(tmp_path, "records", "export", "--format", "csv").startswith("id,created_at,")
    assert nearfar(tmp_path, "records", "delete", made["id"]) == "1 removed\n"
    assert "there is no comparison" in nearfar(tmp_path, "records", "show", made["id"], status=1)
    assert "name comparisons, or --before" in nearfar(tmp_path, "records", "delete", status=2)
    assert "name comparisons, or --before" in nearfar(tmp_path, "records", "delete", "x", "--all", status=2)
    assert nearfar(tmp_path, "records", "delete", "--before", "2020-01-01") == "0 removed\n"
    assert nearfar(tmp_path, "records", "delete", "--all") == "1 removed\n"
    assert nearfar(tmp_path, "records", "list") == "no comparison is kept that fits\n"
    assert nearfar(tmp_path, "leaderboard").startswith("no votes yet")


def test_a_store_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "records.sqlite3").write_bytes(b"a file of somebody else's " * 100)
    assert nearfar(tmp_path, "records", "list", status=1) == (
        "nearfar: the records cannot be read: file is not a database\n"
    )


SQUARE = "models/tiny_scenes/samples/square-and-star.png"
ASKED = ("compare", SQUARE, "Is there a star?", "--reference", "yes", "--max-tokens", "5", "--json")


def test_a_replay_asks_the_same_again_keeps_that_too_and_shows_what_is_different(tmp_path: Path) -> None:
    kept = json.loads(nearfar(tmp_path, *ASKED, "--keep-inputs"))
    found = json.loads(nearfar(tmp_path, "replay", kept["id"], "--json"))
    assert found["then"] == kept["id"]
    before, now = (json.loads(nearfar(tmp_path, "records", "show", found[name], "--json")) for name in ("then", "now"))
    assert now["input"]["sha256"] == before["input"]["sha256"]
    assert (now["settings"], now["reference"]) == (before["settings"], before["reference"])
    assert [arm["target"] for arm in found["arms"]] == [result["target"] for result in kept["results"]]
    for arm, old, new in zip(found["arms"], before["results"], now["results"], strict=True):
        assert arm["same_answer"]
        assert arm["text"] == [old["text"], new["text"]]
        assert arm["total_ms"] == [old["timings"]["total_ms"], new["timings"]["total_ms"]]
        assert arm["versions"] == {}
    assert "the same answer" in nearfar(tmp_path, "replay", kept["id"])


def test_a_replay_holds_the_answers_as_they_were_held(tmp_path: Path) -> None:
    held = ("--measure", "number", "--tolerance", "50%", "--repeats", "2", "--judge", FP32, "--keep-inputs")
    asked = (SQUARE.replace("square-and-star", "three-shapes"), "How many shapes are there?", "--reference", "2")
    made = json.loads(nearfar(tmp_path, "compare", *asked, "--json", *held))
    found = json.loads(nearfar(tmp_path, "replay", made["id"], "--json"))
    before, now = (json.loads(nearfar(tmp_path, "records", "show", found[name], "--json")) for name in ("then", "now"))
    assert now["settings"] == before["settings"]
    assert (now["settings"]["measure"], now["settings"]["repeats"], now["settings"]["judge"]) == ("number", 2, FP32)
    for old, new in zip(before["results"], now["results"], strict=True):
        assert (old["score"], new["score"]) == (1.0, 1.0)  # 3 is within half of 2
        assert (old["repeats"]["asked"], new["repeats"]["asked"]) == (2, 2)


def test_a_replay_of_what_was_not_kept_takes_the_same_input_and_no_other(tmp_path: Path) -> None:
    made = json.loads(nearfar(tmp_path, *ASKED))["id"]
    assert "was not kept: name its file and its question" in nearfar(tmp_path, "replay", made, status=1)
    assert "name both" in nearfar(tmp_path, "replay", made, SQUARE, status=2)
    other = nearfar(tmp_path, "replay", made, SQUARE, "Is there a circle?", status=1)
    assert "are not those of" in other
    found = json.loads(nearfar(tmp_path, "replay", made, SQUARE, "Is there a star?", "--json"))
    assert all(arm["same_answer"] for arm in found["arms"])


def test_a_local_replay_needs_no_far_model(tmp_path: Path, red_circle: bytes) -> None:
    form = json.dumps({"type": "choice", "choices": ["red", "blue"]})
    with running(models=("tiny-scenes@fp32",)) as far:
        address = f"far={far.ready().url}/v1,tiny-scenes@fp32"
        with running(data_dir=tmp_path, keep_inputs=True, endpoints=(address,)) as service:
            fields = {"targets": f"far/tiny-scenes@fp32,{FP32}", "response_format": form, "detail": "low"}
            made = compare(service.ready().client, red_circle, **fields)["id"]
    found = json.loads(nearfar(tmp_path, "replay", made, "--local", "--json"))
    (arm,) = found["arms"]
    assert (arm["target"], arm["same_answer"]) == (FP32, True)
    shown = json.loads(nearfar(tmp_path, "records", "show", found["now"], "--json"))
    assert (shown["settings"]["output"], shown["settings"]["detail"]) == ("ChoiceFormat", "low")
    # The far one's endpoint is not named now.
    assert "there is no target" in nearfar(tmp_path, "replay", made, status=1)


def test_a_replay_on_another_version_of_a_model_names_it(tmp_path: Path) -> None:
    made = json.loads(nearfar(tmp_path, *ASKED, "--keep-inputs", "--targets", INT8))["id"]
    records = Store(database_url(None, tmp_path))
    record = records.get(made)
    assert record
    (arm,) = record.arms
    records.delete(Filter(ids=(made,)))
    result = {**arm.result, "text": "no", "correct": False}
    old = replace(arm, versions={**arm.versions, "model": "older"}, result=result)
    records.add(replace(record, arms=(old,)))
    records.close()
    (found,) = json.loads(nearfar(tmp_path, "replay", made, "--json"))["arms"]
    assert found["same_answer"] is False
    assert found["correct"] == [False, True]
    assert found["versions"] == {"model": ["older", arm.versions["model"]]}
    assert "another answer" in nearfar(tmp_path, "replay", made)
