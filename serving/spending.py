"""What was spent on hosted models, by day, target, key and route, and the budgets that bound it. Knows no HTTP.

It is kept in one SQLite file, so that it survives a restart and several processes spend from the same budget. Money is
held before a request leaves and settled when it is over; what a killed process held stays held until the day ends.
Sums are whole billionths of a dollar: a token may cost less than a millionth, and floats do not add up.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from models.errors import BudgetSpent, Unavailable, Unrecorded
from models.files import make_private
from serving.settings import Settings

NANO = 10**9
FILE = "spending.sqlite"
MAX_USD = 1e6  # of one request; SQLite's sums end at nine billion dollars
BUSY_S = 1.0  # for another process's transaction, each of which takes less than a millisecond
log = logging.getLogger("nearfar.spending")

# WAL with synchronous NORMAL: what is written survives the process's death at once, that of the machine within moments.
_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS spent (
    day TEXT, target TEXT, key TEXT, route TEXT,
    nano INTEGER NOT NULL, assumed INTEGER NOT NULL, requests INTEGER NOT NULL, unpriced INTEGER NOT NULL,
    PRIMARY KEY (day, target, key, route)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS held (
    id INTEGER PRIMARY KEY, day TEXT, target TEXT, key TEXT, route TEXT, nano INTEGER NOT NULL
);
"""
_ADD = """
INSERT INTO spent SELECT day, target, key, route, :nano, :assumed, 1, :unpriced FROM held WHERE id = :id
ON CONFLICT DO UPDATE SET nano = nano + excluded.nano, assumed = assumed + excluded.assumed,
    requests = requests + 1, unpriced = unpriced + excluded.unpriced
"""
_ENTRIES = """
SELECT day, target, key, route, SUM(nano), SUM(assumed), SUM(held), SUM(requests), SUM(unpriced) FROM (
    SELECT day, target, key, route, nano, assumed, 0 AS held, requests, unpriced FROM spent
    UNION ALL SELECT day, target, key, route, 0, 0, nano, 1, 0 FROM held
) WHERE day >= ? GROUP BY day, target, key, route ORDER BY day DESC, target, key, route
"""


def to_nano(usd: float) -> int:
    """Billionths, rounded up. A provider may report any number of tokens: what is beyond counting counts as MAX_USD."""
    return math.ceil(min(usd, MAX_USD) * NANO - 1e-3)


class Purpose(NamedTuple):
    """Who spends on what. `key` and `route` are empty where there is none."""

    target: str
    key: str = ""
    route: str = ""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """So many billionths of a dollar a day: of one key, of one target, provider or route, or of the whole service."""

    nano: int
    key: str | None = None
    name: str | None = None

    def covers(self, purpose: Purpose) -> bool:
        """Is that spent from it?"""
        if self.key is not None:
            return purpose.key == self.key
        target, _, route = purpose
        return self.name is None or self.name in (target, route) or target.startswith(f"{self.name}/")

    def __str__(self) -> str:
        return f"key {self.key}" if self.key is not None else self.name or "the service"


