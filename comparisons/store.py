"""Where comparisons are kept: SQLite in the data folder, or PostgreSQL by its address. Blocks; any thread may call it.

A record is written in one transaction: after a crash it is there, or it is not. Several processes may share a store.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    and_,
    create_engine,
    delete,
    event,
    func,
    insert,
    not_,
    or_,
    select,
    update,
)

from comparisons import schema
from comparisons.database import (
    WRITES,
    begin_sqlite,
    check_room,
    connect_options,
    prepare_sqlite,
    told_plainly,
)
from comparisons.records import ArmRecord, Cast, Record, Told
from models.errors import InvalidValue, Unavailable
from models.files import make_private
from models.request import Task

RETENTION_EVERY_S = 3600.0
KEPT_SHARE = 0.9  # of the bound in bytes, once it was passed: so that not every record pays for another's removal
MAX_PAGE = 200
NEWEST_RESULTS = 20_000  # which figures over all records are made of
log = logging.getLogger("nearfar.store")


@dataclass(frozen=True, kw_only=True)
class Retention:
    """How long records stay, and how many bytes of them; the oldest go first. None: no bound."""

    max_age_s: float | None = None
    max_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which records: those that fit everything that is said. `owner` None: everybody's.

    `target` has an arm; `correct`: an arm, of that target where one is named, was right, or wrong. Neither finds what
    is still to be voted on.
    """

    owner: str | None = None
    ids: tuple[str, ...] | None = None
    target: str | None = None
    task: Task | None = None
    input_sha256: str | None = None
    since: float | None = None  # seconds since 1970, itself included
    until: float | None = None  # not included
    correct: bool | None = None
    hidden: bool = True  # False: without what is still to be voted on


class Page(NamedTuple):
    """Records, the newest first, and where the next page begins; None behind the last."""

    records: tuple[Record, ...]
    next: str | None


