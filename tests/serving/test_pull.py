"""`nearfar pull` as its user meets it, against a hub on loopback: real processes, real files, every way it can fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest

from models.bundle import Bundle
from models.catalog import NOT_VERIFIED, ROWS
from models.tiny_scenes import BUNDLES
from serving.child import free_port
from tests.serving.conftest import running, wait_for
from tests.serving.hub import COMMIT, Hub, published_files, running_hub, tree
from tests.serving.test_cli import PICTURE, assert_fails, nearfar, poll

QUESTION = "What color is the circle?"
NAME = "smolvlm2-500m"
HUB_ID = str(ROWS[NAME].hub_id)
LARGE_WEIGHTS = b"\x08" + bytes(48 * 2**20)  # the library writes in pieces of 10 MiB
DECODER = "onnx/decoder_model_merged_q4.onnx"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as started:
        started.repositories[HUB_ID] = published_files()
        yield started


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def environment(hub: Hub, data_dir: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "NEARFAR_DATA_DIR": str(data_dir),
        "HF_HOME": str(data_dir / "hf"),
    }


def pull(hub: Hub, data_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return nearfar("pull", *arguments, **environment(hub, data_dir))


def start(hub: Hub, data_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "serving.cli", "pull", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **environment(hub, data_dir)}, **pipes)  # type: ignore[call-overload]


def has_begun(file: Path) -> bool:
    """Whether the weights are under way; a small file's may have come to its end, and has another name then."""
    try:
        return file.stat().st_size > 1000
    except FileNotFoundError:
        return False


def assert_nothing_usable(data_dir: Path) -> None:
    assert not (data_dir / "models").exists() or not list((data_dir / "models").iterdir())


def test_a_model_comes_with_its_size_first_and_its_commit_recorded(hub: Hub, data_dir: Path) -> None:
    run = pull(hub, data_dir, NAME)
    assert run.returncode == 0, run.stderr
    folder = data_dir / "models" / f"{NAME}@int4"
    assert run.stdout.strip() == str(folder)
    first = run.stderr.splitlines()[0]
    assert f"{HUB_ID} at {COMMIT[:12]}, Apache-2.0, {NOT_VERIFIED}" in first
    assert " MB" in first
    manifest = Bundle.load(folder).manifest
    assert (manifest.source.name, manifest.source.revision, manifest.source.license) == (HUB_ID, COMMIT, "Apache-2.0")
    assert (manifest.name, manifest.recipe, manifest.graphs["decoder_model_merged"].file) == (NAME, "int4", DECODER)
    assert not {"README.md", "pytorch_model.bin", "onnx/decoder_model_merged.onnx"} & tree(folder)
    assert not any(path.startswith(".") for path in tree(folder))
    assert not any((data_dir / "pulling").glob("*@*@*"))


def test_one_command_fetches_and_answers_and_the_next_needs_no_hub(hub: Hub, data_dir: Path) -> None:
    command = ("infer", PICTURE, QUESTION, "--model", NAME)
    first = nearfar(*command, **environment(hub, data_dir))
    assert (first.returncode, first.stdout.strip()) == (0, "red"), first.stderr
    assert "no terminal to ask" in first.stderr
    asked = len(hub.requests)
    again = nearfar(*command, "--offline", **environment(hub, data_dir))
    assert (again.returncode, again.stdout.strip()) == (0, "red"), again.stderr
    assert len(hub.requests) == asked
    row = next(
        row
        for row in json.loads(nearfar("models", "--json", **environment(hub, data_dir)).stdout)["catalog"]
        if row["name"] == NAME
    )
    assert row["installed"][0]["revision"] == COMMIT


def test_the_alias_fetches_what_it_stands_for_and_says_so(hub: Hub, data_dir: Path) -> None:
    run = nearfar("infer", PICTURE, QUESTION, "--model", "smolvlm2-turbo", "--json", **environment(hub, data_dir))
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert (answer["text"], answer["target"]) == ("red", f"local/{NAME}@int4")
    assert "SmolVLM2 Turbo" in answer["notice"]
    assert "SmolVLM2 Turbo" in run.stderr.splitlines()[0]


