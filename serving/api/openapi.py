"""The OpenAPI description. Routes read their bodies by hand: what these may hold is put in here, from their classes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from models.request import MAX_IMAGES
from serving.api.break_even import BreakEvenBody
from serving.api.chat_bodies import ChatBody
from serving.api.estimate import EstimateBody
from serving.api.messages import MessagesBody, PromptBody
from serving.api.responses import ResponsesBody
from serving.api.schemas import CompareBody, InferBody
from serving.api.votes import VoteBody
from serving.targets import POLICIES

BODIES: dict[str, type[BaseModel]] = {
    "/infer": InferBody,
    "/compare": CompareBody,
    "/compare/{comparison_id}/vote": VoteBody,
    "/break-even": BreakEvenBody,
    "/estimate": EstimateBody,
    "/v1/chat/completions": ChatBody,
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": PromptBody,
}
FORMS = ("/infer", "/compare")  # their bodies may be multipart too, with files beside the fields
QUICK = ("/compare/{comparison_id}/vote", "/break-even", "/estimate")
ASKING = tuple(path for path in BODIES if path not in QUICK)  # a model: it may take too long
STREAMS = tuple(path for path in ASKING if path != "/v1/messages/count_tokens")
# A picture of one pixel, as GIF.
PIXEL = "data:image/gif;base64,R0lGODdhAQABAIAAAAAAAAAAACwAAAAAAQABAAAIBAABBAQAOw=="
TURN = {"role": "user", "content": "What color is the circle?"}
EXAMPLES: dict[str, dict[str, Any]] = {
    "/infer": {"prompt": TURN["content"], "images": [PIXEL]},
    "/compare": {"prompt": TURN["content"], "images": [PIXEL]},
    "/compare/{comparison_id}/vote": {"winner": "a", "voter": "anna"},
    "/break-even": {"volume": 20_000},
    "/estimate": {"text_bytes": 24, "pictures": [{"width": 640, "height": 480, "bytes": 50_000}]},
    "/v1/chat/completions": {"messages": [TURN], "max_tokens": 20},
    "/v1/responses": {"input": [TURN], "max_output_tokens": 20},
    "/v1/messages": {"messages": [TURN], "max_tokens": 20},
    "/v1/messages/count_tokens": {"messages": [TURN]},
}
DATA_URL = {"type": "string", "pattern": "^data:[^,]*;base64,", "description": "a file, told by its content"}
FILE = {"type": "string", "format": "binary"}
TIMEOUT = {
    "name": "x-request-timeout-s",
    "in": "header",
    "description": "the whole answer within so many seconds",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}
TIGHTER = "the policy of this request, tighter than the server's and the key's"
POLICY = {"name": "x-nearfar-policy", "in": "header", "description": TIGHTER, "schema": {"enum": list(POLICIES)}}
DEADLINE = {"description": "The answer was not whole in time."}
ERROR = {
    "description": "An error: type, message, param and request_id; under /v1 as that dialect has them.",
    "content": {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "object"}}}}},
}
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def describe(app: FastAPI) -> None:
    """Let `app` describe itself, as made once it is asked for the first time."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's manual has it


def _described(app: FastAPI) -> dict[str, Any]:
    description = get_openapi(title=app.title, version=app.version, routes=app.routes)
    by_kind, schemas = models_json_schema(
        [(body, "validation") for body in BODIES.values()], ref_template="#/components/schemas/{model}"
    )
    description["components"] = {"schemas": schemas["$defs"], "securitySchemes": SECURITY_SCHEMES}
    description["security"] = [{}, *({name: []} for name in SECURITY_SCHEMES)]  # the first: where no keys are set
    for methods in description["paths"].values():
        for operation in methods.values():
            operation["responses"] = {code: each for code, each in operation["responses"].items() if code != "422"}
            operation["responses"]["default"] = ERROR
    for path, body in BODIES.items():
        operation = description["paths"][path]["post"]
        operation["requestBody"] = {"required": True, "content": _content(path, by_kind[body, "validation"], schemas)}
        if path in ASKING:
            operation["parameters"] = [TIMEOUT, POLICY]
            operation["responses"]["504"] = DEADLINE
        if path in STREAMS:
            operation["responses"]["200"]["content"]["text/event-stream"] = {}
    return description


def _content(path: str, reference: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    if path not in FORMS:
        return {"application/json": {"schema": reference, "example": EXAMPLES[path]}}
    fields = schemas["$defs"][reference["$ref"].rpartition("/")[2]]

    def with_files(**files: Any) -> dict[str, Any]:
        return {"schema": {**fields, "properties": fields["properties"] | files}}

    urls = {"type": "array", "items": DATA_URL, "maxItems": MAX_IMAGES, "description": f"at most {MAX_IMAGES}"}
    files = {**urls, "items": FILE}
    return {
        "application/json": {
            **with_files(images=urls, document=DATA_URL, video=DATA_URL),
            "example": EXAMPLES[path],
        },
        "multipart/form-data": with_files(image=files, document=FILE, video=FILE),
    }
