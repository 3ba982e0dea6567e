"""`GET /report`: what the comparisons of this key come to, as one page that needs nothing else, or as JSON."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import Field

from serving.api.records import owner_of, records_of
from serving.api.security import SECURITY_HEADERS, require_key
from serving.api.verdict import VerdictQuery
from serving.report import MAX_ROWS, ROWS, Terms, report_of_records
from serving.report_page import POLICY, page_of

router = APIRouter(dependencies=[Depends(require_key)])
HEADERS = SECURITY_HEADERS | {"content-security-policy": POLICY, "cache-control": "no-store"}


class ReportQuery(VerdictQuery):
    """Which records, the verdict's terms, and as what."""

    rows: int = Field(ROWS, ge=1, le=MAX_ROWS, description="inputs that are shown one by one")
    format: Literal["html", "json"] = "html"


@router.get("/report", response_class=HTMLResponse)
async def report(request: Request, query: Annotated[ReportQuery, Query()]) -> Response:
    """Verdict, matrix, plots, method and claims of this key's newest comparisons. 404 where none fits."""
    where, data_dir = query.to_filter(owner_of(request)), request.app.state.settings.data_dir
    terms = Terms(targets=query.targets, weights=query.weights, volume=query.volume, rows=query.rows, data_dir=data_dir)
    records = records_of(request)
    found = await records.work(lambda store: report_of_records(store, where, terms))
    if query.format == "json":
        return JSONResponse(found.object, headers={"cache-control": "no-store"})
    return HTMLResponse(await records.work(lambda _: page_of(found)), headers=HEADERS)
