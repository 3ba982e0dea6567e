"""The images: their rules, and the CPU image built and run by a real engine."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from models.tiny_scenes import BUNDLES, SAMPLES
from serving.child import free_port
from tests.podman import CONFINED, Podman, debian_python, podman
from tests.postgres import postgres
from tests.serving.test_deploy import compose
from tests.test_packaging import CODE, EXTRAS, PROJECT, ROOT, names_of

BUDGET_MB = 450  # of the CPU image, before any model
IMAGE = "localhost/nearfar:cpu"

# Images


class Step(NamedTuple):
    """One instruction of a Dockerfile with its continuation lines joined."""

    word: str
    rest: str


def steps_of(text: str) -> list[Step]:
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [Step(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def image_faults(text: str) -> list[str]:
    """What a runtime image of ours must not be, each as one line; empty where all is well."""
    steps = steps_of(text)
    last_from = max(number for number, step in enumerate(steps) if step.word == "FROM")
    final = {step.word: step.rest for step in steps[last_from:]}
    installs = [number for number, step in enumerate(steps) if step.word == "RUN" and "pip install" in step.rest]
    code = [
        number
        for number, step in enumerate(steps)
        if step.word == "COPY" and (set(shlex.split(step.rest)) & {".", *CODE})
        and "pyproject.toml" not in step.rest and "LICENSE" not in step.rest
    ]  # fmt: skip
    user = final.get("USER", "root").partition(":")[0]
    stages = {step.rest.split()[-1] for step in steps if step.word == "FROM" and " AS " in step.rest}
    defaults = dict(step.rest.split("=", 1) for step in steps if step.word == "ARG")
    bases = [step.rest.split()[0] for step in steps if step.word == "FROM" and step.rest.split()[0] not in stages]
    rules = {
        "runs as root, or as a user without a fixed uid": not (user.isdigit() and int(user) > 0),
        "has no HEALTHCHECK on /ready": "/ready" not in final.get("HEALTHCHECK", ""),
        "has no volume for what it writes": final.get("VOLUME") != "/data"
        or "NEARFAR_DATA_DIR=/data" not in final["ENV"],
        "needs curl or wget": re.search(r"\b(curl|wget)\b", text) is not None,
        "has no STOPSIGNAL SIGTERM": final.get("STOPSIGNAL") != "SIGTERM",
        "does not begin nearfar itself": final.get("ENTRYPOINT") != '["nearfar"]',
        "does not expose 8000": final.get("EXPOSE") != "8000",
        "serves strangers": "--allow-anonymous" in final.get("CMD", ""),
        "installs what only export needs": any(
            name in steps[number].rest
            for number in installs
            for name in ("torch", "transformers", "[export", "'export'")
        ),
        "installs without the constraints": not any("constraints.txt" in steps[number].rest for number in installs),
        "copies code before the dependencies are installed": not (installs and code and installs[0] < min(code)),
        "has a base image that no argument can pin by its digest": not all(
            re.fullmatch(r"\$\{\w+\}", b) for b in bases
        ),
        "has a base image without a fixed tag": any(
            not re.search(":(?!latest)", defaults.get(base.strip("${}"), base)) for base in bases
        ),
    }
    return [fault for fault, present in rules.items() if present]


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_an_image_is_unprivileged_checked_small_and_built_in_layers(name: str) -> None:
    assert image_faults((ROOT / name).read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("USER 10001:10001\n", "", "runs as root"),
        ("USER 10001:10001", "USER nearfar", "fixed uid"),
        ("/ready", "/health", "HEALTHCHECK"),
        ("VOLUME /data\n", "", "volume"),
        ("STOPSIGNAL SIGTERM\n", "", "STOPSIGNAL"),
        ("--no-deps .", "torch .", "export needs"),
        ("COPY pyproject.toml constraints.txt ./", "COPY . .", "copies code before"),
        ("--constraint constraints.txt", "", "without the constraints"),
        ("PYTHON_IMAGE=python:3.11-slim-bookworm\n", "PYTHON_IMAGE=python:latest\n", "fixed tag"),
        ("PYTHON_IMAGE=python:3.11-slim-bookworm\n", "PYTHON_IMAGE=python\n", "fixed tag"),
        ("FROM ${PYTHON_IMAGE}\n", "FROM python:3.11-slim-bookworm\n", "digest"),
    ],
)
def test_a_fault_in_an_image_is_found(old: str, new: str, fault: str) -> None:
    text = (ROOT / "Dockerfile.cpu").read_text()
    assert old in text
    assert [found for found in image_faults(text.replace(old, new)) if fault in found]


def dependency_list(name: str, folder: Path) -> set[str]:
    """The requirements that a Dockerfile's own one-liner takes out of pyproject.toml."""
    (run,) = [step.rest for step in steps_of((ROOT / name).read_text()) if "tomllib" in step.rest]
    program = re.search(r'python -c "(.*?)" >', run)
    assert program
    shutil.copy(ROOT / "pyproject.toml", folder)
    done = subprocess.run(
        [sys.executable, "-c", program[1]], cwd=folder, capture_output=True, text=True, check=True
    )  # fmt: skip
    return names_of(done.stdout.split())


