"""Builds the service from its settings: models, engine, targets, routes. The one module that sees every part."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from models.bundle import Bundle
from models.errors import NearfarError, Unavailable
from serving.api import chat_completions, compare, infer, system
from serving.api.errors import add_error_handlers
from serving.api.security import Guard
from serving.engine.local import LocalAnswerer, LocalEngine
from serving.engine.prepare import LoadedModel
from serving.hosted.openai_compatible import OpenAICompatible
from serving.hosted.providers import PROVIDERS, available, parse_endpoint
from serving.settings import Settings, embedded_bundles
from serving.targets import Target, Targets

log = logging.getLogger("nearfar")


class Services:
    """What the routes work with. Loading runs beside the server, so that probes are answered from the first moment."""

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self.settings = settings
        self._environment = environment
        self._engine = LocalEngine(max_waiting=settings.max_waiting, max_running=settings.max_running)
        self._models: list[LoadedModel] = []
        self._targets: Targets | None = None
        self._reason: str | None = "the models are being loaded"

    async def load(self) -> None:
        """Load every model and build the targets. A failure is kept as the reason why the service is not ready."""
        try:
            load = functools.partial(
                LoadedModel.load, threads=self.settings.threads, provider=self.settings.execution_provider
            )
            folders = model_folders(self.settings.models)
            self._models = [await asyncio.to_thread(load, folder) for folder in folders]
            self._targets = Targets([*self._local_targets(), *self._hosted_targets()])
            self._reason = None
            log.info("ready: %s", ", ".join(target.name for target in self._targets))
        except NearfarError as error:
            self._reason = error.message
            log.error("not ready: %s", error.message)
        except Exception:
            self._reason = "loading failed unexpectedly; the log says how"
            log.exception("not ready")

    def not_ready(self) -> str | None:
        """Why requests cannot be answered now; None where they can."""
        return self._reason

    def stop_accepting(self) -> None:
        """From now on not ready: running answers end, new ones are turned away."""
        self._reason = "the service is going down"

    def targets(self) -> Targets:
        """All targets. Raises Unavailable while there are none."""
        if self._reason or self._targets is None:
            raise Unavailable(self._reason or "not ready")
        return self._targets

    def bundles(self) -> list[Bundle]:
        """The bundles of the local models, in order."""
        return [model.bundle for model in self._models]

    def _local_targets(self) -> list[Target]:
        return [
            Target(
                answerer=LocalAnswerer(model, self._engine),
                kind="local",
                model=model.bundle.manifest.name,
                recipe=model.bundle.manifest.recipe,
                notice=model.bundle.manifest.notice,
            )
            for model in self._models
        ]

    def _hosted_targets(self) -> list[Target]:
        providers = [*PROVIDERS, *(parse_endpoint(endpoint) for endpoint in self.settings.endpoints)]
        return [
            Target(
                answerer=OpenAICompatible(provider, model, key),
                kind="hosted",
                model=model,
                destination=provider.destination,
                leaves_device=provider.leaves_device,
                notice=provider.description,
            )
            for provider, key in available(providers, self._environment)
            for model in provider.models
        ]

    async def aclose(self) -> None:
        """Close every answerer and end the engine."""
        for target in self._targets or ():
            await target.answerer.aclose()
        await asyncio.to_thread(self._engine.close)


def model_folders(names: tuple[str, ...]) -> list[Path]:
    """Bundle folders for embedded names (`tiny-scenes`, `tiny-scenes@fp32`) and paths; without names, all embedded."""
    embedded = embedded_bundles()
    folders: list[Path] = []
    for name in names:
        short = name.removeprefix("local/")
        matches = [folder for key, folder in embedded.items() if short in (key, key.partition("@")[0])]
        folders.extend(matches[:1] or [Path(name)])
    return folders or list(embedded.values())


def create_app(settings: Settings, environment: Mapping[str, str] | None = None) -> FastAPI:
    """The ASGI application. Providers' keys are read from `environment` alone; without one, from the process's."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = Services(settings, os.environ if environment is None else environment)
        app.state.services, app.state.settings = services, settings
        loading = asyncio.create_task(services.load())
        try:
            yield
        finally:
            loading.cancel()
            await services.aclose()

    app = FastAPI(title="nearfar", version="0.1.0", lifespan=lifespan, docs_url=None, redoc_url=None)
    add_error_handlers(app)
    for router in (infer.router, compare.router, chat_completions.router, system.router, system.keyed):
        app.include_router(router)
    app.add_middleware(Guard, settings=settings)
    return app
