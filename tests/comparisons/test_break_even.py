"""The break-even against sums by hand and against counting, and what its intervals do."""

from __future__ import annotations

import math
import random
from dataclasses import fields, replace

import pytest

from comparisons.break_even import BreakEven, break_even
from comparisons.cost import price, rates
from comparisons.workload import REVIEWS_USD, Arm, Inputs, Model, hosted_arms
from models.errors import InvalidValue
from models.events import Usage

SONNET = Model("anthropic", "anthropic", "claude-sonnet-5-5")
HAIKU = Model("anthropic", "anthropic", "claude-haiku-5-5")
MINI = Model("openai", "openai", "gpt-4.1-mini")


def two(inputs: Inputs, price_usd: float = 0.01) -> list[Arm]:
    return [
        Arm(target="local", kind="local", inputs=inputs),
        Arm(target="far", kind="hosted", inputs=inputs, price_usd=price_usd),
    ]


def at(volume: float, arms: list[Arm]) -> dict[str, float]:
    """US dollars for 1,000 accepted images by target."""
    found = break_even(arms, replace(arms[0].inputs, volume=volume), volumes=())
    return {cost.arm.target: cost.usd_per_1000.value or 0.0 for cost in found.costs}


def test_the_cost_of_a_local_target_is_the_sum_by_hand() -> None:
    inputs = Inputs(
        volume=100_000,
        local_s=10,
        local_acceptance=0.8,
        local_retries=0.5,  # each image is asked twice: 20 s
        watts=100,
        idle_watts=20,
        usd_per_kwh=0.25,
        hardware_usd=480,
        life_years=4,  # 10 a month
        on_hours=500,
        busy_share=0.5,  # 250 h, 45,000 images a box: three boxes
        local_operations_hours=3,
        wage_usd=50,
        wrong_usd=0.1,
    )
    (cost,) = break_even(two(inputs)[:1], inputs).costs
    thousand = 1000 / 0.8
    assert cost.boxes == 3
    assert cost.parts == pytest.approx(
        {
            "electricity": thousand * 80 * 20 / 3.6e6 * 0.25,
            "wrong answers": thousand * 0.2 * 0.1,
            "operations": thousand * 150 / 100_000,
            "hardware": thousand * 30 / 100_000,
            "idling": thousand * 3 * 20 * 500 / 1000 * 0.25 / 100_000,
        }
    )
    assert cost.usd_per_1000.value == pytest.approx(sum(cost.parts.values()))
    assert cost.usd_a_month == pytest.approx(sum(cost.parts.values()) * 80)


def test_the_cost_of_a_hosted_target_is_the_sum_by_hand() -> None:
    inputs = Inputs(
        volume=10_000,
        hosted_acceptance=0.9,
        hosted_retries=0.2,
        offline_share=0.1,
        hosted_operations_hours=2,
        wage_usd=50,
        upload_bytes=1e6,
        usd_per_gb=3,
        wrong_usd=0.1,
    )
    (cost,) = break_even(two(inputs)[1:], inputs).costs
    thousand, asked = 1000 / 0.81, 0.9 / 0.8  # of the images that come while the line is up, some twice
    assert cost.parts == pytest.approx(
        {
            "price": thousand * asked * 0.01,
            "uplink": thousand * asked * 0.003,
            "wrong answers": thousand * 0.19 * 0.1,
            "operations": thousand * 100 / 10_000,
        }
    )
    assert cost.usd_per_1000.value == pytest.approx(sum(cost.parts.values()))


def test_pages_per_hour_say_how_much_a_box_does() -> None:
    slow = Inputs(volume=100_000, local_s=10, on_hours=100, busy_share=1)
    assert break_even(two(slow), slow).costs[0].boxes == 3  # 36,000 each
    fast = replace(slow, pages_per_hour=1000)
    assert break_even(two(fast), fast).costs[0].boxes == 1


