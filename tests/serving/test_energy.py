"""Energy of local answers, and what they cost.

RAPL is a folder with its layout here, and NVML stands behind a protocol: no machine of these tests has the real ones.
"""

from __future__ import annotations

import asyncio
import builtins
import json
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparisons.cost import LOCAL_COST
from models.events import Energy
from serving.energy import S_PER_YEAR, Electricity, Hardware, Power, Share
from serving.power import Meters, NoMeter, Nvml, Rapl, find_meters
from tests.serving.conftest import running, wait_for
from tests.serving.test_streams import slowed

RANGE_UJ = 262_143_328_850  # of an Intel server


class Powercap:
    """A folder as the kernel has it: packages, a part of one, its memory, and the platform's sum."""

    def __init__(self, root: Path, *, packages: int = 1, range_uj: int = RANGE_UJ) -> None:
        self.root = root
        names = {f"intel-rapl:{number}": f"package-{number}" for number in range(packages)}
        for zone, name in {**names, "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:9": "psys"}.items():
            (root / zone).mkdir(parents=True)
            (root / zone / "name").write_text(f"{name}\n")
            (root / zone / "max_energy_range_uj").write_text(f"{range_uj}\n")
            self.show(zone, 0)

    def show(self, zone: str, uj: int) -> None:
        (self.root / "next").write_text(f"{uj}\n")
        (self.root / "next").replace(self.root / zone / "energy_uj")  # at once, as the kernel shows it


@pytest.fixture
def powercap(tmp_path: Path) -> Powercap:
    return Powercap(tmp_path / "powercap")


def test_packages_and_memory_count_and_parts_and_the_platform_do_not(tmp_path: Path) -> None:
    powercap = Powercap(tmp_path, packages=2)
    meter = Rapl(tmp_path)
    for number, zone in enumerate(["intel-rapl:0", "intel-rapl:1", "intel-rapl:0:1", "intel-rapl:0:0", "intel-rapl:9"]):
        powercap.show(zone, 10**number * 1_000_000)
    assert meter.read_j() == 111
    assert meter.measures == "RAPL counters of package-0, dram, package-1"


@given(st.lists(st.integers(0, 999), max_size=20))
def test_a_counter_that_begins_again_goes_on(tmp_path_factory: pytest.TempPathFactory, steps: list[int]) -> None:
    powercap, shown = Powercap(tmp_path_factory.mktemp("powercap"), range_uj=1000), 0
    meter = Rapl(powercap.root)
    for step in steps:
        shown = (shown + step) % 1000
        powercap.show("intel-rapl:0", shown)
        meter.read_j()
    assert meter.read_j() == pytest.approx(sum(steps) / 1e6)


