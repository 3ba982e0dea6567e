"""`nearfar demo`: the whole path on a fresh machine. Two services on loopback, one question, both answers.

The near side is this machine's int8 model. The far side stands in for a hosted one: a second nearfar process that
serves the fp32 bundle through `/v1/chat/completions`, over real HTTP, and is labelled as what it is.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from models.errors import Unavailable
from serving.settings import embedded_bundles
from serving.tables import comparison_table, results_table

READY_WITHIN_S = 60.0
SAMPLES = Path(__file__).resolve().parent.parent / "models" / "tiny_scenes" / "samples"
# Loopback only, whatever proxy the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def run_demo(*, keep: bool, port: int, console: Console) -> None:
    """Start both services, ask, print, stop them; with `keep`, go on serving until interrupted."""
    sample = json.loads((SAMPLES / "samples.json").read_text())[0]
    picture = base64.b64encode((SAMPLES / sample["file"]).read_bytes()).decode()
    body = {"prompt": sample["question"], "images": [f"data:image/png;base64,{picture}"]}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with ExitStack() as stack:
        with Progress(*columns, console=console) as progress:
            step = progress.add_task("starting the far side: a second nearfar on loopback, fp32", total=None)
            far = stack.enter_context(service("--model", str(embedded_bundles()["tiny-scenes@fp32"])))
            progress.update(step, description="starting the near side: int8, on this machine")
            near = stack.enter_context(
                service("--endpoint", f"far={far}/v1,tiny-scenes@fp32", *(("--port", str(port)) if port else ()))
            )
            progress.update(step, description="asking /infer")
            answer = post(f"{near}/infer", body)
            progress.update(step, description="asking /compare")
            targets = ["local/tiny-scenes@int8", "far/tiny-scenes@fp32"]
            compared = post(f"{near}/compare", {**body, "targets": targets, "reference": sample["answer"]})
            progress.update(step, description="done")
        console.print(f"\n[bold]POST /infer[/bold]  {sample['file']}: {sample['question']}")
        results_table([answer], console)
        console.print(f"\n[bold]POST /compare[/bold]  right answer: {sample['answer']}")
        comparison_table(compared, console)
        console.print("tiny-scenes is a toy: it knows drawn shapes and numbers, and nothing of photographs.")
        if keep:
            console.print(f"\nserving on {near} until Ctrl-C")
            signal.sigwait({signal.SIGINT, signal.SIGTERM})


@contextmanager
def service(*arguments: str) -> Iterator[str]:
    """A `nearfar serve` process on loopback, ready; yields its address and ends it. Raises Unavailable."""
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    port = int(options.pop("--port", 0)) or free_port()
    flags = [part for option in options.items() for part in option]
    # Without the user's keys and settings: the demo shows the embedded model and sends nothing anywhere.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NEARFAR_")}
    command = [sys.executable, "-m", "serving.cli", "serve", "--port", str(port), *flags]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_ready(address, process)
        yield address
    finally:
        process.terminate()
        try:
            process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(address: str, process: subprocess.Popen[bytes]) -> None:
    """Poll `/ready`. Raises Unavailable when the process has ended or the time is over."""
    deadline = time.monotonic() + READY_WITHIN_S
    reason = "no answer"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Unavailable(f"the service ended with status {process.returncode}: {_last_line(process)}")
        try:
            with _OPENER.open(f"{address}/ready", timeout=5) as response:
                if response.status == 200:
                    return
        except OSError as error:
            reason = str(error)
        time.sleep(0.05)
    raise Unavailable(f"the service was not ready within {READY_WITHIN_S:g} s: {reason}")


def _last_line(process: subprocess.Popen[bytes]) -> str:
    lines = process.stderr.read().decode(errors="replace").strip().splitlines() if process.stderr else []
    return lines[-1] if lines else "it said nothing"


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST JSON, read JSON. Raises Unavailable with the service's own message."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
    try:
        with _OPENER.open(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise Unavailable(f"{url}: {error.status} {error.read().decode(errors='replace')[:300]}") from error
    except OSError as error:
        raise Unavailable(f"{url}: {error}") from error