def test_no_token_and_no_cookie_leave_unless_one_is_given(hub: Hub, data_dir: Path) -> None:
    stored = data_dir / "hf" / "token"
    stored.parent.mkdir(parents=True)
    stored.write_text("hf_stored")
    assert pull(hub, data_dir, NAME).returncode == 0
    assert not any({"authorization", "cookie"} & set(headers) for headers in hub.headers)
    nearfar("pull", NAME, "--recipe", "fp32", HF_TOKEN="hf_given", **environment(hub, data_dir))
    assert hub.headers[-1]["authorization"] == "Bearer hf_given"


def test_a_cut_connection_goes_on_where_it_was(hub: Hub, data_dir: Path) -> None:
    hub.repositories[HUB_ID] = {"config.json": b"{}", "model.safetensors": LARGE_WEIGHTS}
    hub.cut_after = 30 * 2**20
    run = pull(hub, data_dir, NAME, "--checkpoint")
    assert run.returncode == 0, run.stderr
    assert [asked for method, _, asked in hub.requests if asked and method == "GET"] == [f"bytes={hub.cut_after}-"]


def test_a_killed_pull_leaves_nothing_in_place_and_the_next_goes_on(hub: Hub, data_dir: Path) -> None:
    hub.repositories[HUB_ID] = {"config.json": b"{}", "model.safetensors": LARGE_WEIGHTS}
    hub.hold.clear()
    with start(hub, data_dir, NAME, "--checkpoint") as process:
        try:
            wait_for(lambda: any(map(has_begun, (data_dir / "pulling").rglob("*.incomplete"))))
        finally:
            process.send_signal(signal.SIGKILL)
    assert not (data_dir / "checkpoints").exists()
    hub.hold.set()
    run = pull(hub, data_dir, NAME, "--checkpoint")
    assert run.returncode == 0, run.stderr
    assert [asked for method, _, asked in hub.requests if asked and method == "GET"]
    assert (data_dir / "checkpoints" / f"{NAME}@{COMMIT}" / "model.safetensors").read_bytes() == LARGE_WEIGHTS


def test_offline_takes_what_is_there_and_asks_nobody(hub: Hub, data_dir: Path) -> None:
    assert_fails(pull(hub, data_dir, NAME, "--offline"), 1, "not on this machine", "--offline")
    assert not hub.requests
    assert pull(hub, data_dir, NAME).returncode == 0
    asked = len(hub.requests)
    assert pull(hub, data_dir, NAME, "--offline").stdout.strip() == str(data_dir / "models" / f"{NAME}@int4")
    assert len(hub.requests) == asked


def test_two_pulls_at_once_fetch_once(hub: Hub, data_dir: Path) -> None:
    hub.hold.clear()
    both = [start(hub, data_dir, NAME) for _ in range(2)]
    wait_for(lambda: sum(path.endswith(HUB_ID) for _, path, _ in hub.requests) == 2)
    hub.hold.set()
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert hub.sent[DECODER] == len(hub.repositories[HUB_ID][DECODER])


def test_another_revision_takes_the_place_of_the_old_one(hub: Hub, data_dir: Path) -> None:
    assert pull(hub, data_dir, NAME).returncode == 0
    folder = data_dir / "models" / f"{NAME}@int4"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["source"]["revision"] = "0" * 40
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert pull(hub, data_dir, NAME).returncode == 0
    assert Bundle.read(folder).manifest.source.revision == "0" * 40  # what is there stays, unless asked otherwise
    assert pull(hub, data_dir, NAME, "--revision", "main").returncode == 0
    assert Bundle.load(folder).manifest.source.revision == COMMIT


def test_a_file_that_does_not_match_its_hash_is_refused(hub: Hub, data_dir: Path) -> None:
    right = hub.repositories[HUB_ID][DECODER]
    hub.served_instead[DECODER] = right[:-1] + b"!"
    assert_pull_fails(hub, data_dir, "does not match its hash", DECODER)
    hub.served_instead.clear()
    assert pull(hub, data_dir, NAME).returncode == 0


