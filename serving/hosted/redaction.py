"""What may be shown of a provider's own error message: one short line without keys, pictures and prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping

MAX_CHARACTERS = 160
REDACTED = "[...]"

# Keys as providers write them, also half masked ("sk-ab***yz"), and any long run that could be one, or a picture.
# The masked ones begin where a word does, and so come first: tried at each of its characters, they would take the
# square of its length.
_KEY_LIKE = re.compile(
    r"(?<!\S)\S*\*\*\S*|\b(?:Bearer\s+\S+|(?:sk|pk|rk|key)-[^\s'\"]+|AIza\S+)|[A-Za-z0-9+/=_\-]{28,}", re.I
)


def quotable(body: object, secrets: tuple[str, ...]) -> str:
    """The `message` of an error body, cleaned, without any of `secrets`; empty where there is none."""
    if isinstance(body, list) and body:  # Gemini's compatible endpoint wraps the object in a list
        body = body[0]
    if isinstance(body, Mapping) and isinstance(body.get("error"), Mapping):
        body = body["error"]
    message = body.get("message") if isinstance(body, Mapping) else None
    if not isinstance(message, str):
        return ""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        message = message.replace(secret, REDACTED)
    line = _KEY_LIKE.sub(REDACTED, message)
    line = " ".join("".join(character if character.isprintable() else " " for character in line).split())
    return line if len(line) <= MAX_CHARACTERS else line[: MAX_CHARACTERS - 3].rstrip() + "..."
