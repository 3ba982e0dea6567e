"""A real service on loopback: uvicorn in a thread of the tests, so that they can also look inside."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import psutil
import pytest
import uvicorn
from PIL import Image, ImageDraw

from models.loaded_model import LoadedModel
from models.tiny_scenes import SAMPLES
from serving.app import create_app
from serving.child import child_service
from serving.engine.local import LocalEngine
from serving.services import Services
from serving.settings import Settings


class RunningService:
    """A service in a thread, its address and its insides."""

    def __init__(self, settings: Settings, environment: dict[str, str]) -> None:
        self.app = create_app(settings, environment)
        config = uvicorn.Config(self.app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx2.Client(base_url=self.url, timeout=30, trust_env=False)

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    @property
    def engine(self) -> LocalEngine:
        residents = self.services.residents
        assert residents
        return residents.engine

    def model(self, target: str | None = None) -> LoadedModel:
        """The loaded model of that target, or the first."""
        residents = self.services.residents
        assert residents
        resident = next(each for each in residents.all if target in (None, each.bundle.target))
        assert resident.stay
        assert resident.stay.answerer
        return resident.stay.answerer.model

    def ready(self) -> RunningService:
        wait_for(lambda: self.services.not_ready() is None)
        return self

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(timeout=10)


def wait_for(condition: Any, timeout_s: float = 30.0) -> None:
    """Poll until the condition holds; fails the test when it does not."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not come"
        time.sleep(0.01)


@contextmanager
def running(environment: dict[str, str] | None = None, **settings: Any) -> Iterator[RunningService]:
    service = RunningService(Settings(**settings), environment or {})
    try:
        yield service
    finally:
        service.close()


@pytest.fixture(scope="session")
def service() -> Iterator[RunningService]:
    """The plain service with both embedded recipes; tests leave it as they found it."""
    with running() as started:
        yield started.ready()


@contextmanager
def process(*models: str, **settings: Any) -> Iterator[httpx2.Client]:
    """A client of a service in a process of its own."""
    named = [part for model in models or ("tiny-scenes@int8", "tiny-scenes@fp32") for part in ("--model", model)]
    environment = {f"NEARFAR_{name}".upper(): str(value) for name, value in settings.items()}
    with child_service(*named, settings=environment) as url, httpx2.Client(base_url=url, timeout=30) as client:
        yield client


def server_of(client: httpx2.Client) -> psutil.Process:
    """The process behind that client."""
    return next(child for child in psutil.Process().children() if str(client.base_url.port) in child.cmdline())


@pytest.fixture(scope="session")
def served() -> Iterator[httpx2.Client]:
    """A client of the plain service in a process of its own; tests leave it as they found it."""
    with process() as client:
        yield client


@pytest.fixture
def client(service: RunningService) -> httpx2.Client:
    return service.client


@pytest.fixture(scope="session")
def red_circle() -> bytes:
    return (SAMPLES / "red-circle.png").read_bytes()


@pytest.fixture(scope="session")
def red_circle_url(red_circle: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(red_circle).decode()


def picture(width: int = 128, height: int = 128, mode: str = "RGB", kind: str = "PNG", **options: Any) -> bytes:
    """A red circle on white of that size, mode and format."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).ellipse((width * 0.25, height * 0.25, width * 0.75, height * 0.75), fill=(216, 36, 36))
    stream = io.BytesIO()
    image.convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def events_of(text: str) -> list[tuple[str, str]]:
    """Server-sent events as (event, data)."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((fields.get("event", "message"), fields["data"]))
    return found
