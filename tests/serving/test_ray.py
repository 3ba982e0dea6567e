"""The service behind Ray Serve: real replicas on loopback, one killed under load. `make check-ray` runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from comparisons.egress import is_loopback_host
from serving.child import child_service, free_port
from serving.ray_settings import ENVIRONMENT
from tests.postgres import postgres
from tests.serving.conftest import events_of, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
ROOT = Path(__file__).resolve().parents[2]
REPLICA = "ServeReplica:nearfar"
QUESTION = "What color is the circle?"
LONG = {"max_tokens": 900, "ignore_eos": True}  # seconds of work


class OnRay:
    """A service on a Ray of its own, and what belongs to it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = httpx2.Client(base_url=url, timeout=60, trust_env=False)

    def processes(self, name: str = "") -> list[psutil.Process]:
        (head,) = [each for each in psutil.Process().children() if self.url.rpartition(":")[2] in each.cmdline()]
        return [each for each in head.children(recursive=True) if name in " ".join(each.cmdline())]

    def figures(self, name: str) -> dict[str, float]:
        """That series of each replica, other labels summed up."""
        found: dict[str, float] = {}
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith(name + "{"):
                replica = line.partition('replica="')[2].partition('"')[0]
                found[replica] = found.get(replica, 0) + float(line.rpartition(" ")[2])
        return found

    def replicas(self) -> int:
        return len(self.figures("nearfar_slots"))

    def chat(self, number: int, **fields: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": f"{number}: is there a star?"}], **fields}


@pytest.fixture(scope="module")
def on_ray() -> Iterator[OnRay]:
    """Two replicas, with room for eight requests in each."""
    with child_service("--ray", "--replicas", "2", settings={"NEARFAR_MAX_WAITING": "8"}) as url:
        service = OnRay(url)
        wait_for(lambda: service.replicas() == 2, 60)
        yield service
        service.client.close()


def test_pictures_questions_and_comparisons_are_answered_and_streamed(on_ray: OnRay, red_circle: bytes) -> None:
    asked = {"files": {"image": red_circle}, "data": {"prompt": QUESTION}}
    answers = [on_ray.client.post("/infer", **asked, headers={"x-request-id": f"id-{n}"}) for n in range(8)]
    assert [(each.status_code, each.json()["text"]) for each in answers] == [(200, "red")] * 8
    assert [each.headers.get_list("x-request-id") for each in answers] == [[f"id-{n}"] for n in range(8)]
    streamed = on_ray.client.post("/infer", files={"image": red_circle}, data={"prompt": QUESTION, "stream": "true"})
    assert [kind for kind, _ in events_of(streamed.text)] == ["delta", "finished"]
    made = on_ray.client.post("/compare", **asked).json()
    seen = [on_ray.client.get(f"/compare/{made['id']}").status_code for _ in range(8)]
    assert seen == [200] * 8  # whichever replica is asked: on one machine the records are one file
    assert on_ray.client.get("/").status_code == on_ray.client.get("/ready").status_code == 200
    assert on_ray.client.get("/nothing").json()["error"]["type"] == "not_found"


def test_pieces_of_an_answer_arrive_while_it_is_made(on_ray: OnRay) -> None:
    arrived = []
    with on_ray.client.stream("POST", "/v1/chat/completions", json=on_ray.chat(0, stream=True, **LONG)) as answer:
        for _ in answer.iter_text():
            arrived.append(time.monotonic())
    assert len(arrived) > 50
    assert arrived[-1] - arrived[0] > 0.5


def test_a_client_that_leaves_frees_the_engine_of_its_replica(on_ray: OnRay) -> None:
    def left() -> float:
        lines = on_ray.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if "answers_total" in line and 'outcome="left"' in line)

    before = left()
    for number in range(3):
        with on_ray.client.stream("POST", "/v1/chat/completions", json=on_ray.chat(number, stream=True, **LONG)) as got:
            next(got.iter_text())
    wait_for(lambda: left() == before + 3, 10)
    assert sum(on_ray.figures("nearfar_requests_running").values()) == 0


