"""The reference of the HTTP API, serving/api/README.md, from what the service says of itself at /openapi.json.

`python -m tests.serving.api_reference` writes it anew; a test says when that is due, and another runs its examples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from models.errors import NearfarError
from serving.api.errors import anthropic_error_object, openai_error_object
from serving.app import create_app
from serving.settings import Settings

FILE = Path(__file__).resolve().parents[2] / "serving" / "api" / "README.md"
ADDRESS = "http://127.0.0.1:8000"
# Routes without a body whose example wants more than an address.
NEEDS = {"/verdict": "comparisons of two targets", "/compare/export": "comparisons"}
NO_JSON = ("/", "/metrics")
UNEXPECTED = "What nobody expected. The log says more under the request id."
HOMES = ("models.errors", "serving.keys", "serving.api.errors")  # of the errors that clients see
DIALECTS = {"/v1/chat/completions": "OpenAI", "/v1/responses": "OpenAI", "/v1/messages": "Anthropic"}
VOTE = "/compare/{comparison_id}/vote"
BLIND = (
    f"id=$(curl -s -F image=@models/tiny_scenes/samples/red-circle.png -F 'prompt=What color is the circle?' "
    f"-F blind=true {ADDRESS}/compare | python -c 'import json, sys; print(json.load(sys.stdin)[\"id\"])')"
)
HEAD = """# serving/api: the HTTP API

