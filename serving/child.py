"""A nearfar service as a child process on loopback, for the demo and the bench, and a plain way to ask it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import IO, Any, NoReturn

from models.errors import Unavailable

READY_WITHIN_S = 300.0  # on two busy cores a model of 2.2B was read, checked and warmed in more than one minute
# Loopback only, whatever proxy the environment names.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def child_service(
    *options: str, port: int = 0, settings: Mapping[str, str] | None = None, output: IO[bytes] | None = None
) -> Iterator[str]:
    """A ready `nearfar serve` with those options and settings; yields its address and ends it. Raises Unavailable.

    `output` gets what it writes. Of the user's NEARFAR_ settings it gets the data folder alone, and no provider keys.
    For the main thread: SIGTERM is turned into SystemExit meanwhile, so that no child outlives its parent.
    """
    port = port or free_port()
    own = "NEARFAR_DATA_DIR"
    kept = {name: value for name, value in os.environ.items() if name == own or not name.startswith("NEARFAR_")}
    environment = {name: value for name, value in kept.items() if not name.endswith("_API_KEY")}
    environment["NEARFAR_CONFIG"] = os.devnull  # nor a nearfar.toml that happens to lie here
    environment |= settings or {}
    command = [sys.executable, "-m", "serving.cli", "serve", "--port", str(port), *options]
    before = signal.signal(signal.SIGTERM, _leave)
    # A file, not a pipe: nobody reads along, and a full pipe would stop the service.
    with nullcontext(output) if output else tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_ready(address, process, log)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            signal.signal(signal.SIGTERM, before)


def _leave(_signal: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def free_port() -> int:
    """A loopback port that was free a moment ago, and that the system gives to nobody else for a minute.

    It was the end of a connection that was closed there first: such a port is left alone, except by a server that asks
    for it by its number, as servers do (SO_REUSEADDR).
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
        with socket.create_connection(("127.0.0.1", port)):
            probe.accept()[0].close()
        return port


def _wait_until_ready(address: str, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    reason = "no answer"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise Unavailable(f"the service ended with status {process.returncode}: {lines[-1]}")
        try:
            with OPENER.open(f"{address}/ready", timeout=5) as response:
                if response.status == 200:
                    return
        except OSError as error:
            reason = str(error)
        time.sleep(0.05)
    raise Unavailable(f"the service was not ready within {READY_WITHIN_S:g} s: {reason}")


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST JSON, read JSON. Raises Unavailable with the service's own message."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
    answer: dict[str, Any] = json.loads(_read(url, request))
    return answer


def get(url: str) -> str:
    """GET a text. Raises Unavailable with the service's own message."""
    return _read(url, urllib.request.Request(url)).decode()


def _read(url: str, request: urllib.request.Request) -> bytes:
    try:
        with OPENER.open(request, timeout=60) as response:
            content: bytes = response.read()
            return content
    except urllib.error.HTTPError as error:
        raise Unavailable(f"{url}: {error.status} {error.read().decode(errors='replace')[:300]}") from error
    except OSError as error:
        raise Unavailable(f"{url}: {error}") from error