def test_more_than_all_replicas_take_is_429_with_retry_after(on_ray: OnRay) -> None:
    def ask(number: int) -> httpx2.Response:
        fields = {"max_tokens": 200, "ignore_eos": True}
        return on_ray.client.post("/v1/chat/completions", json=on_ray.chat(number, **fields))

    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(ask, range(60)))
    refused = [each for each in answers if each.status_code != 200]
    assert 16 <= len(answers) - len(refused) < 60
    assert {each.status_code for each in refused} == {429}
    assert {each.headers["retry-after"] for each in refused} == {"1"}
    assert {each.json()["error"]["code"] for each in refused} == {"rate_limit_exceeded"}


def test_everything_listens_on_loopback_alone_and_no_dashboard_does(on_ray: OnRay) -> None:
    found = [
        (process.name(), connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for process in on_ray.processes()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(found) > 5
    assert [each for each in found if not is_loopback_host(each[1])] == []
    assert 8265 not in [port for *_, port in found]
    (raylet,) = [each for each in on_ray.processes("raylet/raylet") if each.name() == "raylet"]
    assert raylet.environ()["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_data_set_is_asked_of_all_replicas_by_the_same_command_and_goes_on_where_it_was(
    on_ray: OnRay, tmp_path: Path
) -> None:
    out = str(tmp_path / "answers.jsonl")
    command = [sys.executable, "-m", "serving.cli", "evaluate", "scenes", "--limit", "60", "--url", on_ray.url]
    command += ["--targets", "tiny-scenes@int8", "--out", out, "--json"]
    before = on_ray.figures("nearfar_answers_total")
    with subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        wait_for(lambda: Path(out).exists() and len(Path(out).read_text().splitlines()) > 10, 60)
        run.kill()
    kept = len(Path(out).read_text().splitlines()) - 1
    whole = subprocess.run([*command, "--workers", "2", "--resume"], capture_output=True, text=True, check=True)
    result = json.loads(whole.stdout)
    assert (result["stopped"], result["targets"][0]["errors"]) == (None, 0)
    assert result["answers"] == result["of"] > 40
    assert result["targets"][0]["at_once"] == 2
    now = on_ray.figures("nearfar_answers_total")
    asked = [now[replica] - before.get(replica, 0) for replica in now]
    assert len(asked) == 2
    assert min(asked) > 5
    assert 10 <= kept < result["of"]
    assert sum(asked) <= result["of"] + 2  # what was answered before the kill is not asked again, only what was in hand


class Load:
    """Long streams and short questions, and how each ended."""

    def __init__(self, service: OnRay, picture: bytes) -> None:
        self.service, self.picture = service, picture
        self.ended: list[tuple[str, int, str]] = []
        self.begun = threading.Semaphore(0)

    def stream(self, number: int) -> None:
        body, text = self.service.chat(number, stream=True, **LONG), ""
        with self.service.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for piece in answer.iter_text():
                if not text:
                    self.begun.release()
                text += piece
        last = text.strip().split("\n\n")[-1]
        self.ended.append(("stream", answer.status_code, last))

    def ask(self, number: int) -> None:
        data = {"prompt": f"{number}: {QUESTION}"}
        answer = self.service.client.post("/infer", files={"image": self.picture}, data=data)
        said = answer.json()
        self.ended.append(("plain", answer.status_code, said["error"]["type"] if "error" in said else "answered"))


def test_a_killed_replica_ends_no_request_without_a_word_and_is_replaced(on_ray: OnRay, red_circle: bytes) -> None:
    load = Load(on_ray, red_circle)
    victim = on_ray.processes(REPLICA)[0]
    streams = [threading.Thread(target=load.stream, args=(number,)) for number in range(8)]
    for thread in streams:
        thread.start()
    for _ in streams:
        assert load.begun.acquire(timeout=60)
    questions = [threading.Thread(target=load.ask, args=(number,)) for number in range(20)]
    for number, thread in enumerate(questions):
        thread.start()
        if number == 8:
            victim.kill()
        time.sleep(0.02)
    for thread in (*streams, *questions):
        thread.join(timeout=120)
    assert len(load.ended) == len(streams) + len(questions)  # none hung, none was cut off
    torn = [last for kind, _, last in load.ended if kind == "stream" and last != "data: [DONE]"]
    assert 0 < len(torn) < len(streams)
    for last in torn:
        event, data = last.splitlines()
        assert event == "event: error"
        assert json.loads(data.removeprefix("data: "))["error"]["code"] == "unavailable"
    plain = {(status, said) for kind, status, said in load.ended if kind == "plain"}
    assert (200, "answered") in plain
    assert plain <= {(200, "answered"), (503, "unavailable"), (429, "overloaded")}
    wait_for(lambda: on_ray.replicas() == 2, 90)
    assert victim.pid not in [each.pid for each in on_ray.processes(REPLICA)]
    load.ended.clear()
    for number in range(10):
        load.ask(number)
    assert {(status, said) for _, status, said in load.ended} == {(200, "answered")}


def test_replicas_share_their_records_in_postgresql_come_as_requests_wait_and_go_with_their_head(
    tmp_path: Path, red_circle: bytes
) -> None:
    settings = {"NEARFAR_MAX_RUNNING": "1", "NEARFAR_DATA_DIR": str(tmp_path)}
    with postgres() as address:
        with child_service("--ray", "--replicas", "1-2", settings={**settings, "NEARFAR_DATABASE": address}) as url:
            service = OnRay(url)
            assert service.replicas() == 1
            load = Load(service, red_circle)
            stop = time.monotonic() + 120
            while service.replicas() == 1 and time.monotonic() < stop:
                with ThreadPoolExecutor(4) as pool:
                    list(pool.map(load.stream, range(4)))
            assert service.replicas() == 2
            made = service.client.post("/compare", files={"image": red_circle}, data={"prompt": QUESTION}).json()
            assert {service.client.get(f"/compare/{made['id']}").status_code for _ in range(10)} == {200}
            processes = service.processes()
            service.client.close()
        assert not list(tmp_path.glob("records*"))
        wait_for(lambda: not any(each.is_running() and each.status() != "zombie" for each in processes), 30)


def test_the_config_file_and_the_command_serve_on_a_cluster_that_runs(tmp_path: Path, red_circle: bytes) -> None:
    head, board, port = free_port(), free_port(), free_port()
    environment = {**os.environ, **ENVIRONMENT, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}
    programs = Path(sys.executable).parent
    start = [
        programs / "ray",
        "start",
        "--head",
        "--block",
        f"--port={head}",
        f"--dashboard-port={board}",
        "--num-cpus=2",
    ]
    config = (ROOT / "serving/deploy/ray.yaml").read_text().replace("port: 8000", f"port: {port}")
    (tmp_path / "ray.yaml").write_text(config)

    def answer(url: str) -> str:
        said = httpx2.post(f"{url}/infer", files={"image": red_circle}, data={"prompt": QUESTION}, trust_env=False)
        return str(said.json()["text"])

    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(start, env=environment, stdout=log, stderr=log) as cluster,
    ):
        try:
            wait_for(lambda: "Ray runtime started" in (tmp_path / "log").read_text(), 90)
            with child_service(
                "--ray", "--ray-address", f"127.0.0.1:{head}", "--threads", "1", settings=environment
            ) as url:
                assert answer(url) == "red"
            deploy = [programs / "serve", "deploy", tmp_path / "ray.yaml", "-a", f"http://127.0.0.1:{board}"]
            subprocess.run(deploy, env=environment, check=True, capture_output=True)
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: is_ready(url), 90)
            assert answer(url) == "red"
        finally:
            cluster.terminate()
            cluster.wait(timeout=60)


def is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/ready", trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def nearfar(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serving.cli", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_head_that_cannot_be_reached_and_wrong_use_are_one_line(tmp_path: Path) -> None:
    no_head = nearfar("--ray", "--ray-address", f"127.0.0.1:{free_port()}")
    assert (no_head.returncode, no_head.stdout) == (1, "")
    (line,) = no_head.stderr.splitlines()
    assert line.startswith("nearfar: no Ray head answers at ")
    assert line.endswith("Connection refused")
    alone = nearfar("--ray", "--ray-address", "127.0.0.1", "--replicas", "2")
    assert alone.returncode == 2
    assert "NEARFAR_DATABASE=postgresql://USER@HOST/NAME" in alone.stderr
    for wrong in ("4-2", "0", "many"):
        assert nearfar("--ray", "--replicas", wrong).returncode == 2
    broken = nearfar("--ray", "--port", "0", "--model", str(tmp_path))
    assert broken.returncode == 1
    assert "Traceback" not in broken.stderr
