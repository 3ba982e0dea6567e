"""`nearfar serve --ray`: a Ray of its own or one that runs, the application on it, and its end."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from http.client import HTTPException
from typing import Any, NoReturn

from comparisons.egress import is_loopback_host
from models.bundle import Bundle
from models.errors import InvalidValue, Unavailable
from serving.child import OPENER, free_port
from serving.local_models import model_folders
from serving.ray_settings import (
    APPLICATION,
    ENVIRONMENT,
    NEEDS_RAY,
    OF_ITS_OWN,
    Replicas,
    as_given,
    cpus_claimed,
    not_shared,
    share_of_this_machine,
)
from serving.settings import Settings

REACH_S = 5.0
HEAD_PORT = 6379  # where `ray start --head` listens
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # RFC 9113, 3.4: with empty settings
SETTINGS_FRAME = b"\x04"
QUIET = {"log_level": "WARNING", "enable_access_log": False}  # ours tells more of a request
_REASON = re.compile(r"Unavailable: (.+)")
log = logging.getLogger("nearfar.ray")


def serve_on_ray(settings: Settings, replicas: Replicas, address: str | None) -> None:
    """Serve until SIGTERM or SIGINT. `address`: of the head of a cluster that this machine belongs to, or `auto`.

    Raises InvalidValue for settings that do not go together, NotFound and BundleError for models, Unavailable where
    Ray, its head or a replica fails.
    """
    if address and replicas.most > 1 and (missing := not_shared(settings)):
        raise InvalidValue(missing, param="database")
    if not address:  # or Ray would try again and again
        for folder in model_folders(settings):
            Bundle.read(folder)
    os.environ.update(ENVIRONMENT if address else ENVIRONMENT | OF_ITS_OWN)
    try:
        import ray
        from ray import serve
    except ModuleNotFoundError as error:  # Ray without its Serve
        raise Unavailable(f"{NEEDS_RAY} ({error.name} is missing)") from error
    if address:
        _connect(ray, address)
    else:
        settings = share_of_this_machine(settings, replicas)
        ray.init(address="local", include_dashboard=False, logging_level="warning")
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own
        signal.signal(number, _leave)
    try:
        url = _deploy(serve, settings, replicas, own=address is None)
        _tell(settings, replicas, url)
        if address:
            _check_proxy(url)
        threading.Event().wait()
    finally:
        serve.delete(APPLICATION)
        if not serve.status().applications:  # of a cluster's others none is to be ended
            serve.shutdown()
        ray.shutdown()


def _leave(_signal: int, _frame: object) -> NoReturn:
    raise SystemExit(0)


def _connect(ray: Any, address: str) -> None:
    if address != "auto":
        host, _, text = address.rpartition(":") if ":" in address else (address, "", str(HEAD_PORT))
        if not host or not text.isdecimal() or int(text) > 65535:
            raise InvalidValue(f"--ray-address takes HOST:PORT of Ray's head, or auto, got {address[:100]!r}")
        # Ray never goes by loopback to a cluster, only by this machine's own address.
        host, port = ray.util.get_node_ip_address() if is_loopback_host(host) else host, int(text)
        _check_head(host, port)
        address = f"{host}:{port}"
    try:
        ray.init(address=address, logging_level="error")
    except Exception as error:  # Ray has no tree of its own for them
        raise Unavailable(f"Ray at {address}: {str(error).strip().splitlines()[0]}") from error


def _check_head(host: str, port: int) -> None:
    """Does something there speak HTTP/2, as gRPC does? Ray itself would try for minutes. Raises Unavailable."""
    try:
        with socket.create_connection((host, port), timeout=REACH_S) as connection:
            connection.sendall(PREFACE)
            said = connection.recv(9)
    except OSError as error:
        raise Unavailable(f"no Ray head answers at {host}:{port}: {error.strerror or error}") from error
    if said[3:4] != SETTINGS_FRAME:
        raise Unavailable(f"what listens at {host}:{port} is no Ray head")


def _deploy(serve: Any, settings: Settings, replicas: Replicas, *, own: bool) -> str:
    from serving.ray_service import deployment

    port = settings.port or free_port()
    where = "HeadOnly" if own else "EveryNode"
    http = {"host": settings.host, "port": port}
    serve.start(proxy_location=where, http_options=http, logging_config=QUIET)
    claimed = {"num_cpus": cpus_claimed(settings, own=own)}
    made = deployment(as_given(settings), ray_actor_options=claimed, **replicas.options(settings))
    try:
        serve.run(made.bind(), name=APPLICATION, route_prefix="/", logging_config=QUIET)
    except RuntimeError as error:
        told = serve.status().applications[APPLICATION]
        texts = [told.message, *(each.message for each in told.deployments.values())]
        found = [reason for text in texts for reason in _REASON.findall(text)]
        raise Unavailable(found[-1] if found else f"the replicas did not start: {error}") from error
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _check_proxy(url: str) -> None:
    """Warn where the proxy of this machine is not as the cluster's Ray was to be told before it started."""
    try:
        with OPENER.open(f"{url}/ready", timeout=REACH_S) as response:
            ids = response.headers.get_all("x-request-id", [])
    except (OSError, HTTPException):
        ids = []
    if not ids:
        log.warning("nothing answers at %s: Ray Serve of this cluster was started with another host or port, or no "
                    "replica is on this machine", url)  # fmt: skip
        return
    if len(ids) > 1:  # the proxy's own beside the replica's
        told = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        log.warning("what Ray refuses itself reaches clients as plain text: start Ray on each machine with %s", told)


def _tell(settings: Settings, replicas: Replicas, url: str) -> None:
    log.info("ready: %s, replicas: %s", url, replicas)
    if replicas.most > 1 and any(key.requests_per_minute or key.concurrent_requests for key in settings.all_keys()):
        log.warning("limits of keys hold in each replica: all of them allow up to %d times as much", replicas.most)