def test_a_small_file_is_checked_too(hub: Hub, data_dir: Path) -> None:
    hub.served_instead["config.json"] = b"{}"
    assert_pull_fails(hub, data_dir, "does not match its hash", "config.json")


def test_a_truncated_file_is_refused(hub: Hub, data_dir: Path) -> None:
    hub.served_instead[DECODER] = hub.repositories[HUB_ID][DECODER][:-1000]
    assert_pull_fails(hub, data_dir, DECODER)


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(hub: Hub, data_dir: Path) -> None:
    hub.listed_bytes[DECODER] = 10**15
    assert_pull_fails(hub, data_dir, "needs 2000000.0 GB", "free")
    assert not hub.sent


def test_a_data_folder_that_cannot_be_made_is_one_line(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = pull(hub, tmp_path / "file" / "data", NAME)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].endswith("Not a directory")
    assert "Traceback" not in run.stderr


def test_a_full_disk_is_one_line_and_leaves_no_model(hub: Hub, data_dir: Path) -> None:
    limited = ["sh", "-c", 'ulimit -f 2000; exec "$0" "$@"', sys.executable, "-m", "serving.cli", "pull", NAME]
    full = {**os.environ, **environment(hub, data_dir)}
    run = subprocess.run(limited, capture_output=True, text=True, timeout=100, check=False, env=full)
    assert run.returncode == 1, run.stderr
    assert "File too large" in run.stderr.strip().splitlines()[-1]
    assert "Traceback" not in run.stderr
    assert_nothing_usable(data_dir)
    assert pull(hub, data_dir, NAME).returncode == 0


def test_a_hub_out_of_reach_is_one_line(hub: Hub, data_dir: Path) -> None:
    hub.url = "http://127.0.0.1:9"
    assert_pull_fails(hub, data_dir, "cannot be reached", hub.url)
    offline = environment(hub, data_dir) | {"HF_HUB_OFFLINE": "1"}
    assert_fails(nearfar("pull", NAME, **offline), 1, "HF_HUB_OFFLINE")


def test_names_and_revisions_that_do_not_exist(hub: Hub, data_dir: Path) -> None:
    assert_fails(pull(hub, data_dir, "smolvlm2-501m"), 1, "did you mean", NAME)
    assert_fails(pull(hub, data_dir, NAME, "--recipe", "int3"), 2, "int3", "int4")
    assert_fails(pull(hub, data_dir, NAME, "--revision", "no-such"), 1, "revision", "no-such")
    assert_fails(pull(hub, data_dir, "smolvlm2-256m"), 1, "smolvlm2-256m".upper()[-4:])
    assert_fails(pull(hub, data_dir, "tiny-scenes"), 1, "embedded")
    assert_nothing_usable(data_dir)


@pytest.mark.parametrize(
    "name", ["../outside.json", "/etc/outside.json", "onnx/../../outside.onnx", "onnx\\outside.onnx"]
)
def test_a_listed_name_that_leaves_the_folder_refuses_the_whole_model(hub: Hub, data_dir: Path, name: str) -> None:
    hub.repositories[HUB_ID][name] = b"{}"
    assert_pull_fails(hub, data_dir, "would leave")
    assert not hub.sent


def test_pickles_are_neither_fetched_nor_opened(hub: Hub, data_dir: Path) -> None:
    pickled = b"\x80\x04cposix\nsystem\n"
    hub.repositories[HUB_ID] = {"config.json": b"{}", "pytorch_model.bin": pickled}
    assert_pull_fails(hub, data_dir, "neither ONNX files")
    hub.repositories[HUB_ID] = {"config.json": b"{}", "model.safetensors": pickled}
    assert_pull_fails(hub, data_dir, "model.safetensors", "pickle")
    hub.repositories[HUB_ID] = published_files(**{DECODER: pickled})
    assert_pull_fails(hub, data_dir, DECODER, "pickle")
    assert not tree(data_dir / "pulling") - {f"{NAME}@int4.lock", f"{NAME}@{COMMIT}.lock"}