def counted(arms: list[Arm], upto: int) -> tuple[float | None, float | None]:
    """The first volume of a fine grid at which local is cheaper, and the one from which on it stays so.

    A box more may make it dearer for very few images: each such volume is in the grid.
    """
    inputs = arms[0].inputs
    full = inputs.on_hours * 3600 * inputs.busy_share / inputs.local_s
    grid = [10 ** (exponent / 2000) for exponent in range(int(2000 * math.log10(upto)))]
    grid = sorted([*grid, *(full * boxes * (1 + 1e-9) for boxes in range(1, int(upto / full)))])
    found = break_even(arms, arms[0].inputs, volumes=grid).series
    pairs = zip(found["local"], found["far"], strict=True)
    cheaper = [here is not None and there is not None and here <= there for here, there in pairs]
    if True not in cheaper:
        return None, None
    last = max((place for place, is_cheaper in enumerate(cheaper) if not is_cheaper), default=-1)
    return grid[cheaper.index(True)], grid[last + 1] if last + 1 < len(grid) else None


def test_the_crossing_is_where_counting_finds_it() -> None:
    rng = random.Random(3)
    kinds = set()
    for _ in range(60):
        inputs = Inputs(
            local_s=rng.choice((1, 10, 60)),
            local_acceptance=rng.uniform(0.5, 1),
            hosted_acceptance=rng.uniform(0.5, 1),
            hardware_usd=rng.choice((0, 600, 6000)),
            local_operations_hours=rng.choice((0, 0.2, 2, 20)),
            wrong_usd=rng.choice((0, 0.01)),
            uplink_mbit_s=1e6,
        )
        arms = two(inputs, price_usd=rng.choice((0.0005, 0.002, 0.01)))
        (crossing,) = break_even(arms, inputs).crossings
        first, for_good = counted(arms, 10**7)
        told = crossing.volume.value
        if told is None or told > 10**7:
            assert first is None
            assert told or "never pays" in crossing.note
        else:
            assert told == pytest.approx(first, rel=0.002)
            assert crossing.for_good is None or crossing.for_good >= told
            if crossing.for_good and crossing.for_good < 10**6:
                assert crossing.for_good == pytest.approx(for_good, rel=0.002)
        kinds.add("never" if told is None else "again" if crossing.for_good != told else "once")
    assert kinds == {"never", "again", "once"}


def test_what_is_known_exactly_crosses_at_one_volume() -> None:
    inputs = Inputs(local_checked=1e9, hosted_checked=1e9, local_s_factor=1)
    (crossing,) = break_even(two(inputs), inputs).crossings
    assert crossing.volume.value
    assert crossing.volume.low == pytest.approx(crossing.volume.value, rel=0.001)
    assert crossing.volume.high == pytest.approx(crossing.volume.value, rel=0.001)
    assert crossing.never == 0


def test_fewer_checked_images_widen_the_interval_and_may_leave_it_open() -> None:
    widths = []
    for checked in (10_000, 1000, 200):
        inputs = Inputs(local_checked=checked, hosted_checked=checked)
        (crossing,) = break_even(two(inputs), inputs).crossings
        assert crossing.volume.low
        assert crossing.volume.value
        assert crossing.volume.high
        assert crossing.volume.low < crossing.volume.value < crossing.volume.high
        widths.append(crossing.volume.high / crossing.volume.low)
    assert widths == sorted(widths)
    few = Inputs(local_checked=5, hosted_checked=5)
    (crossing,) = break_even(two(few), few).crossings
    assert crossing.volume.high is None
    assert crossing.never > 0.025


def test_the_same_question_has_the_same_answer() -> None:
    inputs = Inputs()
    assert break_even(two(inputs), inputs) == break_even(two(inputs), inputs)


def test_a_volume_that_the_uplink_does_not_carry_is_said_and_not_drawn() -> None:
    inputs = Inputs(volume=1e6, upload_bytes=1e6, uplink_mbit_s=1, hosted_retries=0)
    most = 1e6 / 8 * 730 * 3600 / 1e6
    found: BreakEven = break_even(two(inputs), inputs, volumes=(most, most + 1))
    assert found.costs[1].note == f"the uplink carries {most:,.0f} images a month, fewer than asked for"
    assert found.costs[0].note is None
    assert found.series["far"][0] is not None
    assert found.series["far"][1] is None
    assert None not in found.series["local"]


