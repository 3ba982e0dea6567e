"""Records in SQLite and in a real PostgreSQL: kept whole or not at all, found, bounded, gone when deleted."""

from __future__ import annotations

import io
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import URL, create_engine, inspect

from comparisons import schema
from comparisons.database import database_url
from comparisons.records import ArmRecord, InputRecord, Record, input_record
from comparisons.results import TimedEvent
from comparisons.store import Filter, Retention, Store
from models.errors import InvalidValue, NearfarError, Unavailable
from models.request import question
from tests.postgres import PASSWORD, postgres

ROOT = Path(__file__).resolve().parents[2]
SECRET = "zebra-crossing-4711"
INT8, FP32 = "local/tiny-scenes@int8", "local/tiny-scenes@fp32"


@pytest.fixture(scope="module")
def postgres_address() -> Iterator[str]:
    with postgres() as address:
        yield address


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    """An empty database."""
    if request.param == "sqlite":
        return database_url(None, tmp_path / "data")
    return emptied(request.getfixturevalue("postgres_address"))


def emptied(address: str) -> URL:
    """PostgreSQL as it was made."""
    url = database_url(address, Path())
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    engine.dispose()
    return url


@pytest.fixture
def store(url: URL) -> Iterator[Store]:
    opened = Store(url)
    yield opened
    opened.close()