class Store:
    """The records of one database, which is made or brought up to date here. Raises Unavailable where it cannot be."""

    def __init__(
        self,
        url: URL,
        *,
        retention: Retention | None = None,
        clock: Callable[[], float] = time.time,
        steps: Sequence[Sequence[str]] = schema.STEPS,
    ) -> None:
        self._retention, self._clock = retention or Retention(), clock
        self._retained_at = -RETENTION_EVERY_S
        self._is_sqlite = url.get_backend_name() == "sqlite"
        with told_plainly("opened", self._is_sqlite):
            if self._is_sqlite:
                make_private(Path(url.database or ""))
            self._engine = create_engine(url, pool_pre_ping=not self._is_sqlite, connect_args=connect_options(url))
            if self._is_sqlite:
                event.listen(self._engine, "connect", prepare_sqlite)
                event.listen(self._engine, "begin", begin_sqlite)
        try:
            with self.reading() as connection:
                current = schema.is_current(connection, steps)
            if not current:
                with self.writing() as connection:
                    schema.upgrade(connection, steps)
        except Unavailable:
            self.close()
            raise

    def close(self) -> None:
        """Give back the connections."""
        self._engine.dispose()

    def check_writable(self) -> None:
        """Write something that changes nothing: before a comparison is paid for. Raises Unavailable."""
        if self._is_sqlite:
            check_room(Path(self._engine.url.database or ""))
        with self.writing() as connection:
            connection.execute(update(schema.version).values(version=schema.version.c.version))

    def add(self, record: Record) -> None:
        """Keep a record, whole or not at all. Raises Unavailable."""
        row, arms = schema.record_row(record), [schema.arm_row(record, place) for place in range(len(record.arms))]
        files = [
            {"comparison_id": record.record_id, "place": place, "data": file.data}
            for place, file in enumerate(record.input.files)
            if file.data is not None
        ]
        row["bytes"] = len(json.dumps([row, arms, files], default=len)) + sum(
            len(data) for data in (record.input.thumbnail, *(file.data for file in record.input.files)) if data
        )
        with self.writing() as connection:
            connection.execute(insert(schema.comparisons), row)
            for table, rows in ((schema.arms, arms), (schema.files, files)):
                if rows:
                    connection.execute(insert(table), rows)
        if self._clock() - self._retained_at >= RETENTION_EVERY_S:
            try:
                self.retain()
            except Unavailable as error:  # this record is kept, and its answers were paid for
                log.warning("old records stay for another hour: %s", error.message)

    def get(self, record_id: str, *, owner: str | None = None) -> Record | None:
        """The whole record with its events and its files, where they were kept; None where there is none of that id."""
        with self.reading() as connection:
            found = self._select(connection, Filter(owner=owner, ids=(record_id,)), 1, None, whole=True)
            if not found:
                return None
            files = schema.files
            kept = select(files.c.place, files.c.data).where(files.c.comparison_id == record_id)
            data: dict[int, bytes] = {place: bytes(data) for place, data in connection.execute(kept)}
        (record,) = found
        with_data = tuple(replace(file, data=data.get(place)) for place, file in enumerate(record.input.files))
        return replace(record, input=replace(record.input, files=with_data))

    def page(self, where: Filter, *, limit: int, cursor: str | None = None, whole: bool = False) -> Page:
        """The newest records that fit, without files; with `whole`, with events and thumbnails.

        Raises InvalidValue for a cursor that no page gave.
        """
        limit = min(limit, MAX_PAGE)
        before = _read_cursor(cursor) if cursor else None
        with self.reading() as connection:
            records = self._select(connection, where, limit + 1, before, whole=whole)
        more = len(records) > limit
        last = records[limit - 1] if more else None
        return Page(tuple(records[:limit]), f"{last.created_at!r}/{last.record_id}" if last else None)

    def all(self, where: Filter, *, whole: bool = True) -> Iterator[Record]:
        """Every record that fits, the newest first, whole but for its files: a page in memory at a time.

        Without `whole`, without events and thumbnails too.
        """
        cursor: str | None = None
        while True:
            found = self.page(where, limit=MAX_PAGE, cursor=cursor, whole=whole)
            yield from found.records
            if found.next is None:
                return
            cursor = found.next

    def results(self, owner: str | None) -> dict[str, list[Told]]:
        """The newest results of every target, the newest first; of what is still to be voted on, none."""
        arms, table = schema.arms, schema.comparisons
        mine = [] if owner is None else [table.c.owner == owner]
        newest = (
            select(arms.c.target, table.c.input_sha256, arms.c.result)
            .join(table, table.c.id == arms.c.comparison_id)
            .where(not_(schema.HIDDEN), *mine)
            .order_by(table.c.created_at.desc())
            .limit(NEWEST_RESULTS)
        )
        found: dict[str, list[Told]] = {}
        with self.reading() as connection:
            for target, input_sha256, result in connection.execute(newest):
                found.setdefault(target, []).append(Told(input_sha256, result))
        return found

    def delete(self, where: Filter) -> int:
        """Remove what fits, out of the files too, and say how many records it was. Raises Unavailable.

        In PostgreSQL the tables are written anew; its own log and its backups are not reached.
        """
        table = schema.comparisons
        with self.writing() as connection:
            count = connection.execute(delete(table).where(_fitting(where))).rowcount
        if count:
            self._erase()
        return count

    def retain(self) -> int:
        """Remove what is too old, and of what is too much the oldest."""
        self._retained_at = self._clock()
        table, bound = schema.comparisons, self._retention
        doomed: set[str] = set()
        with self.reading() as connection:
            if bound.max_age_s is not None:
                old = select(table.c.id).where(table.c.created_at < self._clock() - bound.max_age_s)
                doomed |= set(connection.execute(old).scalars())
            if bound.max_bytes is not None:
                total = connection.execute(select(func.coalesce(func.sum(table.c.bytes), 0))).scalar_one()
                upto = func.sum(table.c.bytes).over(order_by=(table.c.created_at.desc(), table.c.id.desc()))
                newest = select(table.c.id, upto.label("upto")).subquery()
                if total > bound.max_bytes:
                    beyond = select(newest.c.id).where(newest.c.upto > bound.max_bytes * KEPT_SHARE)
                    doomed |= set(connection.execute(beyond).scalars())
        ids = sorted(doomed)
        batches = [tuple(ids[at : at + MAX_PAGE]) for at in range(0, len(ids), MAX_PAGE)]
        with self.writing() as connection:
            for batch in batches:
                connection.execute(delete(table).where(table.c.id.in_(batch)))
        if ids:
            self._erase()
            log.info("%d records were removed: they were too old or too many", len(ids))
        return len(ids)

    def _select(
        self, connection: Connection, where: Filter, limit: int, before: tuple[float, str] | None, *, whole: bool
    ) -> list[Record]:
        table, arms = schema.comparisons, schema.arms
        columns = [column for column in table.c if whole or column is not table.c.thumbnail]
        query = select(*columns).where(_fitting(where)).order_by(table.c.created_at.desc(), table.c.id.desc())
        if before:
            at, record_id = before
            query = query.where(or_(table.c.created_at < at, and_(table.c.created_at == at, table.c.id < record_id)))
        rows = connection.execute(query.limit(limit)).all()
        arm_columns = [column for column in arms.c if whole or column is not arms.c.events]
        of_those = select(*arm_columns).where(arms.c.comparison_id.in_([row.id for row in rows]))
        by_record: dict[str, list[ArmRecord]] = {}
        for row in connection.execute(of_those.order_by(arms.c.place)):
            by_record.setdefault(row.comparison_id, []).append(schema.arm_of(row))
        votes: dict[str, list[Cast]] = {}
        cast = select(schema.votes).where(schema.votes.c.comparison_id.in_([row.id for row in rows if row.blind]))
        for row in connection.execute(cast.order_by(schema.votes.c.created_at, schema.votes.c.voter)):
            given = Cast(voter=row.voter, winner=row.winner, created_at=row.created_at)
            votes.setdefault(row.comparison_id, []).append(given)
        return [schema.record_of(row, by_record.get(row.id, []), votes.get(row.id, [])) for row in rows]

    def _erase(self) -> None:
        """What was deleted leaves the files: SQLite has filled it with zeros already, but not in its log."""
        with told_plainly("cleaned up", self._is_sqlite):
            if self._is_sqlite:
                with self._engine.connect() as connection:
                    cursor = connection.connection.cursor()
                    cursor.executescript("PRAGMA incremental_vacuum")  # `execute` would free one page
                    busy = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
                if busy:
                    log.warning("another process reads the records: what was deleted stays in SQLite's log until then")
            else:
                with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                    for table in (schema.votes, schema.files, schema.arms, schema.comparisons):
                        connection.exec_driver_sql(f"VACUUM FULL {table.name}")

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that reads. Raises Unavailable."""
        with told_plainly("read", self._is_sqlite), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes, whole or not at all. Raises Unavailable."""
        writing = self._engine.execution_options(**{WRITES: True})
        with told_plainly("written", self._is_sqlite), writing.begin() as connection:
            yield connection


