"""The contract's JSON objects: request bodies checked by pydantic, answers written out field by field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from comparisons.formulas import FORMULAS
from comparisons.measures import Measure, Tolerance
from comparisons.repeats import MAX_REPEATS
from comparisons.results import ArmResult, Comparison
from models.bundle import Bundle
from models.catalog import ALIASES, EXPORTED_BYTES_PER_WEIGHT, NOT_VERIFIED, PUBLISHED, ROWS, Row
from models.errors import NearfarError
from models.events import Finished, ImageReport
from models.images import Detail
from models.memory import LEAST_CONTEXT, Residence, need_of_row, total_bytes
from models.quality import published_reports
from models.reduction import Reduction
from models.request import AnswerRequest, GenerationSettings, Policy, Task, question
from serving.api.accounts import attempt_objects
from serving.api.body import AtLeastOne, Fields, Seed, Temperature, parse_json
from serving.api.errors import error_object, invalid_value
from serving.api.formats import output_format

Body = TypeVar("Body", bound=BaseModel)
SPREAD_TERMS = (
    "n",
    "median",
    "p90",
    "p95",
    "p99",
    "cold",
    "warm",
    "errors",
    "distinct_answers",
    "score",
    "score_interval",
)


class QuestionBody(BaseModel):
    """Fields of both routes. Values of a form are strings and are converted; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str | None = Field(None, description="the question; a task other than vqa has one of its own")
    max_tokens: AtLeastOne = Field(256, description="of the answer, at most")
    temperature: Temperature = Field(0.0, description="0: the likeliest token each time")
    seed: Seed | None = Field(None, description="the same answer again, where one is drawn")
    stream: bool = Field(False, description="as server-sent events")
    detail: Detail = Field("auto", description="how finely pictures are cut into tiles")
    task: Task = Field("vqa", description="what the prompt is for; all but vqa bring a default one")
    policy: Policy | None = Field(None, description="tighter than the server's and the key's")
    reduce: Reduction | None = Field(None, description="of pictures before they leave: crop, max_side_px, grey")
    cache: Literal["auto"] | None = Field(None, description="hosted models keep what their prompts begin with again")
    response_format: dict[str, Any] | None = Field(None, description="json_schema, json_object, regex or choice")
    timeout_s: float | None = Field(None, gt=0, description="the whole answer, or of /compare each, within this")

    @field_validator("response_format", "reduce", mode="before", json_schema_input_type=dict[str, Any] | str | None)
    @classmethod
    def _from_text(cls, value: object) -> object:
        return parse_json(value.encode()) if isinstance(value, str) else value

    def to_request(self, files: Fields) -> AnswerRequest:
        """The nouns below HTTP. Raises BadRequest and InvalidValue."""
        settings = GenerationSettings(max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed)
        asked = question(
            self.prompt,
            files.images,
            document=files.document,
            video=files.video,
            task=self.task,
            settings=settings,
            detail=self.detail,
            output=output_format(self.response_format),
        )
        return replace(asked, deadline_s=self.timeout_s, cache=self.cache, reduction=self.reduce)


class InferBody(QuestionBody):
    """Fields of `POST /infer`."""

    model: str | None = Field(None, description="a target's or a route's name; without one, the default")
    restart: bool = Field(False, description="with stream, a route may begin anew behind an event `restarted`")
    partial: bool = Field(False, description="with JSON and stream, every delta has the object so far")


