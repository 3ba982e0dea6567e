"""Builds the HTTP service from its settings. The one module that sees every part."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI

from serving.api import (
    break_even,
    chat_completions,
    compare,
    dialects,
    estimate,
    infer,
    messages,
    records,
    report,
    responses,
    system,
    verdict,
    votes,
)
from serving.api.errors import add_error_handlers
from serving.api.openapi import describe
from serving.api.security import Guard
from serving.keys import KeyRing
from serving.metrics import Metrics
from serving.services import Services
from serving.settings import Settings

log = logging.getLogger("nearfar")


def create_app(settings: Settings, environment: Mapping[str, str] | None = None) -> FastAPI:
    """The ASGI application. Providers' keys are read from `environment` alone; without one, from the process's."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.loading = asyncio.create_task(load())
        try:
            yield
        finally:
            app.state.loading.cancel()
            await services.aclose()

    async def load() -> None:
        await services.load()
        reason = services.not_ready()
        if reason:
            log.error("not ready: %s", reason)
        else:
            log.info("ready: %s", ", ".join(target.name for target in services.targets()))

    async def exposition() -> bytes:
        return metrics.text()

    services = Services(settings, os.environ if environment is None else environment)
    # Without FastAPI's own pages about it, which load scripts from elsewhere.
    app = FastAPI(title="nearfar", lifespan=lifespan, docs_url=None, redoc_url=None)
    metrics = Metrics(services.engine_figures, services.spending, services.routes.breakers)
    app.state.services, app.state.settings, app.state.metrics = services, settings, metrics
    app.state.keys, app.state.exposition = KeyRing(settings.all_keys()), exposition
    add_error_handlers(app)
    rooms = (
        infer,
        compare,
        records,
        report,
        break_even,
        estimate,
        chat_completions,
        responses,
        messages,
        dialects,
        system,
        verdict,
        votes,
    )
    for room in rooms:
        app.include_router(room.router)
    app.include_router(system.keyed)
    describe(app)
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    return app
