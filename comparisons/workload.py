"""What is to be read, by whom, and at what price: the inputs of the break-even, each with a default and its reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from comparisons.cost import price, rates
from comparisons.statistics import wilson
from models.errors import InvalidValue
from models.events import Usage

REVIEWS_USD = 0.01  # a picture, as reviews of vision APIs have it
HOURS_A_MONTH = 730.0
Kind = Literal["local", "hosted"]
Mode = Literal["standard", "batch", "cached"]


def _input(default: float | None, unit: str, reason: str, *, least: float = 0.0, most: float = 1e9) -> Any:
    return field(default=default, metadata={"unit": unit, "reason": reason, "least": least, "most": most})


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Every figure that the calculation rests on. Raises InvalidValue, naming the field, for one out of range."""

    volume: float = _input(10_000.0, "images a month", "a small office's scanner: 500 on each working day", least=1)
    image_tokens: float = _input(1600.0, "tokens", "a page of 1,000 x 1,200 px at a token for 750 px")
    prompt_tokens: float = _input(200.0, "tokens", "an instruction and the names of ten fields")
    answer_tokens: float = _input(100.0, "tokens", "ten short fields as JSON")
    local_s: float = _input(
        10.2,
        "s an image",
        "serving/bench/README.md: 17 tiles, 64 tokens of answer, SmolVLM2-256M's shape in int8-fast on two cores",
        least=1e-4,
        most=1e6,
    )
    local_s_factor: float = _input(
        1.25, "", "assumed: with 95 % the mean time lies within a quarter of the stated one", least=1, most=100
    )
    pages_per_hour: float | None = _input(
        None,
        "pages a box",
        "3600 / local_s: one after the other; give the measured rate where a box does several at once",
        least=1e-3,
    )
    local_acceptance: float = _input(
        0.9, "share", "not measured: as the hosted one, so that it decides nothing", least=0.001, most=1
    )
    local_checked: float = _input(50.0, "images", "assumed: images on which that rate was measured", least=1)
    local_retries: float = _input(0.0, "share", "a local answer is not asked for again", most=0.99)
    hosted_acceptance: float = _input(0.9, "share", "not measured: as the local one", least=0.001, most=1)
    hosted_checked: float = _input(50.0, "images", "assumed: images on which that rate was measured", least=1)
    hosted_retries: float = _input(
        0.02, "share", "requests that fail and are asked again, taken as paid: limits, timeouts, cut answers", most=0.99
    )
    wrong_usd: float = _input(0.05, "USD an image", "ten seconds of a clerk at $18 an hour put one wrong field right")
    watts: float = _input(65.0, "W", "a mini computer of eight cores at work")
    idle_watts: float = _input(15.0, "W", "the same at rest, which it is paid for around the clock")
    usd_per_kwh: float = _input(0.17, "USD", "about what a household in the United States pays", most=1000)
    hardware_usd: float = _input(600.0, "USD a box", "a mini computer of eight cores with 32 GB")
    life_years: float = _input(4.0, "years", "written off in equal parts, with no value left", least=0.05, most=100)
    on_hours: float = _input(HOURS_A_MONTH, "hours a month", "never switched off", least=0.1, most=HOURS_A_MONTH)
    busy_share: float = _input(
        0.6, "share", "of its hours that a box can be busy: images do not come evenly", least=0.01, most=1
    )
    local_operations_hours: float = _input(2.0, "hours a month", "updates, backups and a look at the logs")
    hosted_operations_hours: float = _input(0.5, "hours a month", "keys, bills and models that are retired")
    wage_usd: float = _input(60.0, "USD an hour", "an engineer's hour with all that goes with it")
    upload_bytes: float = _input(500_000.0, "bytes an image", "a page as JPEG in base64", least=1)
    uplink_mbit_s: float = _input(10.0, "Mbit/s", "an ordinary line's way up; it bounds the volume", least=1e-3)
    usd_per_gb: float = _input(0.0, "USD", "a flat rate; a mobile line has a price")
    offline_share: float = _input(
        0.002, "share", "an hour and a half a month without the line or the provider", most=0.99
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value, least, most = getattr(self, each.name), each.metadata["least"], each.metadata["most"]
            if value is None and each.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                shown = f"{value:g}" if isinstance(value, int | float) else "something else"
                raise InvalidValue(f"{each.name} must be {least:g} to {most:g}, got {shown}", param=each.name)
        if self.watts < self.idle_watts:
            raise InvalidValue("watts at work must not be less than idle_watts", param="watts")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to have the images read. `price_usd` of an image, 0 for a local one; `label` says what it stands for."""

    target: str
    kind: Kind
    inputs: Inputs
    price_usd: float = 0.0
    label: str = ""
    basis: str = ""


class Model(NamedTuple):
    """A hosted model, and under which name `genai-prices` has its provider."""

    provider: str
    price_provider: str
    name: str

    @property
    def target(self) -> str:
        return f"{self.provider}/{self.name}"


def hosted_arms(
    models: Iterable[Model], inputs: Inputs, accepted: Mapping[str, tuple[int, int]] | None = None
) -> list[Arm]:
    """The cheapest and the best model of each provider, at once, in a batch and with the instruction read from a cache.

    `accepted`: by target, how many of how many inputs it was right about. Where two of a provider's models were tried,
    the one whose share is the highest with certainty is the best; else the dearest stands for it. Last, the reviews'
    figure.
    """
    tried = {target: wilson(*counts).low for target, counts in (accepted or {}).items() if counts[1]}
    by_provider: dict[str, list[tuple[float, Model]]] = {}
    for model in models:
        usd = _price(model, inputs, "standard")
        if usd is not None:
            by_provider.setdefault(model.provider, []).append((usd[0], model))
    arms = []
    for priced in by_provider.values():
        ordered = sorted(priced)
        measured = [model for _, model in ordered if model.target in tried]
        chosen = {"cheapest": ordered[0][1], "best, which is taken to be the dearest": ordered[-1][1]}
        if len(ordered) == 1:
            chosen = {"only": ordered[0][1]}
        elif len(measured) > 1:
            best = max(measured, key=lambda model: tried[model.target])
            chosen = {"cheapest": ordered[0][1], f"best of the {len(measured)} that were measured": best}
            if best == ordered[0][1]:
                chosen = {f"cheapest, and best of the {len(measured)} that were measured": best}
        arms += [arm for which, model in chosen.items() for arm in _modes(model, which, inputs)]
    reviews = "what reviews say a picture costs, whatever the model"
    return [*arms, Arm(target="reviews", kind="hosted", inputs=inputs, price_usd=REVIEWS_USD, label=reviews)]


def _modes(model: Model, which: str, inputs: Inputs) -> list[Arm]:
    said: dict[Mode, str] = {"standard": "", "batch": " (batch)", "cached": " (cached)"}
    arms = []
    for mode, suffix in said.items():
        if found := _price(model, inputs, mode):
            label = f"{model.provider}'s {which}, {mode}"
            usd, basis = found
            arms.append(
                Arm(target=model.target + suffix, kind="hosted", inputs=inputs, price_usd=usd, label=label, basis=basis)
            )
    return arms


def _price(model: Model, inputs: Inputs, mode: Mode) -> tuple[float, str] | None:
    """US dollars an image and what they rest on; None where the price list has none."""
    prompt, answer = round(inputs.image_tokens + inputs.prompt_tokens), round(inputs.answer_tokens)
    if mode == "batch":
        found = rates(model.price_provider, model.name)
        if found is None or found.batch_input_usd is None or found.batch_output_usd is None:
            return None
        return (prompt * found.batch_input_usd + answer * found.batch_output_usd) / 1e6, found.basis
    usage = Usage(prompt_tokens=prompt, completion_tokens=answer)
    paid = price(model.price_provider, model.name, usage)
    if mode == "standard" or paid.usd is None:
        return None if paid.usd is None else (paid.usd, paid.basis)
    cached = price(model.price_provider, model.name, replace(usage, cached_tokens=round(inputs.prompt_tokens)))
    if cached.usd is None or not inputs.prompt_tokens or cached.usd == paid.usd:
        return None
    return cached.usd, f"{cached.basis}; if the whole instruction is read from the cache, which has a least length"