def test_a_dearer_image_never_crosses_and_a_dearer_box_neither() -> None:
    wrong = Inputs(local_acceptance=0.2, wrong_usd=1)
    assert "one more image costs more" in break_even(two(wrong), wrong).crossings[0].note
    box = Inputs(hardware_usd=100_000, local_s=60)
    assert "a full box costs more" in break_even(two(box), box).crossings[0].note


def test_the_cheapest_and_the_dearest_model_of_each_provider_are_priced_by_the_list() -> None:
    inputs = Inputs(image_tokens=1000, prompt_tokens=200, answer_tokens=50)
    unknown = Model("nobody", "nobody", "no-such-model")
    arms = {arm.target: arm for arm in hosted_arms([SONNET, HAIKU, MINI, unknown], inputs)}
    usage = Usage(prompt_tokens=1200, completion_tokens=50)
    for model in (SONNET, HAIKU, MINI):
        assert arms[model.target].price_usd == price(model.price_provider, model.name, usage).usd
        assert "genai-prices" in arms[model.target].basis
        assert arms[f"{model.target} (cached)"].price_usd < arms[model.target].price_usd
    assert "cheapest" in arms[HAIKU.target].label
    assert "taken to be the dearest" in arms[SONNET.target].label
    assert "only" in arms[MINI.target].label
    batch = rates("anthropic", SONNET.name)
    assert batch
    assert batch.batch_input_usd
    assert batch.batch_output_usd
    assert arms[f"{SONNET.target} (batch)"].price_usd == pytest.approx(
        (1200 * batch.batch_input_usd + 50 * batch.batch_output_usd) / 1e6
    )
    assert arms["reviews"].price_usd == REVIEWS_USD
    assert not any(name.startswith("nobody") for name in arms)


def test_the_best_model_of_a_provider_is_the_measured_one_once_two_of_them_were_tried() -> None:
    def labels(accepted: dict[str, tuple[int, int]]) -> dict[str, str]:
        made = hosted_arms([SONNET, HAIKU], Inputs(), accepted)
        return {arm.target: arm.label for arm in made if arm.target in (SONNET.target, HAIKU.target)}

    one_tried = labels({HAIKU.target: (20, 20)})
    assert "taken to be the dearest" in one_tried[SONNET.target]
    dearest_is_best = labels({SONNET.target: (19, 20), HAIKU.target: (10, 20)})
    assert "best of the 2 that were measured" in dearest_is_best[SONNET.target]
    assert "best" not in dearest_is_best[HAIKU.target]
    # Right about one of one is less sure than right about 19 of 20.
    cheapest_is_best = labels({SONNET.target: (1, 1), HAIKU.target: (19, 20)})
    assert list(cheapest_is_best) == [HAIKU.target]
    assert "cheapest, and best of the 2" in cheapest_is_best[HAIKU.target]


@pytest.mark.parametrize("name", [each.name for each in fields(Inputs)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_what_is_no_sensible_number_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidValue, match=name) as raised:
        Inputs(**{name: value})
    assert raised.value.param == name
    assert "\n" not in raised.value.message


def test_a_machine_that_takes_less_at_work_than_at_rest_is_refused() -> None:
    with pytest.raises(InvalidValue, match="idle_watts"):
        Inputs(watts=10, idle_watts=20)


def test_every_input_has_a_unit_or_is_a_plain_factor_and_a_reason() -> None:
    for each in fields(Inputs):
        assert each.metadata["reason"]
        assert each.metadata["unit"] or each.name == "local_s_factor"


def test_a_higher_price_costs_more_by_just_that() -> None:
    inputs = Inputs(hosted_retries=0, offline_share=0)
    dear, cheap = (at(1000, two(inputs, price_usd))["far"] for price_usd in (0.02, 0.01))
    assert dear - cheap == pytest.approx(1000 * 0.01 / inputs.hosted_acceptance)