IMAGE_EXTRAS = [line for name in ("hosted", "video", "documents", "postgres") for line in EXTRAS[name]]


def test_the_cpu_image_installs_the_runtime_hosted_and_media(tmp_path: Path) -> None:
    assert dependency_list("Dockerfile.cpu", tmp_path) == names_of([*PROJECT["dependencies"], *IMAGE_EXTRAS])


def test_the_gpu_image_installs_one_onnx_runtime_only(tmp_path: Path) -> None:
    wanted = names_of([*PROJECT["dependencies"], *IMAGE_EXTRAS, *EXTRAS["gpu"]])
    assert dependency_list("Dockerfile.gpu", tmp_path) == wanted - {"onnxruntime"}


def test_the_build_context_lets_in_what_the_images_copy_and_no_checkpoint() -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert rules[1] == "*"
    for step in steps_of((ROOT / "Dockerfile.cpu").read_text()):
        if step.word == "COPY" and not step.rest.startswith("--from"):
            assert {f"!{source}" for source in step.rest.split()[:-1]} <= set(rules)
    assert "models/tiny_scenes/checkpoint" in rules[rules.index("!models") :]


# The CPU image, built and run


@pytest.fixture(scope="module")
def engine() -> Iterator[Podman]:
    """With the CPU image, built on a Debian with its Python."""
    with podman() as started:
        debian_python(started, "localhost/debian-python:3.11")
        started.build(IMAGE, ROOT, "Dockerfile.cpu", PYTHON_IMAGE="localhost/debian-python:3.11")
        yield started


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not come"
        time.sleep(0.2)


def is_healthy(engine: Podman, container: str) -> bool:
    """As the image's own HEALTHCHECK says."""
    return engine("healthcheck", "run", container, status=None).returncode == 0


def ask(engine: Podman, container: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the service in a container answers, asked from inside it, with the key `opensesame`."""
    program = """
import json, sys, urllib.error, urllib.request
url, body = sys.argv[1], sys.argv[2].encode() or None
headers = {"content-type": "application/json", "x-api-key": "opensesame"}
try:
    answer = urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60)
except urllib.error.HTTPError as error:
    answer = error
