"""The service as a Ray Serve application: every replica is one service of `create_app`, with models of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve._private import replica as internals

from models.errors import Unavailable
from serving.app import create_app
from serving.logs import set_up
from serving.metrics import merged
from serving.ray_settings import APPLICATION, DEPLOYMENT, not_shared
from serving.settings import Settings, check_names

FIGURES_WITHIN_S = 2.0  # of the other replicas: one that is slower is missing from /metrics
ROOM = 64  # requests of one replica that wait for no engine: hosted models, records, probes
FULL_RETRY_S = 1
log = logging.getLogger("nearfar.ray")


def application(args: dict[str, Any]) -> serve.Application:
    """What a config file of `serve deploy` names as `import_path`: its `args` are settings as in nearfar.toml.

    Its `deployments` may set replicas and autoscaling. Raises InvalidValue for what is no setting.
    """
    check_names(args, "args")
    return deployment(args).bind()


def deployment(given: Mapping[str, Any], **options: Any) -> serve.Deployment:
    """The deployment of services with those settings, over what each machine has in environment and nearfar.toml.

    Requests for local models are turned away by the replica itself, which knows how many wait for its engine. Ray does
    so only where even those that wait for nothing are too many, with the same status.
    """
    settings = Settings(**given)

    def build() -> FastAPI:
        return replica_app(dict(given))

    return serve.deployment(
        serve.ingress(build)(Replica),
        name=DEPLOYMENT,
        max_ongoing_requests=settings.max_waiting + ROOM,
        max_queued_requests=settings.max_waiting,
        backpressure_config={"status_code": 429, "retry_after_s": FULL_RETRY_S},
        graceful_shutdown_timeout_s=settings.drain_s,
        health_check_period_s=5,
        **options,
    )


def replica_app(given: Mapping[str, Any]) -> FastAPI:
    """The application of one replica, in its own process."""
    settings = Settings(**given)
    set_up(settings.log_format)
    _bind_to_this_node()
    if len(ray.nodes()) > 1 and (missing := not_shared(settings)):
        log.warning(missing)
    app = create_app(settings)
    app.state.exposition = figures_of_all
    return app


def _bind_to_this_node() -> None:
    """Ray binds its servers to the node's address, but that one of a replica which takes pickles (2.60): to all."""
    add_port = internals.add_port_to_grpc_server

    def add(server: Any, address: str) -> Any:
        return add_port(server, address.replace("[::]", ray.util.get_node_ip_address()))

    internals.add_port_to_grpc_server = add


class Replica:
    """What Ray asks of a replica beside its HTTP application, which `serve.ingress` gives it as `app`."""

    app: FastAPI

    async def check_health(self) -> None:
        """Waits until the models are loaded: no request comes before. Raises Unavailable, and Ray makes a new one."""
        await asyncio.shield(self.app.state.loading)
        if reason := self.app.state.services.not_ready():
            raise Unavailable(reason)

    async def figures(self) -> tuple[str, bytes]:
        """Its name and its metrics."""
        return serve.get_replica_context().replica_id.unique_id, self.app.state.metrics.text()


async def figures_of_all() -> bytes:
    """`GET /metrics`, whichever replica is asked: those of all, each with the label `replica`."""
    asked = serve.get_deployment_handle(DEPLOYMENT, APPLICATION).broadcast("figures")
    found = await asked.results_async(timeout_s=FIGURES_WITHIN_S, return_exceptions=True)
    return merged(dict(each for each in found if isinstance(each, tuple)))
