"""A PostgreSQL of one's own: made in a temporary folder, listening on loopback with a password, gone afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving.child import free_port

PASSWORD = "not-a-secret-of-anybody"


def programs() -> Path | None:
    """The folder of `initdb` and `postgres`; Debian keeps them off PATH."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *filter(None, [shutil.which("initdb")])]
    return Path(found[0]).parent if found else None


@dataclass(kw_only=True)
class Postgres:
    """The server's process, which can be ended and begun again over the same data."""

    folder: Path
    home: Path
    user: str
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"postgresql://tester:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": self.home}
        options |= {"fsync": "off"}
        serve = [
            self.folder / "postgres",
            "-D",
            self.home / "data",
            *(f"--{n}={value}" for n, value in options.items()),
        ]
        with (self.home / "log").open("a") as log:
            self.process = subprocess.Popen(serve, user=self.user, cwd=self.home, stdout=log, stderr=log)
        wait_until_it_answers(self.folder, self.port, self.home / "log")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT cuts all connections, SIGQUIT does so without any order."""
        if self.process:
            self.process.send_signal(how)
            self.process.wait(timeout=20)
            self.process = None


@contextmanager
def postgres() -> Iterator[str]:
    """Its address, as the setting `database` takes it."""
    with postgres_server() as server:
        yield server.address


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """A running one. Skips where it is not installed; `make test` installs it."""
    folder = programs()
    if folder is None:
        pytest.skip("postgresql is not installed")
    # It refuses to run as root, and another user may not enter pytest's own folders.
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    home = Path(tempfile.mkdtemp(prefix="nearfar-postgres-"))
    port = free_port()
    try:
        (home / "password").write_text(PASSWORD)
        for path in (home, home / "password"):
            shutil.chown(path, user)
        make = [folder / "initdb", "-D", home / "data", "-U", "tester", "--auth=scram-sha-256", "--no-sync"]
        run = subprocess.run(
            [*make, "--pwfile", home / "password"], user=user, cwd=home, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        server = Postgres(folder=folder, home=home, user=user, port=port)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def wait_until_it_answers(folder: Path, port: int, log: Path) -> None:
    deadline = time.monotonic() + 30
    ask = [folder / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
    while subprocess.run(ask, check=False).returncode:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
