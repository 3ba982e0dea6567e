"""The command line as its user meets it: real processes, exit statuses, one line for an error."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import onnx
import psutil
import pytest
from rich.console import Console

from models.tiny_scenes import BUNDLES, SAMPLES
from serving.child import free_port
from serving.tables.comparisons import results_table
from tests.serving.conftest import wait_for

PICTURE = str(SAMPLES / "red-circle.png")


def nearfar(*arguments: str, timeout_s: float = 100, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serving.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env={**os.environ, **environment}
    )


def assert_fails(run: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    assert run.returncode == status, run.stderr
    assert run.stderr.startswith("nearfar: ")
    assert len(run.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in run.stderr


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("serve",),
        ("infer",),
        ("compare",),
        ("break-even",),
        ("leaderboard",),
        ("evaluate",),
        ("export",),
        ("adopt",),
        ("pull",),
        ("models",),
        ("demo",),
        ("bench",),
        ("spend",),
        ("verify",),
    ],
)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    run = nearfar(*command, "--help")
    assert run.returncode == 0
    assert "Usage" in run.stdout


def test_infer_prints_the_answer_alone() -> None:
    run = nearfar("infer", PICTURE, "What color is the circle?")
    assert (run.returncode, run.stdout.strip()) == (0, "red")


def test_a_model_that_memory_cannot_hold_is_refused_with_the_sum() -> None:
    run = nearfar("infer", PICTURE, "What color is the circle?", NEARFAR_MEMORY_BUDGET="100MB")
    assert_fails(run, 1, "memory budget of 0.10 GB", "weights + ", "the process itself = ")
    assert nearfar("infer", PICTURE, "What color is it?", NEARFAR_MEMORY_BUDGET="1GiB").returncode == 0


def test_a_published_folder_is_adopted_and_answers(tmp_path: Path) -> None:
    folder = shutil.copytree(BUNDLES["tiny-scenes@fp32"], tmp_path / "tiny")
    (folder / "manifest.json").unlink()
    assert_fails(nearfar("infer", PICTURE, "What color is the circle?", "--model", str(folder)), 1, "manifest.json")
    assert_fails(nearfar("adopt", str(folder), "--suffix", "q9"), 2, "q9")
    run = nearfar("adopt", str(folder), "--json")
    assert (json.loads(run.stdout)["name"], json.loads(run.stdout)["recipe"]) == ("tiny", "fp32")
    assert nearfar("adopt", str(folder)).stdout.startswith(f"{folder}: tiny@fp32, shared cache\n")
    run = nearfar("infer", PICTURE, "What color is the circle?", "--model", str(folder))
    assert (run.returncode, run.stdout.strip()) == (0, "red")
    (folder / "onnx" / "vision_encoder.onnx").write_bytes(b"cut")
    (folder / "manifest.json").unlink()
    assert_fails(nearfar("adopt", str(folder)), 1, "vision_encoder.onnx")


def test_infer_takes_a_bundle_folder_and_prints_the_http_object() -> None:
    folder = str(BUNDLES["tiny-scenes@fp32"])
    run = nearfar("infer", PICTURE, "What color is the circle?", "--model", folder, "--json")
    answer = json.loads(run.stdout)
    assert (answer["text"], answer["target"]) == ("red", "local/tiny-scenes@fp32")


def test_compare_prints_a_table_and_a_verdict_or_the_http_object() -> None:
    table = nearfar("compare", PICTURE, "What color is the circle?", "--reference", "red", COLUMNS="120")
    assert table.returncode == 0
    assert "first token" in table.stdout
    assert "undecided" in table.stdout
    assert "cost: runs on this machine; electricity and hardware are not counted" in table.stdout
    whole = json.loads(nearfar("compare", PICTURE, "What color is the circle?", "--json").stdout)
    assert len(whole["results"]) == 2


def test_models_lists_both_recipes() -> None:
    rows = json.loads(nearfar("models", "--json").stdout)["models"]
    assert [row["recipe"] for row in rows] == ["int8", "fp32"]
    assert "toy" in nearfar("models").stdout


def test_wrong_use_is_one_line_and_status_2() -> None:
    assert_fails(nearfar("infer", "/no/such.png", "x"), 2, "/no/such.png")
    assert_fails(nearfar("infer", PICTURE), 2, "prompt")
    assert_fails(nearfar("infer", PICTURE, "x", "--max-tokens", "0"), 2, "max_tokens")
    assert_fails(nearfar("serve", "--host", "0.0.0.0"), 2, "nearfar key")
    assert_fails(nearfar("serve", "--port", "99999"), 2, "port")
    assert_fails(nearfar("serve", "--endpoint", "nonsense"), 2, "NAME=URL,MODEL")
    assert nearfar("infer").returncode == 2
    assert nearfar("sing").returncode == 2


def test_what_fails_is_one_line_and_status_1(tmp_path: Path) -> None:
    text = tmp_path / "a.png"
    text.write_text("hello")
    assert_fails(nearfar("infer", str(text), "x"), 1, "of no known format")
    assert_fails(nearfar("infer", PICTURE, "x", "--model", "nobody"), 1, "nobody")
    assert_fails(nearfar("models", "--model", str(tmp_path)), 1, "manifest.json")


def serve(*arguments: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    port = free_port()
    command = [sys.executable, "-m", "serving.cli", "serve", "--port", str(port), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    return process, f"http://127.0.0.1:{port}"


def poll(url: str, wanted: int, timeout_s: float = 40) -> bytes:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                status, body = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
        except OSError:
            status, body = 0, b""
        if status == wanted:
            return bytes(body)
        assert time.monotonic() < deadline, f"{url} gave {status}"
        time.sleep(0.05)


def test_a_free_port_is_given_to_nobody_but_a_server_that_asks_for_it_by_its_number() -> None:
    port = free_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_service_with_status_0(number: signal.Signals) -> None:
    process, url = serve()
    try:
        poll(f"{url}/ready", 200)
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.communicate()


@contextmanager
def answering(drain_s: int, choices: int) -> Iterator[tuple[subprocess.Popen[str], str, Iterator[bytes]]]:
    """A service that gives a long answer: its process, its address, and what is still to come of that answer."""
    process, url = serve("--model", "tiny-scenes@fp32", NEARFAR_DRAIN_S=str(drain_s))
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "ignore_eos": True}
    try:
        poll(f"{url}/ready", 200)
        with httpx2.stream(
            "POST", f"{url}/v1/chat/completions", json={**body, "n": choices, "stream": True}, timeout=60
        ) as answer:
            pieces = answer.iter_bytes()
            next(pieces)
            yield process, url, pieces
    finally:
        process.kill()
        process.communicate()


def test_after_sigterm_running_answers_end_and_new_requests_are_turned_away() -> None:
    with answering(drain_s=60, choices=2) as (process, url, pieces):
        process.terminate()
        wait_for(lambda: status_of(f"{url}/ready") != 200)
        for _ in range(20):
            assert status_of(f"{url}/ready") in (0, 503)
            time.sleep(0.01)
        assert b"[DONE]" in b"".join(pieces)
        assert process.wait(timeout=20) == 0


def test_what_is_not_over_when_the_time_is_up_is_cut() -> None:
    with answering(drain_s=0, choices=8) as (process, _, pieces):
        process.terminate()
        assert b"[DONE]" not in whatever_comes(pieces)
        assert process.wait(timeout=20) == 0


def test_a_second_signal_waits_for_no_answer() -> None:
    with answering(drain_s=60, choices=8) as (process, url, pieces):
        process.terminate()
        wait_for(lambda: status_of(f"{url}/ready") != 200)
        process.terminate()
        assert b"[DONE]" not in whatever_comes(pieces)
        assert process.wait(timeout=20) == 0


def whatever_comes(pieces: Iterator[bytes]) -> bytes:
    """Until the connection ends, however it does."""
    found = b""
    with suppress(httpx2.TransportError):
        for piece in pieces:
            found += piece
    return found


def status_of(url: str) -> int:
    """The status of a fresh request; 0 without an answer."""
    try:
        return httpx2.get(url, timeout=5).status_code
    except httpx2.TransportError:
        return 0


def damage_hash(graph: Path) -> None:
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")


def damage_data(graph: Path) -> None:
    """Weights behind a path that leaves the folder, and a manifest that has the graph's new hash."""
    model = onnx.load(graph)
    (graph.parents[2] / "weights").write_bytes(bytes(10_000_000))
    tensor = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    onnx.external_data_helper.set_external_data(tensor, "../../weights", 0, len(tensor.raw_data))
    tensor.ClearField("raw_data")
    graph.write_bytes(model.SerializeToString())
    manifest = json.loads((graph.parents[1] / "manifest.json").read_text())
    entry = {"bytes": graph.stat().st_size, "sha256": hashlib.sha256(graph.read_bytes()).hexdigest()}
    manifest["files"][f"onnx/{graph.name}"].update(entry)
    (graph.parents[1] / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "said"), [(damage_hash, "hash"), (Path.unlink, "missing"), (damage_data, "does not load")]
)
def test_a_damaged_bundle_is_not_ready_and_says_why(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(BUNDLES["tiny-scenes@fp32"], folder)
    graph = next((folder / "onnx").glob("vision*"))
    damage(graph)
    process, url = serve("--model", str(folder))
    try:
        reason = json.loads(poll(f"{url}/ready", 503 if process.poll() is None else 0))["reason"]
        while reason.startswith("the models are"):
            reason = json.loads(poll(f"{url}/ready", 503))["reason"]
        assert graph.name in reason
        assert said in reason
        poll(f"{url}/health", 200)
        assert graph.name in poll(f"{url}/targets", 503).decode()
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_the_demo_shows_both_answers_and_leaves_with_status_0() -> None:
    run = nearfar("demo", COLUMNS="120")
    assert run.returncode == 0, run.stderr
    for words in ("POST /infer", "POST /compare", "local/tiny-scenes@int8", "far/tiny-scenes@fp32", "undecided", "toy"):
        assert words in run.stdout


def test_the_bench_tells_its_machine_and_writes_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "bench.html"
    options = ("--tiles", "1,2", "--prompts", "16", "--contexts", "16", "--rows", "1,2", "--rounds", "1")
    load = ("--clients", "1,3", "--requests", "24", "--against", "tiny-scenes@fp32")
    told = nearfar("bench", *options, *load, "--html", str(page), "--json")
    result = json.loads(told.stdout)
    assert [(load["clients"], load["requests"], load["errors"]) for load in result["loads"]] == [
        (1, 24, 0), (3, 24, 0), (1, 24, 0), (3, 24, 0)
    ]  # fmt: skip
    assert [load["system"].rpartition("@")[2] for load in result["loads"]] == ["int8", "int8", "fp32", "fp32"]
    assert all(0 < load["ttft_ms"]["50"] < load["total_ms"]["95"] for load in result["loads"])
    assert result["machine"]["cores"] >= 1
    assert {(row["kind"], row["size"]) for row in result["engine"]} == {
        ("vision", 1), ("vision", 2), ("prefill", 16), ("decode", 16), ("rows", 1), ("rows", 2)
    }  # fmt: skip
    names = {"local/tiny-scenes@int8", "local/tiny-scenes@fp32"}
    assert all(set(row["figures"]) == names for row in result["engine"])
    assert result["stages"]["vision_ms"] > 0
    assert 0 < result["process_peak_bytes"] <= result["counted_bytes"]
    assert "vision 2, ms per tile: local/tiny-scenes@int8" in told.stderr
    text = page.read_text()
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", text), (
        "it reaches for something outside"
    )
    assert text.count("<svg") == 6
    embedded = re.search(r'<script type="application/json" id="result">(.*?)</script>', text, re.DOTALL)
    assert embedded
    assert json.loads(embedded[1]) == result