class CompareBody(QuestionBody):
    """Fields of `POST /compare`."""

    targets: tuple[str, ...] = Field((), description="names, in a form comma-separated; none: all that policy allows")
    reference: str | None = Field(None, max_length=4000, pattern=r"^[^\x00]*$", description="the right answer")
    measure: Measure = Field("exact", description="how an answer is held against the reference")
    tolerance: float = Field(0, ge=0, allow_inf_nan=False, description="by how much a number may be off")
    relative_tolerance: float = Field(0, ge=0, allow_inf_nan=False, description="the same, as a share of the reference")
    repeats: int = Field(1, ge=1, le=MAX_REPEATS, description="rounds, each in a new random order")
    judge: str | None = Field(None, description="a target that says which of two answers is better")
    parallel: bool = Field(False, description="all at once, for show: times are then marked contended")
    blind: bool = Field(False, description="two targets as sides a and b, without names and figures until the vote")

    @property
    def number_tolerance(self) -> Tolerance:
        return Tolerance(relative=self.relative_tolerance, absolute=self.tolerance)

    @model_validator(mode="after")
    def _blind_is_plain(self) -> CompareBody:
        if self.blind and (self.repeats > 1 or self.judge):
            raise ValueError("blind does not go with repeats or a judge, who would tell the sides apart")
        return self

    @field_validator("targets", mode="before", json_schema_input_type=tuple[str, ...] | str)
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


def parse(kind: type[Body], fields: Fields) -> Body:
    """Check a body's fields. Raises InvalidValue that names the first wrong one."""
    try:
        return kind.model_validate(fields.values)
    except ValidationError as error:
        raise invalid_value(error) from error


def answer_object(answer_id: str, text: str, finished: Finished) -> dict[str, Any]:
    """The object of `POST /infer`."""
    return {
        "id": answer_id,
        "model": finished.model,
        "target": finished.target,
        "text": text,
        "finish_reason": finished.finish_reason,
        "confidence": finished.confidence,
        "usage": asdict(finished.usage),
        "timings": _rounded(asdict(finished.timings)),
        "images": [_image_object(image) for image in finished.images],
        "memory": asdict(finished.memory),
        "egress": asdict(finished.egress),
        "cost": asdict(finished.cost),
        "energy": asdict(finished.energy) if finished.energy else None,
        "notice": finished.notice,
        "attempts": attempt_objects(finished.attempts),
    }


def _image_object(report: ImageReport) -> dict[str, Any]:
    """A picture that is neither frame nor page has no time and no number, rather than unknown ones."""
    place = ("timestamp_s", "page", "pages")
    return {name: value for name, value in asdict(report).items() if value is not None or name not in place}


def result_object(comparison_id: str, result: ArmResult, request_id: str) -> dict[str, Any]:
    """One target's part of a comparison, flat. Its id is the comparison's and the place in which it ran."""
    answer_id = f"{comparison_id}_{result.order}"
    place = {"target": result.target, "order": result.order, "contended": result.contended}
    if result.finished is None or result.text is None:
        error = result.error or NearfarError("the target gave no answer")
        return {"ok": False, **place, "error": error_object(error, request_id), **_more(result)}
    answer = answer_object(answer_id, result.text, result.finished)
    return {"ok": True, **answer, **place, "correct": result.correct, "score": result.score, **_more(result)}


def _more(result: ArmResult) -> dict[str, Any]:
    """What only some requests ask for."""
    fields = {"fields": [each._asdict() for each in result.fields]} if result.fields else {}
    if result.repeats is None:
        return fields
    answers = [{"text": text, "n": n} for text, n in result.repeats.answers]
    return {**fields, "repeats": {**tidy(asdict(result.repeats)), "answers": answers, "distinct_answers": len(answers)}}


def comparison_object(comparison: Comparison, request_id: str) -> dict[str, Any]:
    """The object of `POST /compare`."""
    return {
        "id": comparison.comparison_id,
        "results": [result_object(comparison.comparison_id, result, request_id) for result in comparison.results],
        "tradeoff": asdict(comparison.tradeoff),
        "verdict": asdict(comparison.verdict),
        **_asked_besides(comparison),
    }


def _asked_besides(comparison: Comparison) -> dict[str, Any]:
    """The judge's words, and how the figures of several rounds come about, where they were asked for."""
    found: dict[str, Any] = {}
    judging = comparison.judging
    if judging:
        words = [{**asdict(each), "consistent": each.consistent} for each in judging.judgements]
        found["judge"] = {**asdict(judging), "judgements": words}
    repeated = next((each.repeats for each in comparison.results if each.repeats), None)
    if repeated:
        names = {*repeated.cold, *SPREAD_TERMS, *asdict(repeated)}
        found["formulas"] = {name: text for name, text in FORMULAS.items() if name in names}
    return found


