"""What is peculiar to each kind of database: its address, its files, how it locks, how its errors are told."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from models.errors import InvalidValue, Unavailable

LOCKED_S = 10.0  # how long a write waits for another process's
ROOM_BYTES = 8 * 2**20  # free on a disk before a comparison begins
CONNECT_S = 5
UNANSWERED_S = 10  # how long what was sent to PostgreSQL may stay unacknowledged: Linux alone
WRITES = "nearfar_writes"  # option of a connection whose transactions write
log = logging.getLogger("nearfar.store")


def database_url(text: str | None, data_dir: Path) -> URL:
    """The address of the records: SQLite in the data folder, or what was named. Raises InvalidValue."""
    if not text:
        return URL.create("sqlite", database=str(data_dir / "records.sqlite3"))
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise InvalidValue("database: sqlite:///FILE or postgresql://USER@HOST/NAME", param="database") from error
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername == "postgresql+psycopg" or (url.drivername == "sqlite" and url.database):
        return url
    raise InvalidValue("database: sqlite:///FILE or postgresql://USER@HOST/NAME", param="database")


@contextmanager
def told_plainly(verb: str, is_sqlite: bool) -> Iterator[None]:
    """Unavailable in one line: SQLite's own words; PostgreSQL's, which name hosts and users, go to the log alone."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise Unavailable("records in PostgreSQL need psycopg: pip install 'nearfar[postgres]'") from error
    except OSError as error:
        raise Unavailable(f"the records cannot be {verb}: {error.strerror}") from error
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        reason = str(cause)
        if not is_sqlite:
            log.error("the records cannot be %s: %s", verb, reason.strip().replace("\n", " "))
            reason = "the database does not answer; the log says how"
        raise Unavailable(f"the records cannot be {verb}: {reason}") from error


def connect_options(url: URL) -> dict[str, str]:
    """For a driver to connect with: PostgreSQL on a machine that is gone keeps nobody waiting, TCP alone would for
    minutes; and it speaks UTF-8 where it was made without an encoding too. What the address says itself stands.
    """
    if url.get_backend_name() != "postgresql":
        return {}
    options = {
        "connect_timeout": f"{CONNECT_S}",
        "tcp_user_timeout": f"{UNANSWERED_S * 1000}",
        "client_encoding": "utf8",
    }
    return {name: option for name, option in options.items() if name not in url.query}


def check_room(file: Path) -> None:
    """Raises Unavailable where a disk is so full that the next record may not fit: a small write still may."""
    disk = os.statvfs(file.parent)
    if disk.f_bavail * disk.f_frsize < ROOM_BYTES:
        raise Unavailable("the records cannot be written: the disk is full")


def prepare_sqlite(connection: Any, _record: object) -> None:
    """A new connection, as the records want it."""
    connection.isolation_level = None  # or the driver would begin and end transactions as it sees fit
    for setting in (
        f"busy_timeout={int(LOCKED_S * 1000)}",
        "auto_vacuum=INCREMENTAL",  # of a new file alone
        "synchronous=FULL",
        "foreign_keys=ON",
        "secure_delete=ON",
    ):
        connection.execute(f"PRAGMA {setting}").fetchall()
    _until_unlocked(lambda: connection.execute("PRAGMA journal_mode=WAL").fetchall())


def _until_unlocked(change: Callable[[], object]) -> None:
    """SQLite does not wait by itself where several change the mode of a new file at once."""
    deadline = time.monotonic() + LOCKED_S
    while True:
        try:
            change()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def begin_sqlite(connection: Connection) -> None:
    """Begin a transaction; one that will write says so."""
    # A transaction that reads first and writes later cannot wait for another's end: so it says at once that it writes.
    writes = connection.get_execution_options().get(WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