def photo(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = SECRET  # a description, as cameras and editors write one
    Image.new("RGB", (640, 320), colour).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


def asked(*, keep: bool = False, prompt: str = f"What is {SECRET}?") -> InputRecord:
    return input_record(question(prompt, (photo(),)), keep=keep)


ASKED = asked()


def record(number: int, *, text: str = "red", arms: dict[str, bool | None] | None = None, **changes: Any) -> Record:
    """A made-up record of that number, made at that second."""
    results = {
        target: {
            "ok": True,
            "target": target,
            "text": text,
            "correct": right,
            "confidence": 0.75,
            "usage": {"prompt_tokens": 5},
        }
        for target, right in (arms or {INT8: True, FP32: None}).items()
    }
    events = (TimedEvent(at_ms=1.25, kind="delta", text=text), TimedEvent(at_ms=2.0, kind="finished"))
    values: dict[str, Any] = {
        "record_id": f"cmp_{number:04}",
        "created_at": float(number),
        "owner": "",
        "task": "vqa",
        "input": ASKED,
        "settings": {"max_tokens": 9},
        "reference": "red",
        "arms": tuple(
            ArmRecord(target=target, result=result, events=events, versions={"model": "m1"})
            for target, result in results.items()
        ),
        "tradeoff": {"baseline": INT8},
        "verdict": {"choice": "undecided"},
    }
    return Record(**{**values, **changes})


def ids(store: Store, **where: Any) -> list[str]:
    return [each.record_id for each in store.all(Filter(**where))]


def test_a_record_comes_back_as_it_went(store: Store) -> None:
    kept = record(1, input=asked(keep=True), text="röt \N{SNOWMAN} \x00 'quoted'")
    store.add(kept)
    assert store.get("cmp_0001") == kept
    assert store.get("cmp_0002") is None


def test_without_keeping_inputs_neither_words_nor_bytes_are_in_the_record() -> None:
    plain, kept = asked(), asked(keep=True)
    assert (plain.prompt, plain.files[0].data, plain.is_kept) == (None, None, False)
    assert (kept.prompt, kept.files[0].data, kept.is_kept) == (f"What is {SECRET}?", photo(), True)
    assert plain.sha256 == kept.sha256
    assert asked(prompt="another").sha256 != plain.sha256


def test_the_thumbnail_is_small_and_without_metadata() -> None:
    assert ASKED.thumbnail
    with Image.open(io.BytesIO(ASKED.thumbnail)) as image:
        assert image.size == (128, 64)
        assert not image.getexif()
    assert SECRET.encode() not in ASKED.thumbnail
    assert SECRET.encode() in photo()


@pytest.mark.parametrize("picture", [b"no picture", photo()[:100]])
def test_what_cannot_be_decoded_has_no_thumbnail(picture: bytes) -> None:
    assert input_record(question("?", (picture,)), keep=False).thumbnail is None


def test_records_are_found_by_what_is_said_of_them(store: Store) -> None:
    store.add(record(1, owner="anna", arms={INT8: True, FP32: False}))
    store.add(record(2, owner="ben", task="ocr", arms={INT8: False}))
    store.add(record(3, owner="anna", arms={FP32: True}, input=asked(prompt="other")))
    assert ids(store) == ["cmp_0003", "cmp_0002", "cmp_0001"]
    assert ids(store, owner="anna") == ["cmp_0003", "cmp_0001"]
    assert ids(store, target=INT8) == ["cmp_0002", "cmp_0001"]
    assert ids(store, target=INT8, correct=True) == ["cmp_0001"]
    assert ids(store, correct=False) == ["cmp_0002", "cmp_0001"]
    assert ids(store, task="ocr") == ["cmp_0002"]
    assert ids(store, since=2.0, until=3.0) == ["cmp_0002"]
    assert ids(store, input_sha256=ASKED.sha256) == ["cmp_0002", "cmp_0001"]
    assert store.get("cmp_0001", owner="ben") is None


def test_pages_hold_every_record_once_also_those_of_one_moment(store: Store) -> None:
    for number in range(7):
        store.add(record(number, created_at=5.0 if number % 2 else 6.1))
    seen: list[str] = []
    cursor = None
    while True:
        page = store.page(Filter(), limit=2, cursor=cursor)
        seen += [each.record_id for each in page.records]
        cursor = page.next
        if cursor is None:
            break
    assert len(seen) == 7
    assert set(seen) == set(ids(store))


@pytest.mark.parametrize("cursor", ["nonsense", "/", "x/cmp_1", "nan/cmp_1", "inf/cmp_1"])
def test_a_cursor_that_no_page_gave_is_refused(store: Store, cursor: str) -> None:
    with pytest.raises(InvalidValue):
        store.page(Filter(), limit=2, cursor=cursor)


def bytes_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


def test_a_deleted_record_is_in_none_of_sqlites_files(tmp_path: Path) -> None:
    store = Store(database_url(None, tmp_path))
    for number in range(20):
        store.add(record(number, input=asked(keep=True), text=SECRET if number % 2 else "plain"))
    before = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert SECRET.encode() in bytes_of(tmp_path)
    assert store.delete(Filter(ids=tuple(f"cmp_{number:04}" for number in range(20)))) == 20
    assert SECRET.encode() not in bytes_of(tmp_path)
    assert photo()[100:200] not in bytes_of(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < before / 4
    store.close()


def test_in_postgresql_a_deleted_record_leaves_the_tables_files(postgres_address: str) -> None:
    url = emptied(postgres_address)
    engine = create_engine(url)
    store = Store(url)

    def size() -> int:
        with engine.connect() as connection:
            found = "SELECT pg_total_relation_size('arms') + pg_total_relation_size('files')"
            return int(connection.exec_driver_sql(found).scalar_one())

    empty = size()
    for number in range(20):
        store.add(record(number, input=asked(keep=True), text="word " * 2000))
    assert size() > empty
    assert store.delete(Filter()) == 20
    assert size() == empty
    store.close()
    engine.dispose()


def test_in_postgresql_without_an_encoding_a_record_comes_back_as_it_went(postgres_address: str) -> None:
    url = database_url(postgres_address, Path())
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:  # as initdb makes it where no locale is set
        connection.exec_driver_sql("CREATE DATABASE plain TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    engine.dispose()
    store = Store(url.set(database="plain"))
    kept = record(1, text="größer als 3 €")
    store.add(kept)
    assert store.get("cmp_0001") == kept
    store.close()


def test_deletion_says_how_many_there_were_and_leaves_the_others(store: Store) -> None:
    for number in range(4):
        store.add(record(number, owner="anna" if number else "ben"))
    assert store.delete(Filter(ids=("cmp_0000", "cmp_0001"), owner="anna")) == 1
    assert store.delete(Filter(ids=("cmp_0000", "cmp_0001"), owner="anna")) == 0
    assert ids(store) == ["cmp_0003", "cmp_0002", "cmp_0000"]


def test_what_is_too_old_goes(url: URL) -> None:
    now = 100.0
    store = Store(url, retention=Retention(max_age_s=50), clock=lambda: now)
    for number in (10, 49, 50, 90):
        store.add(record(number))
    store.retain()
    assert ids(store) == ["cmp_0090", "cmp_0050"]
    store.close()


def test_of_what_is_too_much_the_oldest_go(url: URL) -> None:
    store = Store(url, retention=Retention(max_bytes=20_000))
    for number in range(40):
        store.add(record(number))
    store.retain()
    left = ids(store)
    assert 3 < len(left) < 20
    assert left == [f"cmp_{number:04}" for number in range(39, 39 - len(left), -1)]
    assert store.retain() == 0
    store.close()


def test_a_record_is_kept_where_old_ones_cannot_be_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(Store):
        def retain(self) -> int:
            raise Unavailable("another process holds the records")

    store = Stuck(database_url(None, tmp_path))
    store.add(record(1))
    assert ids(store) == ["cmp_0001"]
    assert "old records stay for another hour: another process holds the records" in caplog.text
    store.close()


def test_the_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = Store(database_url(None, tmp_path / "data"))
        store.add(record(1))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "data").iterdir()}
    assert modes == dict.fromkeys(("records.sqlite3", "records.sqlite3-wal", "records.sqlite3-shm"), 0o600)
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    store.close()


def test_the_tables_are_those_that_the_steps_make(url: URL) -> None:
    Store(url).close()
    engine = create_engine(url)
    made = inspect(engine)
    for table in schema.metadata.tables.values():
        found = {column["name"]: column["nullable"] for column in made.get_columns(table.name)}
        assert [*found] == table.columns.keys()
        if url.get_backend_name() == "postgresql":
            assert found == {column.name: column.nullable for column in table.columns}
    engine.dispose()


LATER = (*schema.STEPS, ("ALTER TABLE comparisons ADD COLUMN note TEXT", "CREATE TABLE notes (id INTEGER)"))


def test_an_older_database_is_brought_up_to_date_with_its_records(url: URL) -> None:
    old = Store(url)
    old.add(record(1))
    old.close()
    new = Store(url, steps=LATER)
    assert ids(new) == ["cmp_0001"]
    new.add(record(2))
    new.close()
    again = Store(url, steps=LATER)
    assert ids(again) == ["cmp_0002", "cmp_0001"]
    again.close()


def test_a_newer_database_is_left_alone(url: URL) -> None:
    Store(url, steps=LATER).close()
    with pytest.raises(
        Unavailable, match=f"newer nearfar: their version is {len(LATER)}, this release knows {len(schema.STEPS)}"
    ):
        Store(url)


def test_a_step_that_fails_leaves_the_old_version(url: URL) -> None:
    old = Store(url)
    old.add(record(1))
    broken = (*schema.STEPS, ("ALTER TABLE comparisons ADD COLUMN note TEXT", "CREATE TABLE comparisons (id TEXT)"))
    with pytest.raises(Unavailable):
        Store(url, steps=broken)
    assert ids(old) == ["cmp_0001"]
    old.close()
    again = Store(url)
    assert ids(again) == ["cmp_0001"]
    again.close()


def test_several_that_open_an_empty_database_at_once_all_can(url: URL) -> None:
    failures: list[NearfarError] = []

    def open_it() -> None:
        try:
            Store(url).close()
        except NearfarError as error:
            failures.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


WRITER = """
import sys
from pathlib import Path
from comparisons.database import database_url
from comparisons.store import Store
from tests.comparisons.test_store import record
store = Store(database_url(sys.argv[1] or None, Path(sys.argv[2])))
for number in range(int(sys.argv[3]), int(sys.argv[4])):
    store.add(record(number, text="word " * 2000))
    print(number, flush=True)
"""


def writer(url: URL, first: int, last: int) -> subprocess.Popen[str]:
    """Another process that adds those records, and says each number once it is kept."""
    where = ["", str(Path(url.database or "").parent)] if url.get_backend_name() == "sqlite" else [shown(url), "."]
    command = [sys.executable, "-c", WRITER, *where, str(first), str(last)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def shown(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def test_two_processes_write_at_once_and_lose_nothing(url: URL) -> None:
    both = [writer(url, first, first + 60) for first in (0, 1000)]
    for process in both:
        process.communicate()
        assert process.returncode == 0
    store = Store(url)
    assert set(ids(store)) == {f"cmp_{number:04}" for first in (0, 1000) for number in range(first, first + 60)}
    store.close()


def test_a_writer_that_is_killed_leaves_whole_records_and_all_that_it_told_of(url: URL) -> None:
    process = writer(url, 0, 100_000)
    assert process.stdout
    told = [int(process.stdout.readline()) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    told += [int(line) for line in process.communicate()[0].splitlines()]
    store = Store(url)
    found = list(store.all(Filter()))
    assert {f"cmp_{number:04}" for number in told} <= {each.record_id for each in found}
    assert all(each == record(int(each.created_at), text="word " * 2000) for each in found)
    store.add(record(999_999))
    store.close()


def test_a_full_disk_refuses_new_records_and_old_ones_are_read(tmp_path: Path) -> None:
    url = database_url(None, tmp_path)
    store = Store(url)
    store.add(record(1))
    with store._engine.connect() as connection:  # SQLite's own bound: its error is that of a full disk
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(Unavailable, match="the records cannot be written: database or disk is full"):
        store.add(record(2, text="long " * 10_000))
    assert ids(store) == ["cmp_0001"]
    store.close()


def test_a_locked_database_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comparisons.database.LOCKED_S", 0.1)
    store = Store(database_url(None, tmp_path))
    other = sqlite3.connect(tmp_path / "records.sqlite3")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="the records cannot be written: database is locked"):
        store.add(record(1))
    assert ids(store) == []
    other.rollback()
    other.close()
    store.add(record(1))
    store.close()


def test_a_file_that_is_no_database_is_one_clear_error_and_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "records.sqlite3").write_bytes(b"a file of somebody else's " * 100)
    with pytest.raises(Unavailable, match="file is not a database"):
        Store(database_url(None, tmp_path))
    assert (tmp_path / "records.sqlite3").read_bytes() == b"a file of somebody else's " * 100


def test_a_database_that_does_not_answer_tells_neither_password_nor_host(
    caplog: pytest.LogCaptureFixture, postgres_address: str
) -> None:
    for address in (
        f"postgresql://tester:{PASSWORD}@127.0.0.1:9/x",
        postgres_address.replace(PASSWORD, f"{SECRET}-wrong"),
    ):
        with pytest.raises(Unavailable) as raised:
            Store(database_url(address, Path()))
        assert raised.value.message == "the records cannot be read: the database does not answer; the log says how"
    assert "127.0.0.1" in caplog.text
    assert PASSWORD not in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("text", ["mysql://x/y", "nonsense", "sqlite://", "http://x"])
def test_an_address_of_another_kind_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="postgresql://USER@HOST/NAME"):
        database_url(text, tmp_path)
