"""How many replicas, on what, and what Ray is told before it is imported. Imports no Ray."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.errors import InvalidValue
from models.machine import available_cores, compute_threads
from models.memory import default_budget
from serving.settings import Settings

NEEDS_RAY = "--ray needs Ray: pip install 'nearfar[ray]'"
APPLICATION = "nearfar"
DEPLOYMENT = "service"
MAX_REPLICAS = 1000
_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
# Ray reads them when it is imported or started, and its processes inherit them. On a cluster they belong into the
# environment of `ray start` on every machine.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.api.behind_ray.middlewares",
}
# Beside them, for a Ray of one's own. Without clusters it listens on loopback alone, here as on a Mac.
OF_ITS_OWN = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
}


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """How many at least and at most; Ray adds and removes some in between, as requests wait."""

    least: int = 1
    most: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= MAX_REPLICAS:
            raise InvalidValue(f"replicas: N or LEAST-MOST of 1 to {MAX_REPLICAS}, as 2 or 1-4", param="replicas")

    @classmethod
    def parse(cls, text: str) -> Replicas:
        """`2`, or `1-4`. Raises InvalidValue."""
        found = _RANGE.fullmatch(text.strip())
        least, most = (found[1], found[2] or found[1]) if found else ("0", "0")
        return cls(least=int(least), most=int(most))

    def __str__(self) -> str:
        return f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"

    def options(self, settings: Settings) -> dict[str, Any]:
        """As Ray's deployment takes them. More in hand than a replica has slots means that some wait."""
        if self.least == self.most:
            return {"num_replicas": self.least}
        scaling = {
            "min_replicas": self.least,
            "max_replicas": self.most,
            "target_ongoing_requests": settings.max_running,
            "upscale_delay_s": 5,
            "downscale_delay_s": 300,
        }
        return {"autoscaling_config": scaling}


def cpus_claimed(settings: Settings, *, own: bool) -> int:
    """By a replica, of its machine: on a cluster its threads. On a Ray of its own nothing: all run here, each with its
    share of threads, and what Ray counts in a container may be fewer cores than they have together.
    """
    cores = available_cores()
    return 0 if own else min(settings.threads or cores, cores)


def not_shared(settings: Settings) -> str | None:
    """Why replicas on several machines would not see the same comparisons; None where they do."""
    if not settings.records or (settings.database or "").startswith("postgres"):
        return None
    return (
        "replicas on several machines keep their comparisons apart: set NEARFAR_DATABASE=postgresql://USER@HOST/NAME, "
        "or NEARFAR_RECORDS=false"
    )


def share_of_this_machine(settings: Settings, replicas: Replicas) -> Settings:
    """Of one replica, where all of them run here and nothing else was said: threads and memory, in equal parts."""
    threads = settings.threads or max(1, compute_threads() // replicas.most)
    budget = settings.memory_budget or default_budget() // replicas.most
    return settings.model_copy(update={"threads": threads, "memory_budget": budget})


def as_given(settings: Settings) -> Mapping[str, Any]:
    """What a replica is to be told: all that was set here, by option, environment or file."""
    return settings.model_dump(exclude_unset=True, exclude={"config"})