def test_what_is_no_model_after_all_is_not_kept(hub: Hub, data_dir: Path) -> None:
    hub.repositories[HUB_ID] = published_files(**{DECODER: b"\x08\x07 no graph at all"})
    assert_pull_fails(hub, data_dir, "does not run")
    assert not list((data_dir / "pulling").glob("*@*@*"))


def test_a_checkpoint_without_onnx_files_is_fetched_for_the_export(hub: Hub, data_dir: Path) -> None:
    hub.repositories[HUB_ID] = {
        "config.json": b"{}",
        "model.safetensors": b"\x08" + bytes(100),
        "optimizer.pt": b"\x80",
    }
    run = pull(hub, data_dir, NAME, "--checkpoint")
    assert run.returncode == 0, run.stderr
    folder = data_dir / "checkpoints" / f"{NAME}@{COMMIT}"
    assert run.stdout.strip() == str(folder)
    assert tree(folder) == {"config.json", "model.safetensors"}


@pytest.mark.slow
def test_a_model_without_onnx_files_is_exported_from_its_checkpoint_and_answers(hub: Hub, data_dir: Path) -> None:
    checkpoint = BUNDLES["tiny-scenes@int8"].parents[1] / "checkpoint"
    hub.repositories[str(ROWS["smolvlm2-2.2b"].hub_id)] = contents(checkpoint)
    command = ("infer", PICTURE, QUESTION, "--model", "smolvlm-3b@int8", "--json")
    run = nearfar(*command, **environment(hub, data_dir))
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert (answer["text"], answer["target"]) == ("red", "local/smolvlm2-2.2b@int8")
    assert "No published checkpoint is called SmolVLM-3B" in run.stderr
    source = Bundle.load(data_dir / "models" / "smolvlm2-2.2b@int8").manifest.source
    assert (source.name, source.revision) == (ROWS["smolvlm2-2.2b"].hub_id, COMMIT)