Made by `python -m tests.serving.api_reference` from the service's own description, `GET /openapi.json`; a test says
when it is out of date, and another runs the examples. What the routes are for is told in [serving](../README.md#use)
and [comparisons](../../comparisons/README.md). `GET /formulas` says of every figure in the answers how it comes about;
what was not measured is null.

A request may bring an `x-request-id`; every response has one. Bodies are JSON (`content-type: application/json`),
those of `/infer` and `/compare` also `multipart/form-data` with files in `image` (repeatable), `video` and `document`.
There unknown fields are 422; under `/v1` they are ignored.
"""
# Bodies that begin with the fields of another.
LIKE = {"/compare": "/infer", "/v1/messages/count_tokens": "/v1/messages"}
ERRORS = """## Errors

An error is `{"error": {"type", "message", "param", "request_id"}}`, under `/v1` as that dialect has it. There 422 is
400, and `budget_spent` is 429 for OpenAI's clients. Where an answer had begun, `usage`, `cost`, `egress` and
`attempts` tell what was used until then.
"""
STREAMS = """## Streams

With `"stream": true` an answer comes as server-sent events.

- `/infer`: `delta` with `text` (and `partial`, where asked for), then one `finished` with the whole object or one
  `error`; `restarted` where a route begins anew and `restart` allows it.
- `/compare`: `delta` with `target` and `text`, for each target one `finished` or `error`, last `comparison` with the
  whole object.
- Under `/v1` the events are those of the dialect.

A stream that is silent gets comments, lines that begin with a colon.
"""


def reference() -> str:
    """The whole text."""
    told = create_app(Settings(records=False), {}).openapi()
    return "\n".join([HEAD, _keys(told["paths"]), _routes(told["paths"]), *_bodies(told), STREAMS, _errors()])


def _keys(paths: Mapping[str, Any]) -> str:
    asking = TestClient(create_app(Settings(records=False, api_keys=("a",)), {}), base_url="http://localhost")
    free = [
        path
        for path in ("/openapi.json", *paths)
        if asking.request(next(iter(paths.get(path, ["get"]))), path).status_code != 401
    ]
    how = "`Authorization: Bearer KEY` or `x-api-key: KEY`"
    return f"Where keys are set, every route wants one ({how}) but {', '.join(f'`{path}`' for path in free)}.\n"


def _table(head: str, *rows: str) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "| " + " | ".join(["---"] * columns) + " |", *rows]) + "\n"


def _routes(paths: Mapping[str, Any]) -> str:
    rows = []
    plain = []
    for path, methods in paths.items():
        for method, operation in methods.items():
            asked = [each["name"] for each in operation.get("parameters", []) if each["in"] == "query"]
            named = " Takes " + ", ".join(f"`{name}`" for name in asked) + "." if asked else ""
            rows.append(f"| `{method.upper()} {path}` | {_line(operation['description'])}{named} |")
            if method == "get" and "{" not in path and path not in NO_JSON:
                needs = f"   # needs {NEEDS[path]}" if path in NEEDS else ""
                plain.append(f"curl -s {ADDRESS}{path}{needs}")
    table = _table("| route | what it does |", *rows)
    headers = "Routes that ask a model also take the headers `x-request-timeout-s` and `x-nearfar-policy`.\n"
    return f"## Routes\n\n{table}\n{headers}\n```sh\n" + "\n".join(plain) + "\n```\n"


def _columns(rows: list[str]) -> str:
    """A table of fields; without the last column where it would be empty."""
    if not rows:
        return ""
    if all(row.endswith("|  |") for row in rows):
        return _table("| field | type | default |", *(row.removesuffix("  |") for row in rows))
    return _table("| field | type | default | about |", *rows)


def _bodies(told: Mapping[str, Any]) -> Iterator[str]:
    seen: dict[str, list[str]] = {}
    schemas = told["components"]["schemas"]
    for path, methods in told["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content")
        if not content:
            continue
        body = content["application/json"]
        schema = _resolved(body["schema"], schemas)
        required = schema.get("required", [])
        rows = [_row(name, each, name in required, schemas) for name, each in schema["properties"].items()]
        yield f"## POST {path}\n"
        if path in DIALECTS:
            yield f"Fields as {DIALECTS[path]} documents them; these are read.\n"
        before = seen.get(LIKE.get(path, ""), [])
        seen[path] = rows
        if before:
            left_out = [row.split("|")[1].strip() for row in before if row not in rows]
            yield f"The fields of `{LIKE[path]}` but {', '.join(left_out)}" + (
                ", and:\n" if set(rows) - {*before} else ".\n"
            )
        yield _columns([row for row in rows if row not in before])
        yield "```sh\n" + "\n".join(_example(path, body["example"])) + "\n```\n"


def _example(path: str, body: Any) -> Iterator[str]:
    address = f"{ADDRESS}{path}"
    if path == VOTE:
        yield BLIND
        address = f'"{ADDRESS}/compare/$id/vote"'
    yield f"curl -s {address} -H 'content-type: application/json' -d '{json.dumps(body)}'"


def _row(name: str, schema: Mapping[str, Any], required: bool, schemas: Mapping[str, Any]) -> str:
    default = schema.get("default")
    shown = (
        "required" if required else "" if default in (None, [], {}) or "$ref" in schema else f"`{json.dumps(default)}`"
    )
    return f"| `{name}` | {_kind(schema, schemas)} | {shown} | {_line(schema.get('description', ''))} |"


def _kind(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    if "anyOf" in schema or "oneOf" in schema:
        kinds = [_kind(each, schemas) for each in schema.get("anyOf") or schema["oneOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in schema:
        return _named(schema, schemas)
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{each}`" for each in schema.get("enum") or [schema["const"]])
    match schema.get("type"):
        case "array":
            return f"list of {_kind(schema.get('items', {}), schemas)}"
        case "integer" | "number" as kind:
            return kind + _bounds(schema)
        case "string":
            return "data URL" if schema.get("pattern", "").startswith("^data:") else "string"
        case None:
            return "any"
        case kind:
            return str(kind)


def _named(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    """An object by the `type`s or fields that it is known by."""
    properties = _resolved(schema, schemas)["properties"]
    kind = properties.get("type", {})
    if kind and "const" not in kind and "enum" not in kind:
        kind = {}
    named = [kind["const"]] if "const" in kind else kind.get("enum", [])
    return (
        ", ".join(f"`{each}`" for each in named) if named else "{" + ", ".join(f"`{each}`" for each in properties) + "}"
    )


def _bounds(schema: Mapping[str, Any]) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    above = f", above {schema['exclusiveMinimum']:g}" if "exclusiveMinimum" in schema else ""
    if least is not None and most is not None:
        return f", {_number(least)} to {_number(most)}"
    return above + (f", from {_number(least)}" if least is not None else "") + (f", to {_number(most)}" if most else "")


def _number(value: float) -> str:
    return "2^63 - 1" if value == 2**63 - 1 else f"{value:,.0f}" if value >= 1 and value == int(value) else f"{value:g}"


def _resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    resolved: Mapping[str, Any] = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return resolved


def _line(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def _errors() -> str:
    found = {}
    for kind in sorted(_kinds(NearfarError), key=lambda each: (each.status, each.type)):
        if kind.__module__ in HOMES and (kind.status, kind.type) not in found:
            error = kind("")
            openai, anthropic = openai_error_object(error, ""), anthropic_error_object(error, "")["error"]
            told = f"`{openai['type']}`, `{openai['code']}` | `{anthropic['type']}`"
            when = UNEXPECTED if kind is NearfarError else _line(kind.__doc__ or "")
            found[kind.status, kind.type] = f"| {kind.status} | `{kind.type}` | {told} | {when} |"
    head = "| status | type | OpenAI's type, code | Anthropic's type | when |"
    return f"{ERRORS}\n{_table(head, *found.values())}"


def _kinds(kind: type[NearfarError]) -> Iterator[type[NearfarError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


if __name__ == "__main__":
    FILE.write_text(reference())
    print(f"wrote {FILE}")