def test_what_cannot_be_read_is_unavailable_with_the_reason(
    powercap: Powercap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = find_meters(gpu=False, powercap=tmp_path / "nowhere")
    assert none.meters == ()
    assert "no RAPL counters in" in none.lacks
    secret = powercap.root / "intel-rapl:0" / "energy_uj"
    secret.unlink()
    assert "No such file" in find_meters(gpu=False, powercap=powercap.root).lacks
    secret.write_text("")
    assert "holds no number" in find_meters(gpu=False, powercap=powercap.root).lacks

    def refuse(file: Path, *_: Any, **__: Any) -> Any:  # whoever runs the tests may be root, who may read everything
        if file == secret:
            raise PermissionError(13, "Permission denied")
        return builtins.open(file)

    monkeypatch.setattr(Path, "open", refuse)
    assert "energy_uj: Permission denied" in find_meters(gpu=False, powercap=powercap.root).lacks


class Driver:
    """NVML as pynvml has it, with two GPUs."""

    def __init__(self, error: str | None = None) -> None:
        self.error, self.millijoules = error, [1000, 2000]

    def nvmlInit(self) -> None:
        if self.error:
            raise RuntimeError(self.error)

    def nvmlDeviceGetCount(self) -> int:
        return len(self.millijoules)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"GPU {handle}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if handle >= len(self.millijoules):
            raise RuntimeError("Not Supported")
        return self.millijoules[handle]


def test_a_gpus_counters_are_added_and_its_driver_may_fail() -> None:
    driver = Driver()
    meter = Nvml(driver)
    assert (meter.read_j(), meter.measures) == (3.0, "NVML counters of GPU 0, GPU 1")
    driver.millijoules.pop()
    with pytest.raises(NoMeter, match="Not Supported"):
        meter.read_j()
    with pytest.raises(NoMeter, match="Driver Not Loaded"):
        Nvml(Driver("Driver Not Loaded"))


def test_on_a_gpu_without_its_counter_the_processors_is_not_passed_off_as_all(
    powercap: Powercap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_meters(gpu=True, powercap=powercap.root) == ((), 'the GPU is not measured: pip install "nearfar[gpu]"')
    monkeypatch.setitem(sys.modules, "pynvml", Driver())
    both = find_meters(gpu=True, powercap=powercap.root)
    assert [meter.method for meter in both.meters] == ["rapl", "nvml"]
    alone = find_meters(gpu=True, powercap=powercap.root / "nowhere")
    assert [meter.method for meter in alone.meters] == ["nvml"]
    assert "the processor is not measured" in alone.lacks


class Machine:
    """A clock and a counter, which a test turns."""

    method = "rapl"
    measures = "a counter of the test"
    resolution_s, longest_gap_s = 0.001, 100.0

    def __init__(self, **stated: Any) -> None:
        self.now, self.joules, self.broken = 0.0, 0.0, False
        self.power = Power(Meters((self,), ""), clock=lambda: self.now, **stated)

    def read_j(self) -> float:
        if self.broken:
            raise NoMeter("the counter is gone")
        return self.joules

    def run(self, seconds: float, watts: float) -> None:
        self.now += seconds
        self.joules += seconds * watts

    def idle(self, watts: float = 10.0) -> Machine:
        self.run(2, watts)
        self.power.advance()
        return self


def energy_of(machine: Machine, seconds: float, watts: float) -> Energy:
    with machine.power.answering() as share:
        machine.run(seconds, watts)
        return machine.power.energy(share)


def test_idling_is_subtracted_and_both_figures_are_shown() -> None:
    found = energy_of(Machine().idle(10), 3, 50)
    assert (found.joules, found.idle_joules, found.method) == (pytest.approx(120), pytest.approx(30), "rapl")
    assert "10.0 W of idling subtracted" in found.basis
    assert "a counter of the test, whatever else ran there included" in found.basis


def test_idling_is_measured_again_and_one_busy_moment_in_it_does_not_count() -> None:
    machine = Machine()
    for watts in (10, 10, 200, 12, 12, 12):
        machine.idle(watts)
    assert energy_of(machine, 1, 30).joules == pytest.approx(18)
    less = energy_of(machine, 1, 11)
    assert less.joules == 0
    assert "showed less than idling takes" in less.basis


@given(st.lists(st.tuples(st.booleans(), st.floats(0.1, 5), st.floats(10, 100)), min_size=1, max_size=12))
def test_answers_at_once_share_every_moment_and_nothing_is_lost(moments: list[tuple[bool, float, float]]) -> None:
    machine, running_ones, over, used = Machine().idle(10), [], [], [0.0, 0.0]
    with ExitStack() as stack:
        for comes, seconds, watts in moments:
            if comes or not running_ones:
                context = machine.power.answering()
                running_ones.append((context, context.__enter__()))
            else:
                context, share = running_ones.pop()
                context.__exit__(None, None, None)
                over.append(share)
            machine.run(seconds, watts if running_ones else 10)
            if running_ones:
                used = [used[0] + seconds * watts, used[1] + seconds * 10]
            machine.power.advance()
        for context, share in running_ones:
            stack.push(context)
            over.append(share)
    assert sum(share.joules for share in over) == pytest.approx(used[0])
    assert sum(share.idle_joules for share in over) == pytest.approx(used[1])
    assert sum(share.busy_s for share in over) <= machine.now


def test_an_answer_that_was_not_alone_says_so() -> None:
    machine = Machine().idle(0)
    with machine.power.answering() as first:
        machine.run(1, 10)
        with machine.power.answering() as second:
            machine.run(2, 10)
            shared = machine.power.energy(second)
        alone_again = machine.power.energy(first)
    assert (shared.joules, alone_again.joules) == (pytest.approx(10), pytest.approx(20))
    assert "in equal parts with up to 1 other answers" in shared.basis


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ({"seconds": 0.002}, "it took 2.0 ms, and the counters tell no less than 10"),
        ({"seconds": 101}, "were not read for 101 s"),
        ({"seconds": 1, "broken": True}, "the counter is gone"),
    ],
    ids=["short", "long", "broken"],
)
def test_what_the_counters_do_not_tell_is_unavailable(trouble: dict[str, Any], words: str) -> None:
    machine = Machine().idle()
    with machine.power.answering() as share:
        machine.run(trouble["seconds"], 50)
        machine.broken = trouble.get("broken", False)
        found = machine.power.energy(share)
    assert (found.joules, found.idle_joules, found.method) == (None, None, "unavailable")
    assert words in found.basis


class Card(Machine):
    """A second counter of the same machine, whose steps are coarser and which may be left alone for ever."""

    method = "nvml"
    resolution_s, longest_gap_s = 0.1, math.inf


@pytest.mark.parametrize(
    ("seconds", "joules", "words"),
    [
        (0.5, None, "the counters tell no less than 1000"),
        (2, pytest.approx(2 * (50 - 10)), "whatever else ran there included"),
        (101, None, "were not read for 101 s"),
    ],
)
def test_of_two_counters_the_coarser_and_the_sooner_full_one_decides(seconds: float, joules: Any, words: str) -> None:
    machine, card = Machine(), Card()
    machine.power = Power(Meters((machine, card), ""), clock=lambda: machine.now)
    found = energy_of(machine.idle(10), seconds, 50)
    assert found.joules == joules
    assert found.method == ("unavailable" if joules is None else "rapl+nvml")
    assert words in found.basis


