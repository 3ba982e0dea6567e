"""`nearfar evaluate` as its user meets it: real processes and models, a counting provider, kills and bad input."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.progress import Progress
from typer.testing import CliRunner

from comparisons.dataset import Dataset, Media, Row
from comparisons.evaluation import Arm, Evaluation, Plan
from comparisons.loading import Defaults
from comparisons.run_file import RunFile
from models.answerer import whole
from models.errors import BudgetSpent, InvalidValue, NotFound, NotOffered, Unavailable
from models.reduction import Reduction
from models.request import GenerationSettings
from models.tiny_scenes import SAMPLES
from serving.cli import app
from serving.evaluate import Job, find_dataset, highest_price_usd, run
from serving.hosted.hosted_model import HostedModel
from serving.hosted.providers import Provider
from serving.remote import RemoteService, RemoteTarget
from serving.settings import Settings
from serving.targets import Target
from tests.hosted.wire_server import GOOD, Received, Reply, WireServer, usage
from tests.serving.conftest import RunningService, running

INT8 = "local/tiny-scenes@int8"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "serving.cli", "evaluate", *arguments]


def evaluate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=100, check=False, env={**os.environ, **environment}
    )


def questions(folder: Path, count: int) -> Path:
    """So many questions about the sample of a red circle, each with words of its own."""
    (folder / "circle.png").write_bytes((SAMPLES / "red-circle.png").read_bytes())
    rows = [{"image": "circle.png", "prompt": f"{n}: what color?", "reference": "red"} for n in range(count)]
    path = folder / "circles.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_embedded_models_answer_a_drawn_set_and_every_answer_is_in_the_file(tmp_path):
    out = tmp_path / "run.jsonl"
    run = evaluate("scenes", "--limit", "40", "--out", str(out), "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert (result["answers"], result["of"], result["stopped"]) == (80, 80, None)
    assert result["dataset"]["licence"] == "drawn by this project, Apache-2.0"
    int8, fp32 = result["targets"]
    assert (int8["target"], int8["n"], int8["errors"], int8["usd"], int8["bytes_sent"]) == (INT8, 40, 0, 0.0, 0)
    assert int8["accuracy"]["low"] < int8["accuracy"]["value"] < int8["accuracy"]["high"]
    assert int8["accuracy"]["value"] > 0.8
    assert int8["total_ms"]["n"] == 40
    assert int8["total_ms"]["p99"] is None
    assert len(result["slices"]) == 20
    (decision,) = result["decisions"]
    assert (decision["first"], decision["second"], decision["n"]) == (INT8, fp32["target"], 40)
    assert decision["choice"] == "undecided"
    assert decision["dissent"]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    kinds = Counter(line["kind"] for line in lines)
    assert (lines[0]["kind"], kinds) == ("run", {"run": 1, "session": 1, "input": 40, "answer": 80})
    assert lines[1]["versions"][INT8]["recipe"] == "int8"
    right = sum(line["correct"] for line in lines if line["kind"] == "answer" and line["target"] == fp32["target"])
    assert fp32["accuracy"]["value"] == right / 40


def test_tables_name_targets_slices_fields_and_formulas_and_the_file(tmp_path):
    run = evaluate("documents", "--limit", "3", "--targets", "tiny-scenes", XDG_DATA_HOME=str(tmp_path), COLUMNS="140")
    assert run.returncode == 0, run.stderr
    for word in (INT8, "rows with a reference", "print=", "total", "0 of 3", "Wilson's 95 % interval"):
        assert word in run.stdout
    (file,) = (tmp_path / "nearfar" / "evaluations").iterdir()
    assert str(file) in run.stderr
    assert "drawn by this project" in run.stderr


def test_corruptions_multiply_the_rows_and_have_slices_of_their_own(tmp_path):
    options = ("--limit", "4", "--corrupt", "blur,dark", "--severity", "1,5", "--targets", "tiny-scenes")
    result = json.loads(evaluate("scenes-absent", *options, "--out", str(tmp_path / "r"), "--json").stdout)
    slices = {name: standings[0]["n"] for name, standings in result["slices"].items() if "corruption" in name}
    assert slices == {f"corruption={name}": 4 for name in ("none", "blur-1", "blur-5", "dark-1", "dark-5")}


@pytest.mark.asyncio
async def test_a_killed_run_goes_on_and_no_answered_question_is_asked_again(tmp_path):
    data, out = questions(tmp_path, 12), tmp_path / "run.jsonl"
    server, fifth = waiting_server(5, silence_s=0.05)
    async with server.listening():
        asked = command(
            str(data), "--endpoint", f"far=http://127.0.0.1:{server.port}/v1,m", "--targets", "far/m",
            "--concurrency", "2", "--out", str(out),
        )  # fmt: skip
        first = await asyncio.create_subprocess_exec(*asked, stderr=asyncio.subprocess.DEVNULL)
        await asyncio.wait_for(fifth.wait(), 60)
        first.send_signal(signal.SIGKILL)
        await first.wait()
        lines = map(json.loads, out.read_text().splitlines())
        answered = {line["row_id"] for line in lines if line["kind"] == "answer"}
        before = Counter(map(question, server.received))
        second = await asyncio.create_subprocess_exec(*asked, "--resume", "--json", stdout=asyncio.subprocess.PIPE)
        shown, _ = await second.communicate()
    assert second.returncode == 0
    result = json.loads(shown)
    assert (result["answers"], result["targets"][0]["accuracy"]["value"]) == (12, 1.0)
    times = Counter(map(question, server.received))
    assert len(times) == 12
    assert 3 <= len(answered) < 12
    assert all(times[f"{int(row) - 1}: what color?"] == 1 for row in answered)
    assert times.total() <= 12 + 2  # those in hand when it was killed
    assert before.total() >= 5


def waiting_server(count: int, *, silence_s: float) -> tuple[WireServer, asyncio.Event]:
    """A provider that takes its time, and an event that comes with that request."""
    reached = asyncio.Event()

    def reply_to(_: Received) -> Reply:
        if len(server.received) >= count:
            reached.set()
        return Reply(silence_s=silence_s)

    server = WireServer(reply_to=reply_to)
    return server, reached


def question(received: Received) -> str:
    parts = received.json["messages"][-1]["content"]
    if isinstance(parts, str):
        return parts
    return next(part["text"] for part in parts if part["type"] == "text")


@pytest.mark.asyncio
async def test_ctrl_c_leaves_a_file_to_go_on_with_and_status_130(tmp_path):
    data, out = questions(tmp_path, 8), tmp_path / "run.jsonl"
    server, third = waiting_server(3, silence_s=0.2)
    async with server.listening():
        asked = command(
            str(data), "--endpoint", f"far=http://127.0.0.1:{server.port}/v1,m", "--targets", "far/m", "--out", str(out)
        )
        process = await asyncio.create_subprocess_exec(
            *asked,
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
        )
        await asyncio.wait_for(third.wait(), 60)
        process.send_signal(signal.SIGINT)
        _, told = await process.communicate()
    assert process.returncode == 130
    assert (
        told.decode().strip().splitlines()[-1]
        == f"nearfar: interrupted: {out} keeps what was answered, --resume goes on"
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len([line for line in lines if line["kind"] == "answer"]) >= 2


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("nowhere.jsonl",), 1, "no file or folder nowhere.jsonl"),
        (("some/dataset",), 1, "not in the hub's cache on this machine"),
        (("empty.jsonl",), 1, "empty.jsonl has no rows"),
        (("bad.jsonl",), 1, "bad.jsonl line 1, image: no.png is not there"),
        (("scenes", "--limit", "0"), 2, "limit must be at least 1"),
        (("scenes", "--repeats", "0"), 2, "repeats must be 1"),
        (("scenes", "--max-usd", "nan"), 2, "max-usd"),
        (("scenes", "--weights", "quality=-1"), 2, "weight"),
        (("scenes", "--weights", "beauty=1"), 2, "beauty"),
        (("scenes", "--corrupt", "fog"), 2, "one of blur"),
        (("scenes", "--limit", "1", "--targets", "nobody/x"), 1, "nobody"),
        (("scenes", "--limit", "1", "--url", "https://example.com"), 1, "local-only"),
        (("scenes", "--limit", "1", "--url", "http://127.0.0.1:9"), 1, "refused"),
        (("scenes", "--limit", "1", "--resume"), 1, "no run of scenes"),
        (("scenes-many", "--limit", "3", "--corrupt", "blur"), 1, "only pictures"),
    ],
)
def test_bad_input_is_one_line_and_a_status(tmp_path, monkeypatch, arguments, status, said):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"image": "no.png", "prompt": "?"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "300")
    run = CliRunner().invoke(app, ["evaluate", *arguments])
    assert run.exit_code == status, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("nearfar: ")
    assert said in last


def test_a_run_that_is_there_is_not_written_over_and_the_newest_is_the_one_to_go_on_with(tmp_path):
    options = ("inspection", "--limit", "2", "--targets", "tiny-scenes")
    out = ("--out", str(tmp_path / "r"))
    assert evaluate(*options, *out).returncode == 0
    again = evaluate(*options, *out)
    assert again.returncode == 1
    assert "--resume goes on with it" in again.stderr.replace("\n", " ")
    assert evaluate(*options, XDG_DATA_HOME=str(tmp_path)).returncode == 0
    resumed = evaluate(*options, "--resume", "--json", XDG_DATA_HOME=str(tmp_path))
    assert json.loads(resumed.stdout)["answers"] == 2
    assert len(list((tmp_path / "nearfar" / "evaluations").iterdir())) == 1


def test_a_running_service_is_asked_by_its_address_with_its_key(tmp_path):
    with running(api_keys="secret") as service:
        url = service.ready().url
        options = ("scenes", "--limit", "10", "--url", url, "--json")
        refused = evaluate(*options, "--out", str(tmp_path / "a"))
        assert refused.returncode == 1
        assert "answered 401" in refused.stderr
        result = json.loads(evaluate(*options, "--out", str(tmp_path / "b"), NEARFAR_API_KEY="secret").stdout)
        named = evaluate(
            *options, "--targets", "fp32-not-there", "--out", str(tmp_path / "c"), NEARFAR_API_KEY="secret"
        )
    assert [(each["target"], each["n"], each["errors"]) for each in result["targets"]] == [
        (INT8, 10, 0),
        ("local/tiny-scenes@fp32", 10, 0),
    ]
    assert result["targets"][0]["total_ms"]["median"] > 0
    assert "no target 'fp32-not-there'" in named.stderr


def test_pages_and_schemas_reach_a_service_too(tmp_path, service: RunningService):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "p.tiff")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"document": "p.tiff", "prompt": "Count.", "schema": schema, "reference": {"n": 1}})
    )
    out = tmp_path / "r"
    run = evaluate(str(tmp_path / "d.jsonl"), "--url", service.url, "--targets", "tiny-scenes@int8", "--out", str(out))
    assert run.returncode == 0, run.stderr
    answer = json.loads(out.read_text().splitlines()[-1])
    assert list(json.loads(answer["text"])) == ["n"]


@pytest.mark.asyncio
async def test_a_services_confidence_comes_with_its_answer_so_that_a_route_can_be_judged(service: RunningService):
    row = Row(row_id="1", prompt="What color is the circle?", images=(Media(source=SAMPLES / "red-circle.png"),))
    answer = await whole(RemoteTarget(RemoteService(url=service.url), INT8), row.request(GenerationSettings(), "auto"))
    assert 0.5 < (answer.finished.confidence or 0.0) <= 1.0


@pytest.mark.asyncio
async def test_a_service_that_dies_within_its_answer_is_one_failed_row_and_not_the_end_of_the_run():
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = re.search(rb"content-length: (\d+)", head)
        assert length
        await reader.readexactly(int(length[1]))  # what is closed unread is reset, and the client may see that instead
        writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{"text": "re')
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(die, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        asked = Row(row_id="1", prompt="?").request(GenerationSettings(), "auto")
        with pytest.raises(Unavailable, match="IncompleteRead"):
            await whole(RemoteTarget(RemoteService(url=url), INT8), asked)


@pytest.mark.asyncio
async def test_pictures_are_reduced_before_they_go_to_a_service_and_pages_do_not_go(service: RunningService):
    target = RemoteTarget(RemoteService(url=service.url), INT8)
    plain = Row(row_id="1", prompt="What color is the circle?", images=(Media(source=SAMPLES / "red-circle.png"),))
    asked = plain.request(GenerationSettings(), "auto")
    small = replace(asked, reduction=Reduction(max_side_px=80))
    sizes = [(await whole(target, request)).finished.images[0].width for request in (asked, small)]
    assert sizes[1] == 80 < sizes[0]
    paper = replace(plain, images=(), document=Media(source=b"II*\x00")).request(GenerationSettings(), "auto")
    with pytest.raises(NotOffered, match="cannot be reduced"):
        await whole(target, replace(paper, reduction=small.reduction))


@pytest.mark.asyncio
async def test_a_dollar_cap_is_not_passed_over_the_wire_and_what_is_paid_is_not_asked_again(tmp_path):
    rows = tuple(Row(row_id=str(n), prompt=f"{n}: what color?", references=("red",)) for n in range(30))
    dataset = Dataset(name="d", rows=rows, licence="ours")
    server = WireServer(script=(*GOOD[:-2], usage(900, 50), GOOD[-1]))
    async with server.listening():
        base_url = f"http://127.0.0.1:{server.port}/v1"
        far = hosted("gpt-4.1-mini", base_url=base_url, price_provider="openai")
        arms = [Arm(answerer=far.answerer, alone=False, at_most_usd=partial(highest_price_usd, far))]
        for resume, cap in ((False, 0.003), (True, 0.006)):
            plan = Plan(max_usd=cap, concurrency=3)
            file = (RunFile.resume if resume else RunFile.begin)(tmp_path / "r", plan.header(dataset, arms))
            with pytest.raises(BudgetSpent):
                async for _ in Evaluation(dataset, arms, plan, file).answers():
                    pass
            file.close()
            paid = sum(answered.usd for answered in file.answers.values())
            assert cap / 2 < paid <= cap
            assert set(Counter(map(question, server.received)).values()) == {1}
            assert len(file.answers) == len(server.received)
        await far.answerer.aclose()


def test_a_full_disk_ends_the_run_in_one_line_and_what_was_answered_is_kept(tmp_path):
    out = tmp_path / "run.jsonl"
    asked = shlex.join(command("inspection", "--targets", "tiny-scenes", "--out", str(out)))
    full = subprocess.run(["bash", "-c", f"ulimit -f 32; {asked}"], capture_output=True, text=True, check=False)
    assert full.returncode == 1
    assert full.stderr.strip().splitlines()[-1].endswith("what was answered before is kept")
    kept = [line for line in out.read_text().split("\n")[1:-1] if json.loads(line)["kind"] == "answer"]
    assert len(kept) > 3
    never = asked.replace("run.jsonl", "never.jsonl")
    assert subprocess.run(["bash", "-c", f"ulimit -f 1; {never}"], capture_output=True, check=False).returncode == 1
    assert not (tmp_path / "never.jsonl").exists()
    again = evaluate("inspection", "--targets", "tiny-scenes", "--out", str(out), "--resume", "--json")
    assert json.loads(again.stdout)["answers"] == 24
    after = [line for line in out.read_text().splitlines() if json.loads(line)["kind"] == "answer"]
    assert after[: len(kept)] == kept


def test_a_data_set_of_the_hub_is_read_from_its_cache_and_never_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "datasets--some--pictures", "0" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "a.png").write_bytes((SAMPLES / "red-circle.png").read_bytes())
    (snapshot / "metadata.jsonl").write_text('{"file_name": "a.png", "prompt": "?", "reference": "red"}')
    found = find_dataset("some/pictures", Defaults(), limit=None, seed=0)
    assert [row.references for row in found.rows] == [("red",)]
    with pytest.raises(NotFound, match="hf download some/others --repo-type dataset"):
        find_dataset("some/others", Defaults(), limit=None, seed=0)


@pytest.mark.asyncio
async def test_a_cap_without_a_known_price_is_refused_before_anything_is_sent(tmp_path):
    rows = (Row(row_id="1", prompt="?", references=("x",)),)
    settings = Settings(policy="any", endpoints=("box=http://203.0.113.1:9/v1,m",))
    job = Job(
        dataset=Dataset(name="d", rows=rows, licence="ours"),
        names=["box/m"],
        plan=Plan(max_usd=1.0),
        out=tmp_path / "r",
    )
    with pytest.raises(InvalidValue, match="no price is known for box/m"):
        await run(job, settings, {}, Progress(disable=True))
    assert not job.out.exists()


def hosted(model: str, **row: Any) -> Target:
    """A target whose price is known as that provider's, or not at all."""
    provider = Provider(**{"name": "far", "base_url": "https://203.0.113.1/v1", "models": (model,), **row})
    return Target(
        answerer=HostedModel(provider, model, "key"),
        kind="hosted",
        model=model,
        leaves_device=provider.leaves_device,
        estimate=partial(provider.estimate, model),
    )