def _fitting(where: Filter) -> ColumnElement[bool]:
    table, arms = schema.comparisons, schema.arms
    said: list[tuple[Any, Callable[[Any], ColumnElement[bool]]]] = [
        (where.owner, lambda owner: table.c.owner == owner),
        (where.ids, table.c.id.in_),
        (where.task, lambda task: table.c.task == task),
        (where.input_sha256, lambda sha256: table.c.input_sha256 == sha256),
        (where.since, lambda since: table.c.created_at >= since),
        (where.until, lambda until: table.c.created_at < until),
    ]
    clauses = [clause(value) for value, clause in said if value is not None]
    of_arm = []
    if where.target is not None:
        of_arm.append(arms.c.target == where.target)
    if where.correct is not None:
        of_arm.append(arms.c.correct.is_(where.correct))
    if of_arm or not where.hidden:  # which of the sides it is must not be found out by asking for it
        clauses.append(not_(schema.HIDDEN))
    if of_arm:
        clauses.append(select(arms.c.place).where(arms.c.comparison_id == table.c.id, *of_arm).exists())
    return and_(True, *clauses)


def _read_cursor(cursor: str) -> tuple[float, str]:
    at, _, record_id = cursor.partition("/")
    with suppress(ValueError):
        if math.isfinite(moment := float(at)):
            return moment, record_id
    raise InvalidValue("cursor: not one that a page of records gave", param="cursor")