def budgets_of(settings: Settings) -> tuple[Budget, ...]:
    """The budgets that settings name; one for an alias is one for what it stands for."""
    whole = [Budget(nano=to_nano(settings.daily_usd))] if settings.daily_usd is not None else []
    named = settings.budgets.items()
    by_name = [Budget(nano=to_nano(usd), name=settings.aliases.get(name, name)) for name, usd in named]
    of_keys = [
        Budget(nano=to_nano(key.daily_usd), key=key.name) for key in settings.all_keys() if key.daily_usd is not None
    ]
    return (*whole, *by_name, *of_keys)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One day's spending for one purpose, in billionths of a dollar.

    `assumed_nano` is the part of `nano` that was settled at the estimate, because no cost was told. `held_nano` is
    under way, or was when its process died. `unpriced` requests had no known price, and count with what was assumed.
    """

    day: date
    purpose: Purpose
    nano: int
    assumed_nano: int
    held_nano: int
    requests: int
    unpriced: int


def utc_today() -> date:
    return datetime.now(UTC).date()


class Spending:
    """The account. Safe to use from several threads and processes; a file is made when money is first held."""

    def __init__(
        self, data_dir: Path, budgets: Sequence[Budget] = (), *, today: Callable[[], date] = utc_today
    ) -> None:
        self.budgets = tuple(budgets)
        self._file, self._today = data_dir / FILE, today
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def hold(self, purpose: Purpose, nano: int) -> int:
        """Set so much aside, and return by which number. Raises BudgetSpent, and Unrecorded where it is not written.

        No budget is looked at where nothing is to be spent.
        """
        try:
            with self._transaction() as connection:
                day = self._today()
                if nano:
                    self._check(purpose, nano, self._entries(connection, day))
                row = (day.isoformat(), *purpose, nano)
                cursor = connection.execute(
                    "INSERT INTO held (day, target, key, route, nano) VALUES (?, ?, ?, ?, ?)", row
                )
                assert cursor.lastrowid is not None
                return cursor.lastrowid
        except (sqlite3.Error, OSError) as error:
            raise Unrecorded(f"what is spent cannot be written down, so nothing is: {self._file}: {error}") from error

    def settle(self, held: int, nano: int, *, assumed: bool = False, unpriced: bool = False) -> None:
        """So much of what was held is spent. Raises nothing: what cannot be written down stays held."""
        values = {"id": held, "nano": nano, "assumed": nano if assumed else 0, "unpriced": int(unpriced)}
        self._end(held, lambda connection: connection.execute(_ADD, values))

    def release(self, held: int) -> None:
        """Nothing was sent: it counts as nothing, not even as a request."""
        self._end(held, lambda connection: None)

    def entries(self, days: int = 1) -> list[Entry]:
        """Of today and the days before it, the newest first. Raises Unavailable where the file cannot be read."""
        if not self._file.is_file():
            return []
        try:
            with self._transaction() as connection:
                return self._entries(connection, self._today() - timedelta(days=days - 1))
        except sqlite3.Error as error:
            raise Unavailable(f"what was spent cannot be read: {self._file}: {error}") from error

    def left(self) -> list[tuple[Budget, int]]:
        """What is left today of each budget, below 0 where an answer cost more than it was thought to."""
        today = self.entries()
        return [(budget, budget.nano - _taken(budget, today)) for budget in self.budgets]

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _check(self, purpose: Purpose, nano: int, today: Sequence[Entry]) -> None:
        for budget in self.budgets:
            left = budget.nano - _taken(budget, today)
            if budget.covers(purpose) and nano > left:
                raise BudgetSpent(
                    f"of the {budget.nano / NANO:.2f} USD a day for {budget} {max(left, 0) / NANO:.4f} are left, and a "
                    f"request to {purpose.target} may cost {nano / NANO:.4f}; the next day begins at 00:00 UTC"
                )

    def _entries(self, connection: sqlite3.Connection, since: date) -> list[Entry]:
        return [
            Entry(
                day=date.fromisoformat(day),
                purpose=Purpose(target, key, route),
                nano=nano,
                assumed_nano=assumed,
                held_nano=held,
                requests=requests,
                unpriced=unpriced,
            )
            for day, target, key, route, nano, assumed, held, requests, unpriced in connection.execute(
                _ENTRIES, [since.isoformat()]
            )
        ]

    def _end(self, held: int, write: Callable[[sqlite3.Connection], object]) -> None:
        try:
            with self._transaction() as connection:
                write(connection)
                connection.execute("DELETE FROM held WHERE id = ?", [held])
        except (sqlite3.Error, OSError):
            log.exception("what a request cost could not be written down; what was held for it stays held today")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Alone among all threads and processes; all of it is written, or nothing."""
        with self._lock:
            connection = self._connection = self._connection or self._open()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a damaged file or a full disk may have ended it
                    connection.execute("ROLLBACK")
                raise

    def _open(self) -> sqlite3.Connection:
        make_private(self._file)
        connection = sqlite3.connect(self._file, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            connection.executescript(_SCHEMA)
        except BaseException:
            connection.close()
            raise
        return connection


def report(spending: Spending, days: int) -> dict[str, Any]:
    """What `nearfar spend --json` prints. Raises Unavailable where the file cannot be read."""
    return {
        "budgets": [
            {"for": str(budget), "daily_usd": budget.nano / NANO, "left_usd": left / NANO}
            for budget, left in spending.left()
        ],
        "days": [
            {
                "day": entry.day.isoformat(),
                **entry.purpose._asdict(),
                "usd": entry.nano / NANO,
                "assumed_usd": entry.assumed_nano / NANO,
                "held_usd": entry.held_nano / NANO,
                "requests": entry.requests,
                "unpriced_requests": entry.unpriced,
            }
            for entry in spending.entries(days)
        ],
        "basis": "list prices of the reported tokens; assumed: no cost was told, so the highest was taken; days of UTC",
    }


def _taken(budget: Budget, today: Sequence[Entry]) -> int:
    return sum(entry.nano + entry.held_nano for entry in today if budget.covers(entry.purpose))
