"""What an answer cost, and what a request will cost at most, by the price list that genai-prices ships.

Both are estimates, and no request is made for them. A price that is not known is None, and the basis says why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from models.events import Cost, Usage

LOCAL_COST = Cost(usd=0.0, basis="runs on this machine; electricity and hardware are not counted")
# Anthropic counts a token for 750 px, OpenAI's 4.1-mini 1.62 for each 32 x 32 px. Two of OpenAI's that are no row's
# count more, and what they cost is known when they have answered: 4.1-nano 2.46, 4o-mini 5667 for each 512 x 512 px.
PX_PER_TOKEN = 600
MIN_PICTURE_TOKENS = 1200  # Gemini counts up to 1120 for a picture, however small
TOOL_TOKENS = 700  # what a provider says of tools to its model, beside the tools themselves
_CHECKED = re.compile(r"(?:checked|verified)(?: on)? (\d{4}-\d{2}-\d{2})")


def price(provider: str, model: str, usage: Usage) -> Cost:
    """The answer's price. `provider` is genai-prices' name for it; `usage.prompt_tokens` includes those of a cache."""
    try:
        import genai_prices
    except ImportError:
        return Cost(usd=None, basis='no price list: pip install "nearfar[hosted]"')
    data = f"genai-prices {genai_prices.__version__}"
    if usage.prompt_tokens is None or usage.completion_tokens is None:
        return Cost(usd=None, basis=f"the provider reported no token counts to price by {data}")
    try:
        counts = genai_prices.Usage(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            input_image_tokens=usage.image_tokens,
            cache_read_tokens=usage.cached_tokens,
            cache_write_tokens=usage.cache_write_tokens,
            cache_write_1h_tokens=usage.cache_write_1h_tokens,
        )
        found = genai_prices.calc_price(counts, model, provider_id=provider)
    except LookupError:
        return Cost(usd=None, basis=f"{data} has no price for {provider} {model}")
    except ValueError:  # below 0, or more tokens read from a cache than the prompt has, or such
        return Cost(usd=None, basis=f"the token counts that the provider reported do not go together, says {data}")
    updated = found.auto_update_timestamp
    dated = f"as updated {updated:%Y-%m-%d}" if updated else f"its bundled prices, {_data_date()}"
    basis = f"estimate by {data}, {dated}, as {found.provider.id} {found.model.id}, from the reported tokens"
    return Cost(usd=float(found.total_price), basis=basis)


def together(costs: Sequence[Cost | None]) -> Cost:
    """What several askings for one answer cost: None where one of them is not known."""
    known = [cost.usd for cost in costs if cost and cost.usd is not None]
    if len(costs) == 1:
        return costs[0] or Cost(usd=None, basis="the one asking told no cost")
    if len(known) < len(costs):
        unknown = len(costs) - len(known)
        return Cost(usd=None, basis=f"of {len(costs)} askings {unknown} told no cost; the others {dollars(sum(known))}")
    bases = dict.fromkeys(cost.basis for cost in costs if cost)
    return Cost(usd=sum(known), basis=f"{len(costs)} askings together: {'; '.join(bases)}")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a request costs at most; `usd` is None where no price is known."""

    usd: float | None
    prompt_tokens: int
    completion_tokens: int
    basis: str


def estimate(
    provider: str | None,
    model: str,
    *,
    text_bytes: int,
    pictures: Sequence[tuple[int, int]] = (),
    max_tokens: int,
    tools: bool = False,
    caching: Literal["5m", "1h"] | None = None,
) -> Estimate:
    """The price of a request before it is sent: more than it should come to, so that a budget holds.

    `text_bytes`: of all text in UTF-8, for a token is a byte at least. `pictures`: width and height as sent.
    `max_tokens`: of the answer, hidden thinking included. `caching`: the prompt may be written to a cache, for
    that long at most.
    """
    shown = sum(max(MIN_PICTURE_TOKENS, math.ceil(width * height / PX_PER_TOKEN)) for width, height in pictures)
    prompt = text_bytes + shown + tools * TOOL_TOKENS
    plain = Usage(prompt_tokens=prompt, completion_tokens=max_tokens)
    if provider is None:
        return Estimate(usd=None, prompt_tokens=prompt, completion_tokens=max_tokens, basis="no price is known")
    ways = [plain]
    if caching:
        ways.append(replace(plain, cache_write_tokens=prompt))
    if caching == "1h":
        ways.append(replace(plain, cache_write_tokens=prompt, cache_write_1h_tokens=prompt))
    costs = [price(provider, model, usage) for usage in ways]
    known = [cost.usd for cost in costs if cost.usd is not None]
    basis = f"at most {prompt} tokens of prompt and {max_tokens} of answer, a token a byte of text"
    return Estimate(
        usd=max(known, default=None),
        prompt_tokens=prompt,
        completion_tokens=max_tokens,
        basis=f"{basis}; {costs[0].basis.removesuffix(', from the reported tokens')}",
    )


@dataclass(frozen=True, kw_only=True)
class Rates:
    """US dollars for a million tokens, answered at once and in a batch. None: not known."""

    input_usd: float
    output_usd: float
    batch_input_usd: float | None
    batch_output_usd: float | None
    basis: str


def rates(provider: str, model: str) -> Rates | None:
    """A model's price at small prompts; None where it is not known."""
    try:
        import genai_prices

        counts = genai_prices.Usage(input_tokens=1000), genai_prices.Usage(output_tokens=1000)
        found = [
            genai_prices.calc_price(each, model, provider_id=provider, price_context=context)
            for context in ({}, {"processing": "batch"})
            for each in counts
        ]
    except (ImportError, LookupError, ValueError):
        return None
    has_batch = any(variant.when == {"processing": "batch"} for variant in found[0].model.price_variants or ())
    at_once_in, at_once_out, batch_in, batch_out = (round(float(each.total_price) * 1000, 6) for each in found)
    return Rates(
        input_usd=at_once_in,
        output_usd=at_once_out,
        batch_input_usd=batch_in if has_batch else None,
        batch_output_usd=batch_out if has_batch else None,
        basis=f"genai-prices {genai_prices.__version__}, {_data_date()}, at small prompts",
    )


def context_tokens(provider: str, model: str) -> int | None:
    """How long prompt and answer of a model may be together, by the same list; None where it is not known."""
    try:
        import genai_prices

        return genai_prices.calc_price(genai_prices.Usage(), model, provider_id=provider).model.context_window
    except (ImportError, LookupError, ValueError):
        return None


def cache_saving(provider: str, model: str, usage: Usage) -> float | None:
    """US dollars that the cache saved, below 0 where writing to it cost more. None: price or counts are unknown."""
    if usage.cached_tokens is None and usage.cache_write_tokens is None:
        return None
    without = replace(usage, cached_tokens=None, cache_write_tokens=None, cache_write_1h_tokens=None)
    dear, paid = (price(provider, model, each).usd for each in (without, usage))
    return None if dear is None or paid is None else dear - paid


@cache
def _data_date() -> str:
    """How old the bundled prices are. The package names no day of its own, and its files' times are no release's."""
    from genai_prices.data import providers

    notes = [model.price_comments or "" for provider in providers for model in provider.models]
    days = [day for note in notes for day in _CHECKED.findall(note)]
    return f"the last check noted in them {max(days)}" if days else "their day is not known"


def dollars(usd: float) -> str:
    """In words: three digits of what is little, and nothing only for nothing."""
    if usd == 0:
        return "$0"
    size = abs(usd)
    return f"{'-' * (usd < 0)}${f'{size:,.2f}' if size >= 0.1 else f'{size:.3g}'}"
