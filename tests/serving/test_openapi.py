"""What the service says of itself is true, and nothing that it describes, or hardly not, makes it fail."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from serving.api.openapi import BODIES
from serving.child import child_service
from tests.serving.api_reference import FILE, reference
from tests.serving.spoken import DIALECTS, INFER, Asked

# A deadline that is over is no fault of the service. Of itself the fuzzer would give nearly every request 5e-324 s.
CONFIG = """
parameters = { "header.x-request-timeout-s" = "30" }
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""


def test_every_body_is_described_as_it_is_read(client: httpx2.Client) -> None:
    description = client.get("/openapi.json").json()
    posts = {path for path, methods in description["paths"].items() if "post" in methods}
    without = {f"/models/{{name}}/{verb}" for verb in ("load", "pull", "unload")}
    assert posts == {*BODIES, *without}
    for path in BODIES:
        content = description["paths"][path]["post"]["requestBody"]["content"]
        forms = {"multipart/form-data"} if path in ("/infer", "/compare") else set()
        assert content.keys() == {"application/json"} | forms
    schemas = description["components"]["schemas"]
    assert schemas["MessagesBody"]["required"] == ["messages", "max_tokens"]
    assert {"type": "string"} in schemas["ResponsesBody"]["properties"]["input"]["anyOf"]
    files = description["paths"]["/infer"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "video", "document", "prompt", "max_tokens"} < files["properties"].keys()
    assert files["additionalProperties"] is False


def test_the_examples_in_the_description_are_answered(client: httpx2.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in (path for path in BODIES if "{" not in path):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert client.post(path, json=body).status_code == 200


def test_every_reference_in_the_description_leads_somewhere(client: httpx2.Client) -> None:
    text = client.get("/openapi.json").text
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    named = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert named
    assert named <= schemas.keys()


def test_the_reference_in_the_tree_is_what_the_service_says_of_itself() -> None:
    assert FILE.read_text() == reference(), "run python -m tests.serving.api_reference"


def test_no_page_about_it_loads_scripts_from_elsewhere(client: httpx2.Client) -> None:
    assert [client.get(path).status_code for path in ("/docs", "/redoc")] == [404, 404]


def fuzzed(folder: Path, *options: str) -> None:
    """Ask a service of its own what its description allows, and what it just does not; then it is well."""
    (folder / "schemathesis.toml").write_text(CONFIG)
    offline = {"NEARFAR_OFFLINE": "true"}  # or it would guess a model's name and fetch it
    with child_service("--model", "tiny-scenes@fp32", settings=offline) as address:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"]
        always = ("--checks", "not_a_server_error", "--continue-on-failure", "--no-color", "--request-timeout", "30")
        run = subprocess.run([*command, *always, *options], cwd=folder, capture_output=True, text=True, check=False)
        told = run.stdout[-5000:] + run.stderr[-1000:]
        # schemathesis 4.32 stumbles over its own Binary when it mutates multipart: that one error and no other.
        stumbled = "ValueError: Unsupported type: 'Binary'" in told and re.findall(r"Error: (\d+)", told) == ["1"]
        assert run.returncode == 0 or stumbled, told
        assert re.search(r"(\d+) generated, \1 passed", run.stdout), told
        with httpx2.Client(base_url=address, trust_env=False) as client:
            assert client.get("/ready").status_code == 200
            for dialect in DIALECTS:
                answer = client.post(dialect.path, json=dialect.to_body(Asked(prompt="How many?")))
                assert dialect.read(answer.status_code, answer.content).error is None
            metrics = client.get("/metrics").text
    finished = re.search(r'nearfar_answers_total{outcome="finished",.*} (\d+)', metrics)
    assert finished
    assert int(finished[1]) > 200  # the fuzzer came as far as the model
    assert "internal_error" not in metrics


def test_a_minute_of_fuzzing_finds_no_server_error(tmp_path: Path) -> None:
    fuzzed(tmp_path, "--phases", "examples,coverage,fuzzing", "--generation-deterministic", "--max-examples", "20")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_minutes_of_fuzzing_find_no_server_error(tmp_path: Path) -> None:
    fuzzed(tmp_path, "--phases", "examples,coverage,fuzzing,stateful", "--max-time", "600", "--max-examples", "1000")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_minute_of_soaking_loses_no_answer() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.serving.soak", "--minutes", "1"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"good {INFER.path} streamed" in run.stdout