def model_object(bundle: Bundle) -> dict[str, Any]:
    """One row of `GET /models`: source, licence, shapes, bytes and measured quality, as the manifest says."""
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "recipe": manifest.recipe,
        "target": bundle.target,
        "parameters": manifest.shapes.parameters,
        "bytes": bundle.model_bytes,
        "source": manifest.source.model_dump(),
        "quality": manifest.quality,
        "notice": manifest.notice,
    }


def resident_object(shown: Residence) -> dict[str, Any]:
    """A model of the running service: its row, and how it stands in memory."""
    basis = "computed from the shapes; with all its slots, while it is loaded, without the process itself"
    memory = {"bytes": shown.memory_bytes, "slots": shown.slots, "context": shown.context, "basis": basis}
    return {**model_object(shown.bundle), "state": shown.state, "memory": memory}


def catalog_objects(installed: Iterable[Bundle]) -> list[dict[str, Any]]:
    """The catalog in `GET /models`: a row a model, with what of it is on this machine, then the aliases."""
    there: dict[str, list[dict[str, Any]]] = {}
    for bundle in installed:
        manifest = bundle.manifest
        row = {"recipe": manifest.recipe, "bytes": bundle.model_bytes, "revision": manifest.source.revision}
        there.setdefault(manifest.name, []).append(row)
    return [_row_object(row, there.get(row.name, [])) for row in ROWS.values()] + [
        {"name": name, "stands_for": alias.model, "recipe": alias.recipe, "notice": alias.notice,
         "claims": [claim._asdict() for claim in alias.claims]}
        for name, alias in ALIASES.items()
    ]  # fmt: skip


def _row_object(row: Row, installed: list[dict[str, Any]]) -> dict[str, Any]:
    published = PUBLISHED if row.published_onnx else {}
    reports = published_reports(row.hub_id)
    return {
        "name": row.name,
        "source": row.hub_id,
        "revision": row.revision,
        "license": row.license,
        "parameters": row.shape.parameters,
        "image_tokens_per_tile": row.shape.image_tokens_per_tile,
        "max_positions": row.shape.max_positions,
        "recipes": {
            recipe: {
                "file_bytes": row.file_bytes(recipe),
                "memory_bytes": total_bytes([need_of_row(row, recipe)], 1, LEAST_CONTEXT),
                "basis": f"computed from the shapes; in memory with one sequence of {LEAST_CONTEXT} positions",
                "published_files": {graph: choice._asdict() for graph, choice in published.get(recipe, {}).items()},
            }
            for recipe in EXPORTED_BYTES_PER_WEIGHT
        },
        "claims": [claim._asdict() for claim in row.claims],
        "measured": row.measured,
        "verified": reports or None,
        "verification": NOT_VERIFIED if row.hub_id and not reports else None,
        "installed": installed,
        "notice": row.notice,
    }


def _rounded(figures: dict[str, float | None]) -> dict[str, float | None]:
    """Three decimals: a microsecond, below which these clocks say nothing."""
    return {name: None if value is None else round(value, 3) for name, value in figures.items()}


def tidy(value: Any) -> Any:
    """The same with six significant digits for every number that has more; named tuples become objects."""
    match value:
        case float():
            return float(f"{value:.6g}")
        case dict():
            return {name: tidy(each) for name, each in value.items()}
        case list() | tuple():
            named: dict[str, Any] | None = value._asdict() if hasattr(value, "_asdict") else None
            return [tidy(each) for each in value] if named is None else tidy(named)
        case _:
            return value


def sse(event: str, data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"event: {event}\ndata: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n"


def sse_error(request: Request) -> Callable[[NearfarError], str]:
    """How an error that comes after the first event is told."""
    return lambda error: sse("error", {"error": error_object(error, request.state.request_id)})
