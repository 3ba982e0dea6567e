"""`nearfar serve`."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from asyncio.trsock import TransportSocket
from importlib.util import find_spec
from typing import Annotated, Any, NoReturn

import typer
import uvicorn

from models.errors import InvalidValue, NearfarError
from models.request import Policy
from serving.cli.console import ConfigOption, ModelsOption, OfflineFlag, YesFlag, fail, settings_from
from serving.cli.fetching import fetch_absent
from serving.doctor.machine import disk_of
from serving.local_models import default_models
from serving.logs import set_up
from serving.ray_settings import NEEDS_RAY, Replicas
from serving.settings import Settings, settings_file


def serve(
    host: Annotated[str | None, typer.Option(help="address to listen on  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one  [default: 8000]")] = None,
    model: ModelsOption = None,
    endpoint: Annotated[
        list[str] | None, typer.Option(help="OpenAI-compatible endpoint NAME=URL,MODEL to compare with; repeatable")
    ] = None,
    policy: Annotated[Policy | None, typer.Option(help="how far inputs may travel  [default: local-only]")] = None,
    threads: Annotated[int | None, typer.Option(help="threads per model  [default: one a core]")] = None,
    allow_anonymous: Annotated[
        bool | None, typer.Option("--allow-anonymous", help="serve other machines keyless")
    ] = None,
    config: ConfigOption = None,
    keep_inputs: Annotated[
        bool | None, typer.Option("--keep-inputs", help="keep question and files of comparisons with their records")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json, one object a line  [default: text]")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="as replicas behind Ray Serve's proxy")] = False,
    replicas: Annotated[
        str, typer.Option(metavar="N|LEAST-MOST", help="with --ray; between two, as requests wait")
    ] = "1",
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT|auto", help="with --ray, the head of a cluster  [default: a Ray of its own]"),
    ] = None,
    yes: YesFlag = False,
    offline: OfflineFlag = False,
) -> None:
    """Serve POST /infer, POST /compare, the /v1 dialect and the page. A named model that is absent is fetched first."""
    settings = settings_from(
        config=config,
        host=host,
        port=port,
        models=tuple(model or ()),
        endpoints=tuple(endpoint or ()),
        policy=policy,
        threads=threads,
        allow_anonymous=allow_anonymous,
        keep_inputs=keep_inputs,
        log_format=log_format,
        offline=offline or None,
    )
    refusal = settings.refusal_to_bind()
    if refusal:
        fail(refusal, status=2)
    if not ray and (ray_address or replicas != "1"):
        fail("--replicas and --ray-address need --ray", status=2)
    wanted = _replicas(replicas) if ray else None
    fetch_absent(settings, yes=yes)
    set_up(settings.log_format)
    if file := settings_file(settings.config):
        logging.getLogger("nearfar").info("settings of %s", file.absolute())
    if not disk_of(settings.data_dir).writable:
        what = "comparisons, models and the ledger cannot be kept there"
        logging.getLogger("nearfar").warning("%s cannot be written by this user: %s", settings.data_dir, what)
    if wanted:
        return _run_on_ray(settings, wanted, ray_address)
    first_line = None
    if not settings.models:
        choice = default_models(settings)
        first_line = choice.text
        settings = settings.model_copy(update={"models": tuple(str(bundle.folder) for bundle in choice.bundles)})
    run_server(settings, first_line)


def _replicas(text: str) -> Replicas:
    """What is wrong with `--ray` itself is told before anything is fetched."""
    if not find_spec("ray"):
        fail(NEEDS_RAY)
    try:
        return Replicas.parse(text)
    except InvalidValue as error:
        fail(error.message, status=2)


def _run_on_ray(settings: Settings, replicas: Replicas, address: str | None) -> None:
    from serving.ray_head import serve_on_ray

    try:
        serve_on_ray(settings, replicas, address)
    except InvalidValue as error:
        fail(error.message, status=2)
    except NearfarError as error:
        fail(error.message)


def run_server(settings: Settings, first_line: str | None) -> None:
    """Log that line, serve until SIGTERM or SIGINT, let running answers end, leave with status 0."""
    from serving.app import create_app

    try:
        application = create_app(settings)
    except NearfarError as error:
        fail(error.message, status=2)
    if first_line:
        logging.getLogger("nearfar").info(first_line)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            application.state.services.stop_accepting()
            self.force_exit = self.should_exit  # a second signal, of either kind, does not wait for answers
            super().handle_exit(sig, frame)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for listening in (each for server in self.servers for each in server.sockets):
                _cut_stalled_readers(listening, settings.stalled_reader_s)

    config = uvicorn.Config(
        application,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # ours tells the request id, the target and the tokens too
        server_header=False,
        timeout_graceful_shutdown=settings.drain_s,
    )

    def leave(_signal: int, _frame: object) -> NoReturn:  # uvicorn raises the signal again after its own shutdown
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    Server(config).run()


def _cut_stalled_readers(listening: socket.socket | TransportSocket, seconds: float) -> None:
    """Let the kernel give up a connection whose peer takes nothing for so long, with what was to be written to it.

    Closing it is not enough: what is left in its buffer is kept until it is read. Connections inherit it. Linux alone.
    """
    if sys.platform == "linux" and listening.family != socket.AF_UNIX:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
