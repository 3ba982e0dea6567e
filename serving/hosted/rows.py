"""The hosted providers as rows of data, the user's own endpoints, and which of them can be used now."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple
from urllib.parse import urlsplit

from models.errors import InvalidValue
from serving.hosted.pictures import Limits
from serving.hosted.providers import API_VERSION, NO_KEY, Declared, Protocol, Provider, Retired, Thinking
from serving.keys import secret

_MESSAGES = "messages+"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def _effort(effort: str, *, headroom_tokens: int = 0) -> Thinking:
    shown = "none" if effort == "none" else f"{effort} effort"
    return Thinking(body={"reasoning_effort": effort}, shown=shown, headroom_tokens=headroom_tokens)


# Models: they see pictures, genai-prices knows their price, and by default they answer at temperature 0 without hidden
# thinking, so that they compare fairly. A model is added by its name.
#
# Anthropic: https://platform.claude.com/docs/en/models/sonnet-5-5/migration-guide (read 2026-11). Its API's version of
# 2026-10-21 refuses every sampling parameter. Pictures may have 8000 px, in a request with more than 20 of them 2000,
# and 5 MB in base64.
# OpenAI: https://developers.openai.com/api/docs/guides/reasoning; what comes after gpt-5.0 can leave thinking out.
# Gemini: https://ai.google.dev/gemini-api/docs/openai; its Flash models think least, if any, at "minimal".
# What is declared is the provider's word for its usual terms, at the address beside it (2026-11).
PROVIDERS = (
    Provider(
        name="anthropic",
        base_url="https://api.anthropic.com",
        models=("claude-sonnet-5-5", "claude-haiku-5-5"),
        protocol="messages",
        api_version=API_VERSION,
        api_key_env="ANTHROPIC_API_KEY",
        needs_key=True,
        price_provider="anthropic",
        label="Anthropic",
        fixed_sampling=("claude-",),
        never_forced=("claude-sonnet-5-5",),
        thinking=(
            (
                "claude-sonnet-5-5",
                Thinking(
                    body={"thinking": {"type": "between_tools"}, "output_config": {"effort": "low"}},
                    shown="none before the answer, notes between tool calls; low effort",
                ),
            ),
            (
                "claude-haiku-5-5",
                Thinking(
                    body={"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}},
                    shown="none; low effort",
                ),
            ),
            (
                "claude-",
                Thinking(
                    body={"output_config": {"effort": "low"}},
                    shown="as the model does by itself at low effort",
                    headroom_tokens=2048,
                ),
            ),
        ),
        picture_limits=Limits(edge_px=2000, bytes=5_000_000 * 3 // 4),
        body_bytes=32 * 2**20,
        declared=Declared(
            region="global, unless the workspace says otherwise",
            retention="deleted within 30 days, kept longer where it breaks the usage policy",
            training="not used, by the commercial terms",
            source="https://privacy.claude.com/en/articles/7996866-how-long-do-you-store-my-organization-s-data",
        ),
        retired=(Retired("claude-sonnet-4-20250514", known_as="claude-4-sonnet", when="June 2026"),),
    ),
    Provider(
        name="openai",
        base_url="https://api.openai.com/v1",
        models=("gpt-4.1-mini", "gpt-4.1"),
        api_key_env="OPENAI_API_KEY",
        needs_key=True,
        price_provider="openai",
        label="OpenAI",
        max_tokens_field="max_completion_tokens",
        fixed_sampling=("o1", "o3", "o4", "gpt-5", "gpt-6"),
        thinking=(
            ("gpt-4", Thinking(shown="none")),
            ("gpt-5-pro", _effort("high", headroom_tokens=16_384)),
            ("gpt-5.", _effort("none")),
            ("gpt-5", _effort("minimal", headroom_tokens=1024)),
            *((family, _effort("low", headroom_tokens=2048)) for family in ("o1", "o3", "o4", "gpt-6")),
        ),
        declared=Declared(
            retention="up to 30 days in logs that are kept against abuse",
            training="not used, unless the customer agrees to it",
            source="https://developers.openai.com/api/docs/guides/your-data",
        ),
    ),
    Provider(
        name="gemini",
        base_url="https://generativelanguage.googleapis.com/v1beta/openai",
        models=("gemini-3.5-flash-lite",),
        api_key_env="GEMINI_API_KEY",
        needs_key=True,
        price_provider="google",
        label="Google Gemini",
        thinking=tuple(
            (f"gemini-{version}-flash", _effort("minimal", headroom_tokens=512))
            for version in ("3", "3.1", "3.5", "3.6")
        ),
        declared=Declared(
            retention="55 days, against abuse",
            training="paid services: not used; unpaid ones: used",
            source="https://ai.google.dev/gemini-api/docs/usage-policies",
        ),
    ),
    Provider(
        name="openrouter",
        base_url="https://openrouter.ai/api/v1",
        models=("qwen/qwen3-vl-8b-instruct",),
        api_key_env="OPENROUTER_API_KEY",
        needs_key=True,
        price_provider="openrouter",
        label="OpenRouter",
        thinking=(("qwen/qwen3-vl-8b-instruct", Thinking(shown="none")),),
        declared=Declared(
            retention="as the provider does that it routes to",
            training="as the provider does that it routes to",
            source="https://openrouter.ai/docs/guides/privacy/provider-logging",
        ),
    ),
)


class Available(NamedTuple):
    """A provider that can be asked now. The key stays out of any repr."""

    provider: Provider
    key: str

    def __repr__(self) -> str:
        return f"Available({self.provider.name!r})"


def with_aliased(providers: Sequence[Provider], aliases: Mapping[str, str]) -> list[Provider]:
    """The rows with the models that aliases stand for, unless they are retired."""
    wanted = [target.partition("/") for target in aliases.values()]
    found = []
    for row in providers:
        more = [model for name, _, model in wanted if name == row.name and model]
        gone = [retired.model for retired in row.retired]
        models = dict.fromkeys([*row.models, *(model for model in more if model not in gone)])
        found.append(replace(row, models=tuple(models)))
    return found


def alias_notice(alias: str, target: str) -> str:
    """What somebody is told who asks by an alias: what it stands for, and that the model of that name is gone."""
    said = f"{alias} stands for {target} here, as configured."
    for row in PROVIDERS:
        for retired in row.retired:
            if retired.known_as == alias:
                said += f" {row.label} retired {retired.model} in {retired.when}."
    return said


def absent(providers: Sequence[Provider], present: Sequence[Provider]) -> dict[str, str]:
    """Targets that cannot be asked, by name, and why: their provider's key is missing, or it serves them no more."""
    here = {row.name for row in present}
    found = {}
    for row in providers:
        for model in row.models if row.name not in here else ():
            found[f"{row.name}/{model}"] = (
                f"{row.name}/{model} needs a key: neither {row.api_key_env} nor {row.api_key_env}_FILE is set"
            )
        for retired in row.retired:
            found[f"{row.name}/{retired.model}"] = f"{row.label} retired {retired.model} in {retired.when}"
    return found


