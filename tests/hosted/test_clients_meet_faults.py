"""The official SDKs and plain clients, this service, and a far model that fails in every way: each request has one end.

It is the whole answer, or one error in the client's own dialect, after no more than the text that had come until then.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

from serving.routes.breaker import Breaker, Health
from tests.hosted.clients import CLIENTS, Ask, Clients, Outcome, Tokens, chat_plain, clients_of
from tests.hosted.test_provider_faults import CASES, KEY, Case
from tests.hosted.wire_server import SPEECHES, Received, Reply, Speech, WireServer
from tests.serving.conftest import RunningService, running, wait_for

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "what colour is it?"
PATIENCE_S = 0.4
LATE = f"the answer was not whole within {PATIENCE_S:g} s"
UNASKED = "far called a tool, and was offered none"
TOGETHER = 12
EACH_WAY = ("openai chat, stream()", "anthropic, stream()", "infer", "compare")  # the others are among the slow tests
HOP_S = 1.5  # a longer Retry-After is not waited for
SILENT_HOP = {"first_token_s": 0.3}
WHOLE: dict[str, Callable[[Speech], Reply]] = {
    "plain": lambda speech: Reply(script=(speech.begin(), speech.text("re", "d"), speech.end())),
    "a byte each": lambda speech: Reply(
        script=[bytes([byte]) for byte in speech.begin() + speech.text("re", "d") + speech.end()]
    ),
    "without usage": lambda speech: Reply(
        script=(speech.begin(prompt=None), speech.text("re", "d"), speech.end(prompt=None, completion=None))
    ),
    "among pings": lambda speech: Reply(
        script=(*speech.pings, speech.begin(), *speech.pings, speech.text("re", "d"), *speech.pings, speech.end())
    ),
}
# More text than any model writes takes a second of SDKs' parsing for each client, and says nothing of dialects.
FAULTS = {case.name: case for case in CASES if len(case.text) < 1000}
NAMES = (*WHOLE, *FAULTS)
TELLS_TEXT = {name for name in CLIENTS if name.startswith(("openai", "anthropic")) and "stream" in name}


def model_of(name: str) -> str:
    """The model that answers so. It cannot be said in the prompt, which is taken out of errors."""
    return f"m{NAMES.index(name)}"


def replying(speech: Speech) -> Callable[[Received], Reply]:
    """Answers as the model does that is asked for."""
    replies = {model_of(name): case.reply for name, case in FAULTS.items()}
    replies |= {model_of(name): reply for name, reply in WHOLE.items()}
    return lambda received: replies[received.json["model"]](speech)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def far() -> AsyncIterator[dict[str, WireServer]]:
    """A server for each protocol."""
    async with AsyncExitStack() as stack:
        servers = [WireServer(reply_to=replying(speech)) for speech in SPEECHES]
        yield {
            speech.name: await stack.enter_async_context(server.listening())
            for speech, server in zip(SPEECHES, servers, strict=True)
        }


@pytest.fixture(scope="module")
def service(far: dict[str, WireServer]) -> Any:
    """With an endpoint for each protocol, and a route for each fault to a model of the other that answers well."""
    models = ",".join(map(model_of, NAMES))
    endpoints = tuple(
        f"{speech.name}-far={speech.scheme}http://127.0.0.1:{far[speech.name].port}{speech.path},{models}"
        for speech in SPEECHES
    )
    keys = {f"{speech.name.upper()}_FAR_API_KEY": KEY for speech in SPEECHES}
    routes = {
        f"{speech.name}-{model_of(name)}": [
            {
                "target": f"{speech.name}-far/{model_of(name)}",
                "deadline_s": HOP_S,
                **(SILENT_HOP if case.timeouts and not case.text else {}),
            },
            f"{other.name}-far/{model_of('plain')}",
        ]
        for speech, other in (SPEECHES, SPEECHES[::-1])
        for name, case in FAULTS.items()
    }
    with running(keys, models=("tiny-scenes",), endpoints=endpoints, routes=routes) as started:
        yield started.ready()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clients(service: RunningService) -> AsyncIterator[Clients]:
    async with clients_of(service.url, "any") as found:
        for speech in SPEECHES:  # the SDKs are imported with the first request, which takes a second
            await chat_plain(found, Ask(model=f"{speech.name}-far/{model_of('plain')}", prompt=PROMPT))
        yield found


async def each_asked(client: str, clients: Clients, targets: dict[str, str]) -> dict[str, Outcome]:
    """What becomes of each request, by its name; some at a time."""
    places = asyncio.Semaphore(TOGETHER)

    async def asked(name: str) -> Outcome:
        case = FAULTS.get(name)
        patience = {"timeout_s": PATIENCE_S} if case and case.timeouts and not waits(targets[name], case) else {}
        with_tool = bool(case and case.asked.tool_use)
        async with places:
            ask = Ask(model=targets[name], prompt=PROMPT, max_tokens=9, with_tool=with_tool, **patience)
            return await CLIENTS[client](clients, ask)

    return dict(zip(targets, await asyncio.gather(*map(asked, targets)), strict=True))


def waits(target: str, case: Case) -> bool:
    """A route that has a limit of its own for the first text."""
    return "/" not in target and not case.text


def expected_error(case: Case, client: str, speech: Speech) -> str:
    says = UNASKED if case.asked.tool_use and not client.startswith(("openai", "anthropic")) else case.says
    return LATE if case.timeouts else says.replace("far", f"{speech.name}-far", 1)


def forget_how_targets_fared(service: RunningService) -> None:
    """Those that failed for one client are asked for the next one, too."""
    health = service.services.routes._health
    for name in health:
        health[name] = Health(Breaker(clock=time.monotonic, rng=random.Random(0)))


async def check_the_service(service: RunningService) -> None:
    """It is idle and well, and tells no key."""
    wait_for(lambda: not service.server.server_state.tasks)
    metrics = (await asyncio.to_thread(service.client.get, "/metrics")).text
    assert KEY not in metrics
    assert (await asyncio.to_thread(service.client.get, "/ready")).status_code == 200


@pytest.mark.parametrize("client", CLIENTS)
async def test_every_client_gets_the_whole_answer_or_its_own_error(
    service: RunningService, clients: Clients, speech: Speech, client: str
) -> None:
    outcomes = await each_asked(client, clients, {name: f"{speech.name}-far/{model_of(name)}" for name in NAMES})
    for name in WHOLE:
        assert outcomes[name] == Outcome("red", tokens=None if "without" in name else Tokens(31, 2)), name
    for name, case in FAULTS.items():
        assert outcomes[name].error == expected_error(case, client, speech), name
        if client in TELLS_TEXT and not case.timeouts:
            assert outcomes[name].text == case.text, name
    await check_the_service(service)


@pytest.mark.parametrize(
    "client", [client if client in EACH_WAY else pytest.param(client, marks=pytest.mark.slow) for client in CLIENTS]
)
async def test_behind_a_route_every_client_gets_the_next_ones_answer_or_no_more_than_one_beginning(
    service: RunningService, clients: Clients, speech: Speech, client: str
) -> None:
    forget_how_targets_fared(service)
    outcomes = await each_asked(client, clients, {name: f"{speech.name}-{model_of(name)}" for name in FAULTS})
    for name, case in FAULTS.items():
        outcome = outcomes[name]
        read = "stream" in client and case.text
        called = case.asked.tool_use and client.startswith(("openai", "anthropic"))  # which is never taken back
        late = case.timeouts and case.text
        if case.status in (400, 413) or read or called or late:
            assert outcome.error == expected_error(case, client, speech), name
            assert outcome.text in ("", case.text), name
        else:
            assert (outcome.text, outcome.error) == ("red", None), name
    await check_the_service(service)