def test_before_idling_was_measured_an_answers_part_of_it_is_not_known() -> None:
    found = energy_of(Machine(), 1, 50)
    assert (found.joules, found.basis) == (None, "idling was not measured yet")


@pytest.mark.asyncio
async def test_idling_is_measured_at_the_start(powercap: Powercap) -> None:
    power = Power(find_meters(gpu=False, powercap=powercap.root))
    asyncio.get_running_loop().call_later(0.2, powercap.show, "intel-rapl:0", 5_000_000)
    await power.measure_idle()
    with power.answering() as share:
        await asyncio.sleep(0.05)
        powercap.show("intel-rapl:0", 50_000_000)
        found = power.energy(share)
    assert found.joules is not None
    assert found.joules + (found.idle_joules or 0) == pytest.approx(45)
    assert 0 < (found.idle_joules or 0) < 5


UNMEASURED = Energy(joules=None, idle_joules=None, method="unavailable", basis="no counter")
MEASURED = Energy(joules=3.6e6, idle_joules=1.0, method="rapl", basis="a counter")
TARIFF = Electricity(usd_per_kwh=0.3)


@pytest.mark.parametrize(
    ("electricity", "hardware", "energy", "usd", "words"),
    [
        (None, None, MEASURED, 0.0, "electricity and hardware are not counted"),
        (TARIFF, None, MEASURED, 0.3, "measured energy beyond idling at 0.3 USD/kWh; hardware is not counted"),
        (TARIFF, None, UNMEASURED, None, "neither measured nor are its watts stated: no counter"),
        (Electricity(usd_per_kwh=0.3, watts=100), None, UNMEASURED, 0.03, "a stated 100 W at 0.3 USD/kWh, not"),
        (Electricity(usd_per_kwh=0.3, watts=100), None, MEASURED, 0.3, "measured energy"),
        (None, Hardware(usd=1000, years=2), MEASURED, 1000 * 3600 / 2 / S_PER_YEAR, "electricity is not counted"),
        (Electricity(usd_per_kwh=0.3, watts=100), Hardware(usd=1000, years=2), UNMEASURED,
         0.03 + 1000 * 3600 / 2 / S_PER_YEAR, "1000 USD of hardware over 2 years of answering without a pause"),
    ],
)  # fmt: skip
def test_a_local_answer_costs_what_is_stated_and_its_basis_says_what_is_not(
    electricity: Electricity | None, hardware: Hardware | None, energy: Energy, usd: float | None, words: str
) -> None:
    power = Power(Meters((), "none"), electricity=electricity, hardware=hardware)
    cost = power.cost(Share(busy_s=3600, elapsed_s=7200), energy)
    assert cost.usd == (None if usd is None else pytest.approx(usd))
    assert words in cost.basis
    assert (cost == LOCAL_COST) == (electricity is None and hardware is None)


@pytest.fixture
def service_with_rapl(powercap: Powercap, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr("serving.services.find_meters", lambda gpu: find_meters(gpu=gpu, powercap=powercap.root))
    with running(models=("tiny-scenes",), electricity=TARIFF) as service:
        yield service.ready()


def test_a_served_answer_tells_its_energy_and_the_metrics_add_it_up(
    service_with_rapl: Any, powercap: Powercap, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_with_rapl
    slowed(service, monkeypatch, "decode_together", 0.02)  # the counter moves while it answers
    body = {
        "prompt": "What is red?",
        "max_tokens": 200,
        "response_format": {"type": "regex", "pattern": "[a-z ]{150,160}"},
    }
    with service.client.stream("POST", "/infer", json={**body, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        powercap.show("intel-rapl:0", 7_200_000)
        last = [line for line in lines if line.startswith("data:")][-1]
    answer = json.loads(last.removeprefix("data:"))
    assert answer["energy"]["method"] == "rapl", answer["energy"]
    assert answer["energy"]["joules"] + answer["energy"]["idle_joules"] == pytest.approx(7.2)
    assert answer["cost"]["usd"] == pytest.approx(answer["energy"]["joules"] / 3.6e6 * 0.3)
    wait_for(
        lambda: 'nearfar_energy_joules_total{target="local/tiny-scenes@int8"}' in service.client.get("/metrics").text
    )


def test_without_a_counter_the_answer_says_why(client: Any) -> None:
    answer = client.post("/infer", json={"prompt": "What is red?", "max_tokens": 2}).json()
    if Path("/sys/class/powercap/intel-rapl:0").exists():
        pytest.skip("this machine has one")
    energy = answer["energy"]
    assert (energy["joules"], energy["idle_joules"], energy["method"]) == (None, None, "unavailable")
    assert "no RAPL counters in /sys/class/powercap" in energy["basis"]
    assert answer["cost"] == {"usd": 0.0, "basis": LOCAL_COST.basis}
