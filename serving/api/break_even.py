"""`POST /break-even`: from which volume on the models here are cheaper. A calculation: nothing is asked or sent."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, create_model

from comparisons.break_even import FORMULAS, METHOD, ArmCost, Crossing, Span, break_even
from comparisons.measured import Measured, measure, measured_arms
from comparisons.store import Store
from comparisons.workload import Arm, Inputs, Model, hosted_arms
from models.errors import InvalidValue
from serving.api.body import Fields, read_json
from serving.api.records import owner_of, records_of
from serving.api.schemas import parse
from serving.api.security import require_key
from serving.settings import Settings

router = APIRouter(dependencies=[Depends(require_key)])


def _field(told: Mapping[str, Any], default: Any) -> Any:
    about = ", ".join(filter(None, (told["unit"], told["reason"])))
    about += "" if default is None else f"; {default:g} where it is left out"
    return Field(None, ge=told["least"], le=told["most"], strict=True, description=about)


_MEASURED = Field(False, description="times, right answers, failures and bytes of each target from the records")
_FIELDS: dict[str, Any] = {"measured": (bool, _MEASURED)} | {
    each.name: (float | None, _field(each.metadata, each.default)) for each in fields(Inputs)
}
BreakEvenBody: type[BaseModel] = create_model(
    "BreakEvenBody",
    __config__=ConfigDict(extra="forbid", frozen=True),
    __doc__="Fields of `POST /break-even`: what is left out has the default that the answer names.",
    **_FIELDS,
)


@router.post("/break-even")
async def break_even_of(request: Request) -> dict[str, Any]:
    """Cost of 1,000 accepted images here and at every provider, against the volume, and where they cross."""
    body = parse(BreakEvenBody, Fields(await read_json(request)))
    settings = stated_inputs(request.app.state.settings)
    models = request.app.state.services.priced_models()
    given = body.model_dump(exclude_none=True)
    found: list[Measured] = []
    if given.pop("measured"):
        owner = owner_of(request)
        found = await records_of(request).work(lambda store: measured_targets(store, owner))
    return await asyncio.to_thread(break_even_object, given, settings, models, found)


def measured_targets(store: Store, owner: str | None) -> list[Measured]:
    """What the records say of every target; blocks."""
    return [measure(target, results) for target, results in sorted(store.results(owner).items())]


def stated_inputs(settings: Settings) -> dict[str, float]:
    """What the settings say of electricity and hardware."""
    power, machine = settings.electricity, settings.hardware
    found = {"usd_per_kwh": power.usd_per_kwh} if power else {}
    if power and power.watts is not None:
        found |= {"watts": power.watts, "idle_watts": min(power.watts, Inputs().idle_watts)}
    return found | ({"hardware_usd": machine.usd, "life_years": machine.years} if machine else {})


def break_even_object(
    given: Mapping[str, float], settings: Mapping[str, float], models: Sequence[Model], found: Sequence[Measured] = ()
) -> dict[str, Any]:
    """The object of `POST /break-even`; `found` takes the place of assumptions about its targets.

    Raises InvalidValue for an input that is none, or is out of range.
    """
    unknown = sorted(given.keys() - {each.name for each in fields(Inputs)})
    if unknown:
        raise InvalidValue(f"there is no input {unknown[0][:64]!r}", param=unknown[0][:64])
    inputs = Inputs(**{**settings, **given})
    local = Arm(target="local", kind="local", inputs=inputs, label="a model on a machine of yours")
    accepted = {each.target: (each.accepted, each.checked) for each in found}
    arms = measured_arms([local, *hosted_arms(models, inputs, accepted)], found, inputs, given)
    result = break_even(arms, inputs)
    return {
        "volume": inputs.volume,
        "targets": [_target_object(cost) for cost in result.costs],
        "crossings": [_crossing_object(crossing) for crossing in result.crossings],
        "series": {"volumes": result.volumes, "usd_per_1000_accepted": result.series},
        "inputs": [_input_object(each, inputs, given, settings) for each in fields(Inputs)],
        "measured": [asdict(each) for each in found],
        "formulas": FORMULAS,
        "method": METHOD,
    }


def _target_object(cost: ArmCost) -> dict[str, Any]:
    arm = cost.arm
    return {
        "target": arm.target,
        "kind": arm.kind,
        "label": arm.label,
        "usd_per_1000_accepted": _span(cost.usd_per_1000, 4),
        "usd_per_month": round(cost.usd_a_month, 4),
        "parts_usd_per_1000_accepted": {name: round(usd, 4) for name, usd in cost.parts.items()},
        "price_usd_per_image": arm.price_usd if arm.kind == "hosted" else None,
        "price_basis": arm.basis or None,
        "boxes": cost.boxes,
        "most_images_per_month": None if cost.most_images is None else round(cost.most_images),
        "note": cost.note,
    }


def _crossing_object(crossing: Crossing) -> dict[str, Any]:
    return {
        "local": crossing.local,
        "hosted": crossing.hosted,
        "volume": _span(crossing.volume, 0),
        "for_good_from": None if crossing.for_good is None else round(crossing.for_good),
        "share_of_draws_without": crossing.never,
        "text": crossing.note,
    }


def _span(span: Span, digits: int) -> dict[str, float | None]:
    return {name: None if value is None else round(value, digits) for name, value in span._asdict().items()}


def _input_object(
    each: Any, inputs: Inputs, given: Mapping[str, float], settings: Mapping[str, float]
) -> dict[str, Any]:
    told = each.metadata
    origin, reason = "default", told["reason"]
    if each.name in given:
        origin, reason = "given", "as you say"
    elif each.name in settings:
        origin, reason = "settings", "as electricity and hardware in the settings say"
    return {
        "name": each.name,
        "value": getattr(inputs, each.name),
        "unit": told["unit"],
        "origin": origin,
        "reason": reason,
        "least": told["least"],
        "most": told["most"],
    }