@pytest.mark.slow
def test_an_exact_shape_checkpoint_comes_whole(hub: Hub, data_dir: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    subprocess.run([sys.executable, "-m", "export.exact_shapes", "smolvlm2-256m", str(made)], check=True)
    hub.repositories[HUB_ID] = contents(made)
    run = pull(hub, data_dir, NAME, "--checkpoint")
    assert run.returncode == 0, run.stderr
    fetched = contents(data_dir / "checkpoints" / f"{NAME}@{COMMIT}")
    assert sum(map(len, fetched.values())) > 2 * ROWS["smolvlm2-256m"].shape.parameters
    assert fetched == {name: content for name, content in hub.repositories[HUB_ID].items() if name in fetched}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_running_service_fetches_a_model_and_serves_it(hub: Hub, data_dir: Path, red_circle_url: str) -> None:
    with service_with(hub, data_dir) as url, httpx2.Client(base_url=url, timeout=60, trust_env=False) as client:
        assert client.post("/models/no-such/pull").status_code == 404
        assert client.post("/models/tiny-scenes/pull").status_code == 400
        assert client.post(f"/models/{NAME}/pull", headers={"origin": "http://elsewhere"}).status_code == 403
        hub.hold.clear()
        started = client.post(f"/models/{NAME}/pull")
        assert (started.status_code, started.json()["pulling"]["state"]) == (202, "fetching")
        assert client.post("/models/smolvlm2-256m/pull").status_code == 429
        hub.hold.set()
        wait_for(lambda: client.get("/models").json()["pulling"]["state"] in ("done", "failed"))
        pulling = client.get("/models").json()["pulling"]
        assert (pulling["state"], pulling["error"]) == ("done", None)
        assert pulling["bytes"] == pulling["total_bytes"] > 1e6
        names = [target["name"] for target in client.get("/targets").json()["targets"]]
        assert names == ["local/tiny-scenes@int8", "local/tiny-scenes@fp32", f"local/{NAME}@int4"]
        body = {"prompt": QUESTION, "images": [red_circle_url], "model": "smolvlm2-turbo"}
        assert client.post("/infer", json=body).json()["text"] == "red"
        hub.repositories.clear()
        client.post("/models/smolvlm2-256m/pull")
        wait_for(lambda: client.get("/models").json()["pulling"]["state"] == "failed")
        assert "the hub has no" in client.get("/models").json()["pulling"]["error"]


def test_an_offline_service_fetches_nothing(client: httpx2.Client, data_dir: Path) -> None:
    with running(offline=True, data_dir=data_dir, models=("tiny-scenes",)) as service:
        answer = service.ready().client.post(f"/models/{NAME}/pull")
    assert answer.status_code == 403


def test_a_service_that_is_stopped_does_not_wait_for_a_fetch(hub: Hub, data_dir: Path) -> None:
    hub.hold.clear()
    with service_with(hub, data_dir) as url:
        httpx2.post(f"{url}/models/{NAME}/pull", trust_env=False)
        wait_for(lambda: any(path.endswith(".onnx") for _, path, _ in hub.requests))
    assert_nothing_usable(data_dir)  # service_with has seen it end with status 0 in time


@contextmanager
def service_with(hub: Hub, data_dir: Path) -> Iterator[str]:
    """`nearfar serve` as its own process: the library reads HF_ENDPOINT when it is imported. Ends with status 0."""
    port = free_port()
    command = [sys.executable, "-m", "serving.cli", "serve", "--port", str(port)]
    with subprocess.Popen(
        command, env={**os.environ, **environment(hub, data_dir)}, stderr=subprocess.DEVNULL
    ) as process:
        try:
            poll(f"http://127.0.0.1:{port}/ready", 200)
            yield f"http://127.0.0.1:{port}"
            process.terminate()
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def assert_pull_fails(hub: Hub, data_dir: Path, *words: str) -> None:
    run = pull(hub, data_dir, NAME)
    assert run.returncode == 1, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("nearfar: ")
    assert all(word in last for word in words), last
    assert "Traceback" not in run.stderr
    assert_nothing_usable(data_dir)


def without_output_weights(decoder: bytes) -> bytes:
    """The fp32 decoder with zeros for its last matrix: every token is as likely as any other."""
    checkpoint = (Path(BUNDLES["tiny-scenes@fp32"]).parents[1] / "checkpoint" / "model.safetensors").read_bytes()
    size = int.from_bytes(checkpoint[:8], "little")
    header = json.loads(checkpoint[8 : 8 + size])
    name = "lm_head.weight" if "lm_head.weight" in header else "model.text_model.embed_tokens.weight"
    begin, end = header[name]["data_offsets"]
    matrix = np.frombuffer(checkpoint[8 + size + begin : 8 + size + end], np.float32).reshape(header[name]["shape"])
    weights = matrix.T.tobytes()
    assert weights in decoder
    return decoder.replace(weights, bytes(len(weights)))


def test_a_model_that_fails_its_check_is_removed_and_a_safer_recipe_taken(hub: Hub, data_dir: Path) -> None:
    good = hub.repositories[HUB_ID]
    plain = {graph: good[f"onnx/{graph}.onnx"] for graph in ("vision_encoder", "embed_tokens", "decoder_model_merged")}
    halves = {f"onnx/{graph}_fp16.onnx": content for graph, content in plain.items()}
    bad = without_output_weights(plain["decoder_model_merged"])
    hub.repositories[HUB_ID] = {**good, **halves, DECODER: bad}
    run = pull(hub, data_dir, NAME)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(data_dir / "models" / f"{NAME}@fp16")
    assert f"local/{NAME}@int4: not random: mean entropy is 1.00" in run.stderr
    assert "it was removed, and fp16 is taken instead" in run.stderr
    assert [folder.name for folder in (data_dir / "models").iterdir()] == [f"{NAME}@fp16"]


def test_where_no_recipe_is_safer_a_model_that_fails_is_one_line_and_gone(hub: Hub, data_dir: Path) -> None:
    good = hub.repositories[HUB_ID]
    plain = "onnx/decoder_model_merged.onnx"
    hub.repositories[HUB_ID] = {**good, plain: without_output_weights(good[plain])}
    run = pull(hub, data_dir, NAME, "--recipe", "fp32")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].endswith("it was removed, and no recipe is safer")
    assert_nothing_usable(data_dir)