@pytest.mark.parametrize(
    "options", [("--clients", "many"), ("--tiles", "0"), ("--prompts", "1,-2"), ("--llama-cpp", "/nowhere")]
)
def test_wrong_use_of_the_bench_is_told_in_one_line(options: tuple[str, str]) -> None:
    assert_fails(nearfar("bench", *options), 2, options[0])


def test_another_system_that_is_not_installed_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    assert_fails(nearfar("bench", "--openvino", str(tmp_path)), 1, "pip install 'optimum-intel[openvino]'")


def test_a_table_shows_a_models_words_as_they_are() -> None:
    shown = io.StringIO()
    results_table([{"ok": True, "target": "t", "text": "[red]x[/b]\x1b[2J"}], Console(file=shown, width=100))
    assert "[red]x[/b]" in shown.getvalue()
    assert "\x1b[2J" not in shown.getvalue()


def test_sigterm_during_the_demo_leaves_no_service_behind() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.cli", "demo", "--keep"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    address = next(line for line in process.stdout if "serving on" in line).split()[2]
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    poll(f"{address}/ready", 200)
    process.terminate()
    process.wait(timeout=40)
    assert not any(child.is_running() for child in children)
    process.stdout.close()


@pytest.mark.parametrize(
    ("usd", "shown"),
    [(None, "-"), (0.0, "$0"), (5.3e-8, "$5.3e-08"), (0.000413, "$0.000413"), (1.5, "$1.50"), (-0.25, "-$0.25")],
)
def test_a_small_sum_is_not_shown_as_nothing_and_each_basis_is_told_once(usd: float | None, shown: str) -> None:
    cost = {"usd": usd, "basis": "as the list says"}
    results = [{"target": target, "text": "red", "cost": cost} for target in ("far/a", "far/b")]
    results.append({"target": "far/c", "ok": False, "error": {"message": "away"}})
    console = Console(file=io.StringIO(), width=120)
    results_table(results, console)
    told = console.file.getvalue()
    assert shown in told
    assert told.count("cost of far/a, far/b: as the list says") == 1
