"""What the service has and how it is: models, targets, probes, metrics; the page and its samples."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response

from comparisons.formulas import FORMULAS
from models.errors import NotFound
from models.tiny_scenes import SAMPLES
from serving.api.caller import choose, policy_of
from serving.api.schemas import catalog_objects, resident_object
from serving.api.security import SECURITY_HEADERS, require_key
from serving.api.streaming import unless_client_leaves
from serving.local_models import local_bundles
from serving.metrics import CONTENT_TYPE
from serving.targets import allows

router = APIRouter()
keyed = APIRouter(dependencies=[Depends(require_key)])
PAGE = Path(__file__).resolve().parent.parent / "page"


@router.get("/health")
async def health() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 when the first models are loaded and warm; 503 with the reason until then. It wakes no model."""
    reason = request.app.state.services.not_ready()
    if reason:
        return JSONResponse({"status": "not ready", "reason": reason}, status_code=503)
    return JSONResponse({"status": "ready"})


@keyed.get("/targets")
async def targets(request: Request) -> dict[str, list[dict[str, Any]]]:
    """Everything that can be named, the default first, and whether the server's policy allows it."""
    services = request.app.state.services
    policy = policy_of(request)
    listed = list(services.targets())
    defaults = services.targets().defaults(policy)
    return {
        "targets": [
            {
                "name": target.name,
                "kind": target.kind,
                "model": target.model,
                "recipe": target.recipe,
                "default": target is defaults[0],
                "allowed": allows(policy, target),
                "compared_by_default": target in defaults,
                "leaves_device": target.leaves_device,
                "destination": target.destination,
                "notice": target.notice,
                "aliases": services.targets().aliases_of(target),
                "hosted": asdict(target.facts) if target.facts else None,
                "chain": services.routes.chain(target.name),
            }
            for target in listed
        ]
    }


@keyed.get("/formulas")
async def formulas() -> dict[str, Mapping[str, str]]:
    """How every figure comes about, by its name in the answers."""
    return {"formulas": FORMULAS}


@keyed.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The models of this service, in memory or not, the catalog, and what is being fetched. It wakes none."""
    services = request.app.state.services
    there = await asyncio.to_thread(local_bundles, services.settings)
    residents = services.residents
    return {
        "models": [resident_object(resident.shown) for resident in residents.all] if residents else [],
        "memory": {"budget_bytes": residents.budget, "counted_bytes": residents.memory_bytes} if residents else None,
        "catalog": catalog_objects(there),
        "pulling": asdict(services.pulling) if services.pulling else None,
    }


@keyed.post("/models/{name:path}/load")
async def load(request: Request, name: str) -> dict[str, Any]:
    """Have a model in memory, in the place of others where need be; answers when it is warm."""
    services = request.app.state.services
    resident = services.resident(choose(request, name))
    await unless_client_leaves(request, services.residents.load(resident))
    return resident_object(resident.shown)


@keyed.post("/models/{name:path}/unload")
async def unload(request: Request, name: str) -> dict[str, Any]:
    """Out of memory, once its running answers are whole. Who asks it later waits until it is loaded again."""
    services = request.app.state.services
    resident = services.resident(choose(request, name))
    await unless_client_leaves(request, services.residents.unload(resident))
    return resident_object(resident.shown)


@keyed.post("/models/{name}/pull", status_code=202)
async def pull(request: Request, name: str) -> dict[str, Any]:
    """Begin to fetch a catalog model; `GET /models` tells how far it is, and then it is a target."""
    services = request.app.state.services
    services.pull(name)
    return {"pulling": asdict(services.pulling)}


@keyed.get("/egress")
async def egress(request: Request) -> dict[str, Any]:
    """The head of the egress ledger: `nearfar egress verify` checks the ledger against one that was kept elsewhere."""
    head = await asyncio.to_thread(request.app.state.services.ledger.chain.head)
    return {"entries": head.number, "head": str(head)}


@keyed.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus' text. It wakes no model."""
    return Response(await request.app.state.exposition(), headers={"content-type": CONTENT_TYPE})


@router.get("/", response_class=HTMLResponse)
async def page() -> Response:
    """The page."""
    return FileResponse(PAGE / "index.html", headers=SECURITY_HEADERS)


@router.get("/page/{name}", response_class=FileResponse)
async def page_file(name: str) -> Response:
    """The page's scripts and styles."""
    return _file(PAGE, name, (".js", ".css", ".svg"))


@router.get("/samples")
async def samples() -> dict[str, list[dict[str, str]]]:
    """The bundled pictures, each with a question and its right answer."""
    rows = json.loads((SAMPLES / "samples.json").read_text())
    return {"samples": [{**row, "url": f"/samples/{row['file']}"} for row in rows]}


@router.get("/samples/{name}", response_class=FileResponse)
async def sample(name: str) -> Response:
    """One bundled picture."""
    return _file(SAMPLES, name, (".png",))


def _file(folder: Path, name: str, suffixes: tuple[str, ...]) -> Response:
    # Only names that the folder lists: no path arithmetic on what a client sent.
    known = {path.name: path for path in folder.iterdir() if path.suffix in suffixes}
    if name not in known:
        raise NotFound("there is no such file")
    return FileResponse(known[name], headers=SECURITY_HEADERS | {"cache-control": "no-cache"})
