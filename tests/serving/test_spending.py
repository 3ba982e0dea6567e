"""The account of what was spent: budgets that hold under threads, processes and kill -9, and days of UTC."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import BudgetSpent, InvalidValue, Unavailable, Unrecorded
from serving.app import create_app
from serving.keys import ApiKey
from serving.settings import Settings
from serving.spending import FILE, NANO, Budget, Purpose, Spending, budgets_of, to_nano
from tests.serving.test_cli import assert_fails, nearfar

FAR = Purpose("far/m", key="laptop", route="smart")
HOLD = """
import os, sys, time
from pathlib import Path
from serving.spending import Budget, BudgetSpent, Purpose, Spending
spending = Spending(Path(sys.argv[1]), [Budget(nano=1000)])
held = 0
while held < int(sys.argv[2]):
    try:
        number = spending.hold(Purpose("far/m"), 7)
    except BudgetSpent:
        break
    held += 1
    if len(sys.argv) == 3:
        spending.settle(number, 7)
print(held, flush=True)
if len(sys.argv) > 3:
    time.sleep(60)
"""

HELD = """
import sys
from pathlib import Path
from serving.spending import Spending
print(sum(entry.held_nano for entry in Spending(Path(sys.argv[1])).entries(days=2)))
"""


def spender(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *arguments], stdout=subprocess.PIPE, text=True)


def account(folder: Path, *budgets: Budget, today: date = date(2026, 11, 21)) -> Spending:
    return Spending(folder, budgets, today=lambda: today)


@given(
    cap=st.integers(0, 60),
    asked=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20), st.booleans()), min_size=1, max_size=24),
)
@settings(max_examples=25)
def test_what_is_held_and_spent_together_never_exceeds_a_budget(cap: int, asked: list[tuple[int, int, bool]]) -> None:
    worst = 0

    def ask(each: tuple[int, int, bool]) -> int:
        """One request that costs no more than it was thought to, or never comes back."""
        nonlocal worst
        estimate, cost, comes_back = each
        barrier.wait(timeout=10)
        try:
            number = spending.hold(FAR, estimate)
        except BudgetSpent:
            return 0
        worst = max(worst, sum(entry.nano + entry.held_nano for entry in spending.entries()))
        if comes_back:
            spending.settle(number, min(cost, estimate))
            return min(cost, estimate)
        return estimate

    with TemporaryDirectory() as folder, closing(account(Path(folder), Budget(nano=cap))) as spending:
        barrier = threading.Barrier(len(asked))
        with ThreadPoolExecutor(len(asked)) as threads:
            taken = sum(threads.map(ask, asked))
        [(_, left)] = spending.left()
    assert worst <= cap
    assert left == cap - taken


def test_the_account_is_for_its_owner_alone_to_read(tmp_path: Path) -> None:
    with closing(Spending(tmp_path, [])) as spending:
        spending.hold(Purpose("far/m"), 1)
    assert {file.name: file.stat().st_mode & 0o077 for file in tmp_path.glob(f"{FILE}*")} == {FILE: 0}


def test_two_processes_at_once_spend_from_one_budget(tmp_path: Path) -> None:
    both = [spender(tmp_path, "200") for _ in range(2)]
    assert sum(int(each.communicate(timeout=60)[0]) for each in both) == 1000 // 7


def test_two_accounts_in_one_process_and_a_process_that_comes_and_goes_lose_nothing(tmp_path: Path) -> None:
    with closing(Spending(tmp_path)) as first, closing(Spending(tmp_path)) as second:
        first.hold(FAR, 1)
        second.hold(FAR, 2)  # opens the file, on which the first one holds its locks
        assert spender(tmp_path, "1").communicate(timeout=60)[0] == "1\n"
        first.hold(FAR, 4)
        asked = [sys.executable, "-c", HELD, str(tmp_path)]
        assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == "7\n"


def test_what_a_killed_process_held_stays_held_until_the_day_ends(tmp_path: Path) -> None:
    process = spender(tmp_path, "100", "and wait")
    assert process.stdout
    with process.stdout:
        assert process.stdout.readline() == "100\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
    budget = Budget(nano=1000)
    with closing(Spending(tmp_path, [budget])) as spending:
        assert spending.left() == [(budget, 300)]
        with pytest.raises(BudgetSpent):
            spending.hold(FAR, 301)
        tomorrow = spending.entries()[0].day + timedelta(days=1)
    with closing(account(tmp_path, budget, today=tomorrow)) as spending:
        assert spending.left() == [(budget, 1000)]
        assert [entry.held_nano for entry in spending.entries(days=2)] == [700]


def test_an_answer_that_comes_after_midnight_belongs_to_the_day_on_which_it_was_asked(tmp_path: Path) -> None:
    today = date(2026, 12, 31)
    with closing(Spending(tmp_path, [Budget(nano=10)], today=lambda: today)) as spending:
        number = spending.hold(FAR, 10)
        today = date(2027, 1, 1)
        spending.settle(number, 4)
        assert [(entry.day, entry.nano) for entry in spending.entries(days=2)] == [(date(2026, 12, 31), 4)]
        assert spending.left()[0][1] == 10


def test_a_day_is_one_of_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = nearfar("spend", "--json", TZ="Pacific/Kiritimati", NEARFAR_DATA_DIR=str(tmp_path))  # UTC+14
    assert json.loads(run.stdout)["days"] == []
    code = "import sys; from pathlib import Path; from datetime import *; from serving.spending import *\n"
    code += "Spending(Path(sys.argv[1])).hold(Purpose('far/m'), 1); print(datetime.now(UTC).date())"
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):
        written = subprocess.run(command, capture_output=True, text=True, check=True, env={"TZ": zone}).stdout.strip()
        with closing(account(tmp_path, today=date.fromisoformat(written))) as spending:
            assert [entry.day.isoformat() for entry in spending.entries(days=2)] == [written]


@pytest.mark.parametrize(
    ("budget", "covered"),
    [
        (Budget(nano=1), {"far/m", "far/n", "other/m"}),
        (Budget(nano=1, name="far/m"), {"far/m"}),
        (Budget(nano=1, name="far"), {"far/m", "far/n"}),
        (Budget(nano=1, name="fa"), set()),
        (Budget(nano=1, name="smart"), {"far/n"}),
        (Budget(nano=1, key="laptop"), {"other/m"}),
    ],
)
def test_a_budget_is_spent_from_by_its_own(tmp_path: Path, budget: Budget, covered: set[str]) -> None:
    purposes = [Purpose("far/m"), Purpose("far/n", route="smart"), Purpose("other/m", key="laptop")]
    refused = set()
    with closing(account(tmp_path, budget)) as spending:
        for purpose in purposes:
            try:
                spending.release(spending.hold(purpose, 2))
            except BudgetSpent:
                refused.add(purpose.target)
    assert refused == covered


def test_a_budget_of_nothing_lets_only_what_costs_nothing_pass(tmp_path: Path) -> None:
    with closing(account(tmp_path, Budget(nano=0))) as spending:
        spending.settle(spending.hold(FAR, 0), 0, unpriced=True)
        with pytest.raises(BudgetSpent, match=r"of the 0\.00 USD a day for the service"):
            spending.hold(FAR, 1)
        [entry] = spending.entries()
        assert (entry.requests, entry.unpriced) == (1, 1)


def test_what_was_dearer_than_thought_is_counted_and_stops_the_next(tmp_path: Path) -> None:
    budget = Budget(nano=10)
    with closing(account(tmp_path, budget)) as spending:
        spending.settle(spending.hold(FAR, 10), 15)
        assert spending.left() == [(budget, -5)]
        with pytest.raises(BudgetSpent):
            spending.hold(FAR, 1)


def test_what_is_beyond_counting_stops_the_service_and_breaks_nothing(tmp_path: Path) -> None:
    budget = Budget(nano=NANO)
    with closing(account(tmp_path, budget)) as spending:
        numbers = [spending.hold(FAR, 1) for _ in range(20)]
        for number in numbers:
            spending.settle(number, to_nano(math.inf))
        assert spending.left() == [(budget, NANO - 20 * 10**15)]
        with pytest.raises(BudgetSpent):
            spending.hold(FAR, 1)


def test_where_nothing_can_be_written_down_nothing_is_spent(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"this is no database " * 100)
    with closing(account(tmp_path, Budget(nano=10))) as spending:
        with pytest.raises(Unrecorded, match="cannot be written down, so nothing is"):
            spending.hold(FAR, 1)
        with pytest.raises(Unavailable, match="cannot be read"):
            spending.left()


def test_settings_name_budgets_and_an_alias_stands_for_its_target() -> None:
    key = ApiKey(name="laptop", sha256="0" * 64, daily_usd=0.5)
    found = budgets_of(Settings(keys=(key,), budgets={"claude-4-sonnet": 1, "openai": 2}))
    assert [(str(budget), budget.nano / NANO) for budget in found] == [
        ("the service", 5.0),
        ("anthropic/claude-sonnet-5-5", 1.0),
        ("openai", 2.0),
        ("key laptop", 0.5),
    ]


def test_a_budget_for_what_is_not_there_is_refused() -> None:
    for name in ("opnai", "local/tiny-scenes@int8"):
        with pytest.raises(InvalidValue, match="no provider, hosted target"):
            create_app(Settings(budgets={name: 1.0}), {})


def test_the_cap_is_shown_and_may_be_switched_off(tmp_path: Path) -> None:
    assert "daily_usd" in nearfar("config").stdout
    shown = json.loads(nearfar("config", "--json", NEARFAR_DAILY_USD="none").stdout)
    assert (shown["daily_usd"]["value"], shown["daily_usd"]["origin"]) == (None, "environment")
    assert_fails(nearfar("config", NEARFAR_DAILY_USD="-1"), 2, "daily_usd")
    (tmp_path / "nearfar.toml").write_text('daily_usd = "none"\n[budgets]\nanthropic = 1.5\n')
    found = Settings(config=tmp_path / "nearfar.toml")
    assert (found.daily_usd, found.budgets) == (None, {"anthropic": 1.5})


def test_nearfar_spend_shows_days_and_what_is_left(tmp_path: Path) -> None:
    with closing(Spending(tmp_path)) as spending:
        spending.settle(spending.hold(FAR, NANO), NANO // 4, assumed=True)
        spending.hold(FAR, NANO // 2)
    shown = json.loads(nearfar("spend", "--json", NEARFAR_DATA_DIR=str(tmp_path)).stdout)
    [row] = shown["days"]
    assert {name: row[name] for name in ("target", "key", "route")} == FAR._asdict()
    assert (row["usd"], row["assumed_usd"], row["held_usd"], row["requests"]) == (0.25, 0.25, 0.5, 2)
    assert shown["budgets"] == [{"for": "the service", "daily_usd": 5.0, "left_usd": 4.25}]
    assert "far/m" in nearfar("spend", NEARFAR_DATA_DIR=str(tmp_path)).stdout
    assert "nothing was spent" in nearfar("spend", NEARFAR_DATA_DIR=str(tmp_path / "elsewhere")).stdout
    assert not (tmp_path / "elsewhere").exists()
