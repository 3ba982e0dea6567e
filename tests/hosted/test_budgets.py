"""Budgets before a provider: what a request may cost is held before it leaves, and what it did cost is settled."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from comparisons.cost import price
from models.answerer import collect
from models.errors import BudgetSpent
from models.events import Failed, ImageReport, Usage
from models.request import GenerationSettings, Message, TextPart, Tool, ToolUse, question
from serving.hosted.budgets import Budgets, highest_price_usd
from serving.hosted.gate import Departure
from serving.hosted.hosted_model import HostedModel
from serving.hosted.providers import Provider
from serving.hosted.rows import PROVIDERS
from serving.keys import ApiKey, digest
from serving.spending import Budget, Entry, Spending, to_nano
from tests.hosted.wire_server import DONE, GOOD, WireServer, chunk, event, usage
from tests.serving.conftest import RunningService, picture, running

ASKED = question("What is red?", settings=GenerationSettings(max_tokens=10))
PRICED = {"price_provider": "openai", "models": ("gpt-4.1-mini",)}
COST = to_nano(price("openai", "gpt-4.1-mini", Usage(prompt_tokens=31, completion_tokens=2)).usd or 0)


@pytest.fixture
def spending(tmp_path: Path) -> Iterator[Spending]:
    account = Spending(tmp_path)
    yield account
    account.close()


@pytest.fixture
def far(ask_for: Callable[..., HostedModel], spending: Spending) -> HostedModel:
    return ask_for(gates=(Budgets(spending, unpriced_usd=0.1),), **PRICED)


def entry(spending: Spending) -> Entry:
    [found] = spending.entries()
    return found


@pytest.mark.asyncio
async def test_the_highest_price_is_held_while_it_runs_and_the_real_one_is_settled(
    wire: WireServer, far: HostedModel, spending: Spending
) -> None:
    wire.script = [chunk("re"), 0.3, *GOOD]
    asked = asyncio.ensure_future(collect(far.stream(ASKED)))
    await wire.asked.wait()
    held = entry(spending).held_nano
    finished = (await asked).finished
    assert held > COST == to_nano(finished.cost.usd)
    found = entry(spending)
    assert (found.nano, found.held_nano, found.assumed_nano, found.requests) == (COST, 0, 0, 1)


@pytest.mark.asyncio
async def test_a_spent_budget_lets_no_byte_leave(wire: WireServer, far: HostedModel, spending: Spending) -> None:
    spending.budgets = (Budget(nano=COST),)  # enough for what it costs, too little for what it may cost
    [failed] = [event async for event in far.stream(ASKED)]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, BudgetSpent)
    assert failed.egress.bytes_sent == 0
    assert wire.connections == 0
    assert spending.entries() == []


@pytest.mark.asyncio
async def test_what_a_provider_refused_or_never_got_costs_nothing(
    wire: WireServer, far: HostedModel, spending: Spending, ask_for: Callable[..., HostedModel]
) -> None:
    wire.status, wire.script, wire.content_type = 529, [b"{}"], "application/json"
    assert isinstance([event async for event in far.stream(ASKED)][-1], Failed)
    assert (entry(spending).nano, entry(spending).requests) == (0, 1)
    nobody = ask_for(gates=(Budgets(spending, unpriced_usd=0.1),), base_url="http://127.0.0.1:1/v1", **PRICED)
    assert isinstance([event async for event in nobody.stream(ASKED)][-1], Failed)
    assert (entry(spending).nano, entry(spending).requests) == (0, 1)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "script",
    [
        [chunk("re"), usage(31, 2)],
        [chunk("re"), event({"error": {"message": "busy", "code": 529}})],  # no refusal: it had begun to answer
        [*GOOD[:-2], DONE],
        [*GOOD[:-2], usage(10**400, 2), DONE],
    ],
    ids=["broke off", "broke off with a status", "told none", "told nonsense"],
)
async def test_without_a_whole_answers_cost_what_was_held_is_spent_and_said_to_be_assumed(
    wire: WireServer, far: HostedModel, spending: Spending, script: Any
) -> None:
    wire.script = script
    _ = [each async for each in far.stream(ASKED)]
    found = entry(spending)
    assert found.nano == found.assumed_nano > COST
    assert found.held_nano == 0


@pytest.mark.asyncio
async def test_a_reader_who_leaves_pays_the_highest_price(
    wire: WireServer, far: HostedModel, spending: Spending
) -> None:
    wire.script = [chunk("re"), 10.0]
    async with aclosing(far.stream(ASKED)) as events:
        await anext(events)
    assert entry(spending).assumed_nano > COST


def test_pictures_caches_tools_and_thinking_make_a_request_dearer() -> None:
    anthropic_row, openai_row = (next(row for row in PROVIDERS if row.name == name) for name in ("anthropic", "openai"))
    tool = ToolUse(tools=(Tool(name="paint"),))
    marked = TextPart(text="What is red?", cache="1h")
    seen = ImageReport(width=4000, height=4000, used_width=2000, used_height=2000, tiles=None, tokens=None, sha256="",
                       detail="auto")  # fmt: skip

    def highest(row: Provider, model: str, images: tuple[ImageReport, ...] = (), **more: Any) -> float:
        request = replace(ASKED, **more)
        departure = Departure(request=request, provider=row, model=model, images=images, body_bytes=1000)
        return highest_price_usd(departure) or 0

    plain = highest(anthropic_row, "claude-sonnet-5-5")
    assert plain == pytest.approx(1000 * 2e-6 + 10 * 1e-5)
    assert highest(anthropic_row, "claude-sonnet-5-5", (seen,)) == pytest.approx(plain + 6667 * 2e-6)
    assert highest(anthropic_row, "claude-sonnet-5-5", tool_use=tool) == pytest.approx(plain + 700 * 2e-6)
    hour = (Message(role="user", parts=(marked,)),)
    for more, dearer in (({"cache": "auto"}, 0.5e-6), ({"cache": "1h"}, 2e-6), ({"messages": hour}, 2e-6)):
        assert highest(anthropic_row, "claude-sonnet-5-5", **more) == pytest.approx(plain + 1000 * dearer)
    # It is written to a cache unasked, at a quarter more, and thinks.
    written = Usage(prompt_tokens=1000, completion_tokens=10 + 2048, cache_write_tokens=1000)
    assert highest(openai_row, "gpt-6-sol") == pytest.approx(price("openai", "gpt-6-sol", written).usd)
    assert highest(anthropic_row, "claude-opus-5-5") > 2048 * 1e-5  # its thinking cannot be switched off
    assert highest(openai_row, "gpt-4.1-mini") == pytest.approx(1000 * 0.4e-6 + 10 * 1.6e-6)
    assert highest_price_usd(Departure(request=ASKED, provider=replace(openai_row, price_provider=None), model="m",
                                       images=(), body_bytes=1)) is None  # fmt: skip


@pytest.mark.asyncio
async def test_a_request_without_a_price_counts_as_stated_elsewhere_and_as_nothing_on_this_device(
    ask_for: Callable[..., HostedModel], spending: Spending
) -> None:
    spending.budgets = (Budget(nano=to_nano(0.05)),)
    gate = Budgets(spending, unpriced_usd=0.1)
    await collect(ask_for(gates=(gate,)).stream(ASKED))
    assert (entry(spending).nano, entry(spending).unpriced) == (0, 1)
    elsewhere = ask_for(gates=(gate,), base_url="http://192.0.2.1:9/v1")
    [failed] = [event async for event in elsewhere.stream(replace(ASKED, policy="any"))]
    assert isinstance(failed, Failed)
    assert failed.error.type == "budget_spent"


@pytest.fixture
def loopback_openai(wire: WireServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Lets the row of OpenAI, prices included, lead to the wire server. Returns the environment with its key."""
    rows = [replace(row, base_url=f"http://127.0.0.1:{wire.port}/v1") for row in PROVIDERS if row.name == "openai"]
    monkeypatch.setattr("serving.services.PROVIDERS", rows)
    return {"OPENAI_API_KEY": "sk-far"}


