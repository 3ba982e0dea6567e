"""PostgreSQL goes away under load: what needs the records says so, all else goes on, and it heals by itself."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from models.errors import Unavailable
from serving.records import Records
from serving.settings import Settings
from tests.postgres import Postgres, postgres_server
from tests.serving.conftest import running, wait_for

QUESTION = "What color is the circle?"


class Load:
    """Threads that ask without end, and what became of each request: (path, status, type of error, seconds)."""

    def __init__(self, url: str, picture: bytes) -> None:
        self.url, self.picture = url, picture
        self.ended: list[tuple[str, int, str | None, float]] = []
        self._over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        paths = ("/compare", "/compare", "/infer", "/infer")
        threads = [threading.Thread(target=self._ask, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def of(self, path: str, since: int) -> list[tuple[int, str | None]]:
        return [(status, error) for asked, status, error, _ in self.ended[since:] if asked == path]

    def _ask(self, path: str) -> None:
        with httpx2.Client(base_url=self.url, timeout=30, trust_env=False) as client:
            while not self._over.is_set():
                begun = time.monotonic()
                answer = client.post(path, files={"image": self.picture}, data={"prompt": QUESTION})
                error = None if answer.status_code == 200 else answer.json()["error"]["type"]
                self.ended.append((path, answer.status_code, error, time.monotonic() - begun))


@pytest.fixture
def server() -> Iterator[Postgres]:
    with postgres_server() as found:
        yield found


def test_a_database_that_goes_away_under_load_stops_comparisons_alone_and_its_return_is_noticed(
    tmp_path: Path, red_circle: bytes, server: Postgres
) -> None:
    with running(data_dir=tmp_path, database=server.address, models=("tiny-scenes",)) as service:
        load = Load(service.ready().url, red_circle)
        with load.running():
            wait_for(lambda: (200, None) in load.of("/compare", 0))
            server.stop(signal.SIGQUIT)
            gone = len(load.ended) + 4  # what was in hand when it went may have been kept just before
            wait_for(lambda: min(len(load.of(path, gone)) for path in ("/compare", "/infer")) > 10)
            assert set(load.of("/compare", gone)) == {(503, "unavailable")}
            assert set(load.of("/infer", gone)) == {(200, None)}
            server.start()
            back = len(load.ended) + 4
            wait_for(lambda: len(load.of("/compare", back)) > 5)
        assert set(load.of("/compare", back)) == {(200, None)}
    assert {(status, error) for _, status, error, _ in load.ended} == {(200, None), (503, "unavailable")}
    assert set(load.of("/infer", 0)) == {(200, None)}


def test_a_database_that_takes_connections_and_never_answers_keeps_nobody_waiting_for_long(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        records = Records(
            Settings(data_dir=tmp_path, database=f"postgresql://a:b@127.0.0.1:{port}/x?connect_timeout=2")
        )
        begun = time.monotonic()
        with pytest.raises(Unavailable, match="the database does not answer"):
            records.store()
        assert time.monotonic() - begun < 20
