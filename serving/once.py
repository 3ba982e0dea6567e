"""One question without a server: the same services, targets and objects as over HTTP, in this process."""

from __future__ import annotations

import random
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from comparisons.runner import Compared, CompareEvent, compare
from models.answerer import collect
from models.errors import NearfarError
from models.request import AnswerRequest
from serving.api.schemas import answer_object, comparison_object
from serving.app import Services
from serving.settings import Settings


@asynccontextmanager
async def loaded(settings: Settings, environment: Mapping[str, str]) -> AsyncIterator[Services]:
    """Services with their models loaded; raises BundleError and its kin where one does not load."""
    services = Services(settings, environment)
    try:
        await services.load()
        services.targets()
        yield services
    finally:
        await services.aclose()


async def infer_once(
    settings: Settings, environment: Mapping[str, str], request: AnswerRequest, model: str | None
) -> dict[str, Any]:
    """The object of `POST /infer`. `model` None is the default target."""
    async with loaded(settings, environment) as services:
        target = services.targets().choose(model, settings.policy)
        text, finished = await collect(target.answerer.stream(request))
        return answer_object(f"inf_{secrets.token_hex(8)}", text, finished)


async def compare_once(
    settings: Settings,
    environment: Mapping[str, str],
    request: AnswerRequest,
    names: Sequence[str],
    *,
    reference: str | None,
    on_event: Callable[[CompareEvent], None],
) -> dict[str, Any]:
    """The object of `POST /compare`; `on_event` sees each event as it comes."""
    async with loaded(settings, environment) as services:
        chosen = services.targets().choose_several(names, settings.policy)
        events = compare(
            request,
            [target.answerer for target in chosen],
            reference=reference,
            parallel=False,
            rng=random.SystemRandom(),
            comparison_id=f"cmp_{secrets.token_hex(8)}",
        )
        async with aclosing(events):
            async for event in events:
                on_event(event)
                if isinstance(event, Compared):
                    return comparison_object(event.comparison, f"req_{secrets.token_hex(8)}")
    raise NearfarError("the comparison ended without a result")