text = answer.read().decode()
print(json.dumps({"status": answer.status, **(json.loads(text) if text.startswith("{") else {"text": text})}))
"""
    port = engine("exec", container, "printenv", "NEARFAR_PORT").stdout.strip()
    given = (f"http://127.0.0.1:{port}{path}", json.dumps(body) if body else "")
    answer: dict[str, Any] = json.loads(engine("exec", container, "python", "-c", program, *given).stdout)
    return answer


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_cpu_image_keeps_to_its_budget(engine: Podman, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(engine("image", "mount", IMAGE).stdout.strip())
    sizes = {path: path.lstat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink()}
    ours, models = (
        sum(size for path, size in sizes.items() if path.is_relative_to(root / part)) / 1e6
        for part in ("opt/nearfar", "opt/nearfar/lib/python3.11/site-packages/models/tiny_scenes/bundles")
    )
    total = sum(sizes.values()) / 1e6
    with capsys.disabled():
        print(
            f"\nCPU image: base {total - ours:.0f} MB, nearfar {ours - models:.0f} MB, embedded models {models:.0f} MB"
        )
    assert models > 10
    assert total - models < BUDGET_MB


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_it_serves_as_nobody_on_a_read_only_root_and_leaves_with_status_0(engine: Podman) -> None:
    engine("run", "--detach", "--name=serving", "--env=NEARFAR_API_KEYS=opensesame", *CONFINED, IMAGE)
    until(lambda: is_healthy(engine, "serving"))
    body = {"prompt": "What color is the circle?", "images": [red_circle()]}
    assert ask(engine, "serving", "/infer", body)["text"] == "red"
    compared = ask(engine, "serving", "/compare", body | {"reference": "red"})
    assert ask(engine, "serving", f"/compare/{compared['id']}")["id"] == compared["id"]  # it is kept in /data
    assert "<title>nearfar" in ask(engine, "serving", "/")["text"]
    sample = engine(
        "exec", "serving", "sh", "-c", "ls lib/python3*/site-packages/models/tiny_scenes/samples/red*"
    ).stdout
    inferred = engine("exec", "serving", "nearfar", "infer", sample.strip(), "What color is the circle?")
    assert inferred.stdout == "red\n"
    assert engine("exec", "serving", "id", "-u").stdout == "10001\n"
    writable = (
        "for folder in / /data /etc /home /opt/nearfar /run /tmp /var/tmp; do test -w $folder && echo $folder; done"
    )
    assert engine("exec", "serving", "sh", "-c", writable, status=None).stdout.split() == ["/data", "/tmp"]
    engine("stop", "serving")
    assert engine("inspect", "--format={{.State.ExitCode}}", "serving").stdout == "0\n"
    assert "Traceback" not in logged(engine, "serving")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_it_is_unhealthy_while_it_is_not_ready(engine: Podman) -> None:
    broken = engine.home / "broken"
    shutil.copytree(BUNDLES["tiny-scenes@int8"], broken)
    next(broken.glob("onnx/decoder*")).write_bytes(b"cut")
    options = (f"--volume={broken}:/broken:ro", "--env=NEARFAR_MODELS=/broken", "--env=NEARFAR_API_KEYS=opensesame")
    engine("run", "--detach", "--name=broken", *options, *CONFINED, IMAGE)
    until(lambda: "Uvicorn running" in logged(engine, "broken"))
    until(lambda: "being loaded" not in str(ask(engine, "broken", "/ready")))
    assert ask(engine, "broken", "/health")["status"] == "ok"
    assert not is_healthy(engine, "broken")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_data_volume_of_somebody_else_is_one_line_at_start_and_questions_are_answered(engine: Podman) -> None:
    (engine.home / "theirs").mkdir(mode=0o755)
    options = (f"--volume={engine.home / 'theirs'}:/data", "--env=NEARFAR_API_KEYS=opensesame")
    engine("run", "--detach", "--name=theirs", *options, *CONFINED, IMAGE)
    until(lambda: is_healthy(engine, "theirs"))
    told = [line for line in logged(engine, "theirs").splitlines() if "WARNING" in line or "ERROR" in line]
    assert len(told) == 1
    assert "/data cannot be written by this user" in told[0]
    body = {"prompt": "What color is the circle?", "images": [red_circle()]}
    assert ask(engine, "theirs", "/infer", body)["text"] == "red"
    assert ask(engine, "theirs", "/compare", body)["status"] == 503


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_videos_and_documents_are_read_in_it(engine: Podman) -> None:
    files = engine.home / "files"
    files.mkdir()
    shutil.copy(ROOT / "tests" / "models" / "golden" / "short.mp4", files)
    with Image.open(SAMPLES / "red-circle.png") as picture:
        picture.convert("RGB").save(files / "page.pdf")
    for name in ("short.mp4", "page.pdf"):
        options = ("--rm", f"--volume={files}:/files:ro", *CONFINED)
        asked = engine("run", *options, IMAGE, "infer", "--json", f"/files/{name}", "What color is the circle?")
        assert json.loads(asked.stdout)["images"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_with_the_settings_of_the_compose_file_records_lie_in_postgresql(engine: Podman) -> None:
    declared: dict[str, str] = compose()["services"]["nearfar"]["environment"]
    folder = engine.home / "secrets"
    folder.mkdir(mode=0o700)
    own = {"NEARFAR_HOST": "127.0.0.1", "NEARFAR_PORT": str(free_port())}  # loopback, where this PostgreSQL is
    with postgres() as address:
        (folder / "nearfar_api_keys").write_text("opensesame\n")
        (folder / "nearfar_database").write_text(address + "\n")
        mounted = [f"--volume={file}:/run/secrets/{file.name}:ro" for file in folder.iterdir()]
        named = [f"--env={name}={value}" for name, value in (declared | own).items()]
        network = [option if option != "--network=none" else "--network=host" for option in CONFINED]
        engine("run", "--detach", "--name=composed", *mounted, *named, *network, IMAGE)
        until(lambda: is_healthy(engine, "composed"))
        compared = ask(engine, "composed", "/compare", {"prompt": "What color is it?", "images": [red_circle()]})
        assert compared["results"][0]["ok"]
        count = ("psql", "--no-align", "--tuples-only", address, "--command=SELECT id FROM comparisons")
        assert subprocess.run(count, capture_output=True, text=True, check=True).stdout.split() == [compared["id"]]
        engine("stop", "composed")
    lines = logged(engine, "composed").splitlines()
    assert all(json.loads(line) for line in lines)
    assert "not-a-secret" not in "".join(lines)


def logged(engine: Podman, container: str) -> str:
    run = engine("logs", container)
    return "".join(line for line in (run.stdout + run.stderr).splitlines(True) if not line.startswith("time="))


def red_circle() -> str:
    picture = base64.b64encode((SAMPLES / "red-circle.png").read_bytes()).decode()
    return f"data:image/png;base64,{picture}"
