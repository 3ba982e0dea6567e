"""One question, one comparison or one data set without a server: what the command line asks itself."""

from __future__ import annotations

import random
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

from comparisons.measures import EXACTLY, Measure, Tolerance
from comparisons.runner import Compared, CompareEvent
from comparisons.runner import compare as run_comparison
from models.answerer import whole
from models.errors import NearfarError
from models.reduction import settled
from models.request import AnswerRequest, Task
from serving.api.schemas import answer_object, comparison_object
from serving.records import Asked, blind_object, two_sides
from serving.services import Services
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


def _by_settings(request: AnswerRequest, settings: Settings, *, compared: bool = False) -> AnswerRequest:
    """The request as the command line asks it, under the settings' policy."""
    reduction = settled(request.reduction or settings.reduce, compared=compared)
    return replace(request, policy=settings.policy, reduction=reduction)


async def infer_once(
    settings: Settings, environment: Mapping[str, str], request: AnswerRequest, model: str | None
) -> dict[str, Any]:
    """The object of `POST /infer`, without a server. `model` None is the default target."""
    async with loaded(settings, environment) as services:
        target = services.targets().choose(model, settings.policy)
        answer = await whole(target.answerer, _by_settings(request, settings))
        return answer_object(f"inf_{secrets.token_hex(8)}", answer.text, answer.finished)


async def compare_once(
    settings: Settings,
    environment: Mapping[str, str],
    request: AnswerRequest,
    names: Sequence[str],
    *,
    task: Task,
    reference: str | None,
    on_event: Callable[[CompareEvent], None],
    measure: Measure = "exact",
    tolerance: Tolerance = EXACTLY,
    repeats: int = 1,
    judge: str | None = None,
    blind: bool = False,
) -> dict[str, Any]:
    """The object of `POST /compare`, without a server, and kept as there; `on_event` sees each event as it comes.

    `blind`: of two of the targets, on sides by chance, as there.
    """
    request = _by_settings(request, settings, compared=True)
    async with loaded(settings, environment) as services:
        chosen = services.targets().choose_several(names, settings.policy)
        if blind:
            chosen = await two_sides(services.records, "", chosen)
        judging = services.targets().choose(judge, settings.policy) if judge else None
        asked = Asked(
            request=request,
            task=task,
            reference=reference,
            owner="",
            targets=tuple(chosen),
            measure=measure,
            tolerance=tolerance,
            repeats=repeats,
            judge=judging.name if judging else None,
            blind=blind,
        )
        await services.records.check()
        events = run_comparison(
            request,
            [target.answerer for target in chosen],
            reference=reference,
            parallel=False,
            rng=random.SystemRandom(),
            comparison_id=f"cmp_{secrets.token_hex(8)}",
            measure=measure,
            tolerance=tolerance,
            repeats=repeats,
            judge=judging.answerer if judging else None,
        )
        async with aclosing(events):
            async for event in events:
                on_event(event)
                if isinstance(event, Compared):
                    shown = comparison_object(event.comparison, f"req_{secrets.token_hex(8)}")
                    await services.records.keep(asked, event.comparison, shown)
                    return blind_object(shown) if blind else shown
    raise NearfarError("the comparison ended without a result")
