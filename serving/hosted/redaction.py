"""What may be shown of a provider's own error message: one short line without keys, pictures and prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping

MAX_CHARACTERS = 160
MAX_READ_CHARACTERS = 2000  # the rest of a message is not looked at
REDACTED = "[...]"

# Keys as providers write them, also half masked ("sk-ab***yz"), and any long run that could be one, or a picture.
# A half masked one is looked for once a word, at its start, and so before the others: a match that may begin at any
# character takes the square of the word's length.
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
    line = _KEY_LIKE.sub(REDACTED, message[:MAX_READ_CHARACTERS])
    line = " ".join("".join(character if character.isprintable() else " " for character in line).split())
    return line if len(line) <= MAX_CHARACTERS else line[: MAX_CHARACTERS - 3].rstrip() + "..."