@pytest.fixture
def poor(tmp_path: Path, loopback_openai: dict[str, str]) -> Iterator[RunningService]:
    """A service before a priced model on loopback: key `laptop` may spend nothing, `server` what the service may."""
    keys = tuple(
        ApiKey(name=name, sha256=digest(name), daily_usd=usd) for name, usd in (("laptop", 0), ("server", None))
    )
    with running(loopback_openai, models=("tiny-scenes",), keys=keys, data_dir=tmp_path, aliases={}) as service:
        yield service.ready()


@pytest.mark.asyncio
async def test_each_dialect_says_in_its_words_that_a_budget_is_spent(poor: RunningService, wire: WireServer) -> None:
    body = {"model": "openai/gpt-4.1-mini", "prompt": "What is red?"}
    answer = await asyncio.to_thread(poor.client.post, "/infer", json=body, headers={"x-api-key": "laptop"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (402, "budget_spent")
    assert "key laptop" in answer.json()["error"]["message"]
    hello: Any = [{"role": "user", "content": "What is red?"}]
    async with openai.AsyncOpenAI(base_url=f"{poor.url}/v1", api_key="laptop") as client:
        with pytest.raises(openai.RateLimitError) as quota:
            await client.chat.completions.create(model="openai/gpt-4.1-mini", messages=hello)
    assert quota.value.code == quota.value.type == "insufficient_quota"
    async with anthropic.AsyncAnthropic(base_url=poor.url, api_key="laptop") as client:
        with pytest.raises(anthropic.APIStatusError) as billing:
            await client.messages.create(model="openai/gpt-4.1-mini", max_tokens=9, messages=hello)
    assert (billing.value.status_code, billing.value.type) == (402, "billing_error")
    assert wire.connections == 0
    metrics = (await asyncio.to_thread(poor.client.get, "/metrics", headers={"x-api-key": "server"})).text
    assert 'nearfar_errors_total{type="budget_spent"} 3.0' in metrics  # the clients did not try again


@pytest.mark.asyncio
async def test_one_keys_empty_budget_is_not_anothers_and_metrics_tell_both(poor: RunningService) -> None:
    body = {"model": "openai/gpt-4.1-mini", "prompt": "What is red?"}
    headers = {"x-api-key": "server"}
    answer = await asyncio.to_thread(poor.client.post, "/infer", json=body, headers=headers)
    usd = answer.json()["cost"]["usd"]
    assert usd == COST / 1e9
    metrics = (await asyncio.to_thread(poor.client.get, "/metrics", headers=headers)).text
    figures = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    labels = 'key="server",route="",target="openai/gpt-4.1-mini"'
    assert float(figures[f"nearfar_spent_today_dollars{{{labels}}}"]) == usd
    assert float(figures['nearfar_budget_left_dollars{budget="the service"}']) == pytest.approx(5 - usd)
    assert float(figures['nearfar_budget_left_dollars{budget="key laptop"}']) == 0


@pytest.mark.asyncio
async def test_in_a_comparison_a_spent_budget_fails_its_target_alone(poor: RunningService) -> None:
    body = {"targets": ["local/tiny-scenes@int8", "openai/gpt-4.1-mini"], "prompt": "What is red?", "max_tokens": 2}
    headers = {"x-api-key": "laptop"}
    compared = (await asyncio.to_thread(poor.client.post, "/compare", json=body, headers=headers)).json()
    near, far = compared["results"]
    assert (near["ok"], far["error"]["type"]) == (True, "budget_spent")


@pytest.mark.asyncio
async def test_an_estimate_bounds_what_the_question_then_sends_and_costs(
    poor: RunningService, wire: WireServer
) -> None:
    image, prompt = picture(2000, 1000), "What is red?"
    sizes = {"text_bytes": len(prompt), "pictures": [{"width": 2000, "height": 1000, "bytes": len(image)}]}

    def ask(path: str, key: str = "server", **body: Any) -> Any:
        return poor.client.post(path, json=body, headers={"x-api-key": key}).json()

    near, far, _ = (await asyncio.to_thread(ask, "/estimate", **sizes))["estimates"]
    assert (near["target"], near["bytes"], near["usd"], near["leaves_device"]) == (
        "local/tiny-scenes@int8", 0, None, False)  # fmt: skip
    assert far["budget_left_usd"] == 5
    assert (far["destination"], wire.connections) == (f"127.0.0.1:{wire.port}", 0)
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    answer = await asyncio.to_thread(ask, "/infer", model=far["target"], prompt=prompt, images=[url])
    assert answer["egress"]["bytes_sent"] <= far["bytes"]
    assert answer["cost"]["usd"] <= far["usd"]
    [poorer] = (await asyncio.to_thread(ask, "/estimate", "laptop", targets=[far["target"]], **sizes))["estimates"]
    assert (poorer["usd"], poorer["budget_left_usd"]) == (far["usd"], 0)
    wrong = await asyncio.to_thread(ask, "/estimate", pictures=[{"width": 0, "height": 1, "bytes": 1}])
    assert wrong["error"]["type"] == "invalid_value"


@pytest.mark.asyncio
async def test_a_routes_budget_is_its_own_and_leads_on_where_it_is_spent(
    wire: WireServer, tmp_path: Path, loopback_openai: dict[str, str]
) -> None:
    routes = {"smart": ["openai/gpt-4.1-mini", "tiny-scenes"]}
    settings: dict[str, Any] = {"models": ("tiny-scenes",), "routes": routes, "aliases": {}, "data_dir": tmp_path}
    with running(loopback_openai, **settings, budgets={"smart": 0.0}) as service:
        service.ready()

        def ask(model: str) -> Any:
            return service.client.post("/infer", json={"model": model, "prompt": "What is red?"}).json()

        by_route, alone = [await asyncio.to_thread(ask, model) for model in ("smart", "openai/gpt-4.1-mini")]
        first, _ = by_route["attempts"]
        assert (first["error_type"], by_route["target"]) == ("budget_spent", "local/tiny-scenes@int8")
        assert "of the 0.00 USD a day for smart" in first["reason"]
        assert by_route["cost"]["usd"] == 0
        assert alone["cost"]["usd"] == COST / 1e9
        assert [(entry.purpose.route, entry.nano) for entry in service.services.spending.entries()] == [("", COST)]
    with running(loopback_openai, **settings) as service:  # after a restart, without the route's budget
        service.ready()
        wire.script = [chunk("", role="assistant"), usage(31, 0)]  # it breaks off, twice, before its first text
        answer = await asyncio.to_thread(ask, "smart")
        assert len(answer["attempts"]) == 3
        assert answer["cost"]["usd"] == pytest.approx(2 * 31 * 0.4e-6)
        assert "it may bill more" in answer["cost"]["basis"]
        alone_entry, routed = service.services.spending.entries()
        assert alone_entry.nano == COST
        assert (routed.purpose.route, routed.requests) == ("smart", 2)
        assert routed.nano == routed.assumed_nano > to_nano(answer["cost"]["usd"])
