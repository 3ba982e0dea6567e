"""API keys: made here, known by their hash alone, each with its own limits; secrets out of files. Knows no HTTP."""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from models.errors import InvalidValue, NearfarError, Overloaded
from models.reduction import Reduction
from models.request import Policy

MINUTE_S = 60.0


class Unauthorized(NearfarError):
    """No valid API key came with the request."""

    status = 401
    type = "unauthorized"


class RateLimited(Overloaded):
    """The key's own limit is reached, whatever room the service has."""

    type = "rate_limited"


class ApiKey(BaseModel):
    """A key as it is kept. Plain SHA-256 will do: a key is 256 random bits, which no list of guesses holds, so that
    there is nothing for a salt or a slow hash to protect, and every request has to be checked in microseconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="in the log, and whose caches are whose")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    policy: Policy | None = Field(default=None, description="tighter than the server's")
    reduce: Reduction | None = Field(default=None, description="of pictures before they leave, for the server's")
    requests_per_minute: int | None = Field(default=None, ge=1)
    concurrent_requests: int | None = Field(default=None, ge=1)
    daily_usd: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="what hosted models may cost this key a day (UTC)"
    )

    @field_validator("sha256")
    @classmethod
    def _opens_to_somebody(cls, value: str) -> str:
        if value == digest(""):
            raise ValueError("the hash of nothing: nearfar key NAME makes a key")
        return value


class NewKey(NamedTuple):
    """A key that is shown once, and the section of nearfar.toml that knows it again."""

    key: str
    section: str


def new_key(name: str) -> NewKey:
    """Raises pydantic's ValidationError for a name that no key may have."""
    key = f"nf_{secrets.token_urlsafe(32)}"
    kept = ApiKey(name=name, sha256=digest(key))
    return NewKey(key, f'[[keys]]\nname = "{kept.name}"\nsha256 = "{kept.sha256}"')


def secret(name: str, environment: Mapping[str, str]) -> str:
    """What NAME holds, or else the file that NAME_FILE names, without space around it; empty where neither is set.

    Raises InvalidValue for a file that cannot be read, and for one that holds nothing: without it all would be open.
    """
    file = environment.get(f"{name}_FILE", "").strip()
    if environment.get(name, "").strip() or not file:
        return environment.get(name, "").strip()
    try:
        found = Path(file).read_text().strip()
    except (OSError, ValueError) as error:  # UTF-8's, and that of a name that no file may have
        raise InvalidValue(f"the file that {name}_FILE names cannot be read") from error
    if not found:
        raise InvalidValue(f"the file that {name}_FILE names is empty")
    return found


def digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class _Use:
    """What a key is doing: when its requests of the last minute came, and how many run."""

    def __init__(self) -> None:
        self.came: deque[float] = deque()
        self.running = 0


class KeyRing:
    """All keys of a service and what they are doing. Used on the event loop's thread alone."""

    def __init__(self, keys: Sequence[ApiKey], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys, self._clock = tuple(keys), clock
        self._uses = {key.name: _Use() for key in keys}

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, *offered: str) -> ApiKey:
        """The key of the first offer that is one; an empty offer never is. Raises Unauthorized.

        Compared in constant time, and with all, so that time tells nothing about a key.
        """
        hashes = [digest(offer) for offer in offered if offer]
        found = [key for hashed in hashes for key in self._keys if hmac.compare_digest(hashed, key.sha256)]
        if not found:
            raise Unauthorized("a valid API key is required, as Authorization: Bearer or x-api-key")
        return found[0]

    @contextmanager
    def use(self, key: ApiKey) -> Iterator[None]:
        """One request of that key. Raises RateLimited, which says when to come again."""
        use, now = self._uses[key.name], self._clock()
        while use.came and use.came[0] <= now - MINUTE_S:
            use.came.popleft()
        if key.concurrent_requests is not None and use.running >= key.concurrent_requests:
            raise RateLimited(f"key {key.name} may have {key.concurrent_requests} requests at a time")
        if key.requests_per_minute is not None:
            if len(use.came) >= key.requests_per_minute:
                wait_s = math.ceil(use.came[0] + MINUTE_S - now)
                raise RateLimited(
                    f"key {key.name} may ask {key.requests_per_minute} times a minute", retry_after_s=wait_s
                )
            use.came.append(now)
        use.running += 1
        try:
            yield
        finally:
            use.running -= 1