def test_the_highest_price_is_above_what_a_usual_answer_costs_and_a_route_may_ask_each_target_twice():
    priced, unknown = hosted("gpt-4.1-mini", price_provider="openai"), hosted("m")
    own = hosted("m", base_url="http://127.0.0.1:9/v1")
    asked = replace(Row(row_id="1", prompt="What is it?").request(GenerationSettings(), "auto"), policy="any")
    longer = replace(asked, settings=GenerationSettings(max_tokens=4096))
    price: Any = highest_price_usd(priced, asked)
    assert 0.0004 < price < 0.01
    assert highest_price_usd(priced, longer) > price
    assert (highest_price_usd(unknown, asked), highest_price_usd(own, asked)) == (None, 0.0)
    route = replace(priced, kind="route", chain=(own, priced))
    assert highest_price_usd(route, asked) == 2 * price
    assert highest_price_usd(replace(route, chain=(priced, unknown)), asked) is None
    assert highest_price_usd(replace(route, chain=(own, unknown)), replace(asked, policy="local-only")) == 0.0


def test_a_running_services_prices_hold_a_cap_before_anything_is_asked(tmp_path):
    endpoints = ("box=http://203.0.113.1:9/v1,m",)
    with running({"OPENAI_API_KEY": "key"}, policy="any", endpoints=endpoints) as service:
        url = service.ready().url
        options = ("scenes", "--limit", "2", "--policy", "any", "--url", url, "--max-usd", "0.0000001")
        stopped = evaluate(*options, "--targets", "openai/gpt-4.1-mini", "--out", str(tmp_path / "a"))
        unknown = evaluate(*options, "--targets", "box/m", "--out", str(tmp_path / "b"))
        metrics = service.client.get("/metrics").text
    assert (stopped.returncode, unknown.returncode) == (1, 2)
    assert "stopped before $1e-07 could be passed" in stopped.stderr
    assert "2 questions can cost at most $0.00" in stopped.stderr
    assert "no price is known for box/m" in unknown.stderr
    assert 'target="openai/gpt-4.1-mini"' not in metrics