def parse_endpoint(text: str) -> Provider:
    """An endpoint of the user's own: `far=http://127.0.0.1:9001/v1,tiny-scenes@fp32` is NAME=URL,MODEL[,MODEL].

    It speaks chat completions, or Anthropic Messages where the URL begins with `messages+`; then it has no `/v1`. A key
    is taken from NAME_API_KEY where that is set, which must not be a provider's own.
    Raises InvalidValue. Its message never repeats the URL, which may hold a password.
    """
    name, _, rest = text.strip().partition("=")
    base_url, *models = [piece.strip() for piece in rest.split(",")]
    protocol: Protocol = "messages" if base_url.startswith(_MESSAGES) else "chat_completions"
    base_url = base_url.removeprefix(_MESSAGES)
    if not _NAME.fullmatch(name) or name in ("local", *(row.name for row in PROVIDERS)):
        raise _malformed("NAME is lower-case letters, digits, dots and dashes, and not 'local' or a provider's")
    try:
        url = urlsplit(base_url)
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        good = False
    if not good or any(character.isspace() for character in base_url):
        raise _malformed("URL begins with http:// or https:// and a host")
    if url.username or url.password or url.query or url.fragment:
        raise _malformed("URL has no password, query or fragment")
    if not models or not all(models) or any(character.isspace() for model in models for character in model):
        raise _malformed("at least one MODEL follows the URL")
    return Provider(
        name=name,
        base_url=base_url.rstrip("/"),
        models=tuple(dict.fromkeys(models)),
        protocol=protocol,
        api_version=API_VERSION if protocol == "messages" else None,
        api_key_env=re.sub(r"[.-]", "_", name.upper()) + "_API_KEY",
        needs_key=False,
    )


def available(providers: Sequence[Provider], environment: Mapping[str, str]) -> list[Available]:
    """Those that need no key, and those whose key is set in `environment`, itself or as the name of a file in
    NAME_FILE. Being available does not enable one. Raises InvalidValue for a file that cannot be read.
    """
    found = []
    for provider in providers:
        key = secret(provider.api_key_env, environment) if provider.api_key_env else ""
        if key or not provider.needs_key:
            found.append(Available(provider, key or NO_KEY))
    return found


def _malformed(why: str) -> InvalidValue:
    return InvalidValue(f"an endpoint is NAME=URL,MODEL[,MODEL]: {why}", param="endpoints")
