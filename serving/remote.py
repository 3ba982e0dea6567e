"""A target of a running service as an answerer, through its `POST /infer`. Its figures are that service's own."""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from comparisons.egress import leaves_device
from models.errors import BadRequest, NotOffered, Unavailable, UpstreamError
from models.events import (
    AnswerEvent,
    Cost,
    Egress,
    Failed,
    Finished,
    ImageReport,
    Memory,
    TextDelta,
    Timings,
    Usage,
)
from models.images import known_format
from models.reduction import reduced
from models.request import AnswerRequest, DocumentPart, ImagePart, JsonFormat, TextPart, VideoPart
from serving.services import in_daemon_thread

ANSWER_WITHIN_S = 600.0
Figures = TypeVar("Figures", Usage, Timings, ImageReport, Memory, Cost, Egress)


class PictureSize(NamedTuple):
    """A picture as far as its price depends on it."""

    width: int
    height: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class RemoteService:
    """A nearfar service at an address, and the key it wants, if any."""

    url: str
    key: str = field(default="", repr=False)

    def targets(self) -> list[dict[str, Any]]:
        """What `GET /targets` lists. Raises Unavailable, UpstreamError."""
        listed: list[dict[str, Any]] = self.ask("/targets", None)["targets"]
        return listed

    def ask(self, path: str, body: bytes | None) -> dict[str, Any]:
        """POST JSON or, without a body, GET; read JSON. Raises Unavailable, UpstreamError."""
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url.rstrip("/") + path, data=body, headers=headers)
        proxies: dict[str, str] | None = (
            None if leaves_device(self.url) else {}
        )  # no proxy stands before this machine's own addresses
        opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
        try:
            with opener.open(request, timeout=ANSWER_WITHIN_S) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            raise UpstreamError(_message(self.url, error), upstream_status=error.status) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise Unavailable(f"{self.url}: {getattr(error, 'reason', None) or error}") from error


def _message(url: str, error: urllib.error.HTTPError) -> str:
    try:
        said = json.load(error)["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        said = "no message"
    return f"{url} answered {error.status}: {said}"


class RemoteTarget:
    """One of its targets."""

    def __init__(self, service: RemoteService, name: str) -> None:
        self._service, self.name = service, name

    async def stream(self, request: AnswerRequest) -> AsyncGenerator[AnswerEvent, None]:
        """The whole answer at once, then Finished, or Failed."""
        body = b""
        try:
            body = json.dumps(_body(request, self.name)).encode()
            said = await in_daemon_thread(self._service.ask, "/infer", body)
            finished = _finished(said, self._egress(said, len(body)))
            text = str(said["text"])
        except (UpstreamError, Unavailable, BadRequest) as error:
            yield Failed(error=error, egress=self._sent(len(body)))
            return
        except (KeyError, TypeError):
            odd = UpstreamError(f"{self._service.url} answered with something else than an answer")
            yield Failed(error=odd, egress=self._sent(len(body)))
            return
        if text:
            yield TextDelta(text=text)
        yield finished

    def estimate(self, *, text_bytes: int, pictures: Sequence[PictureSize], max_tokens: int) -> dict[str, Any]:
        """The object of `POST /estimate`: sizes are sent, and nothing of what would be asked."""
        body = {
            "targets": [self.name],
            "text_bytes": text_bytes,
            "pictures": [picture._asdict() for picture in pictures],
            "max_tokens": max_tokens,
        }
        found: dict[str, Any] = self._service.ask("/estimate", json.dumps(body).encode())["estimates"][0]
        return found

    async def count_tokens(self, request: AnswerRequest) -> int:
        """Not asked for."""
        raise BadRequest(f"{self.name} tells tokens only with an answer", param="model")

    async def aclose(self) -> None:
        """Nothing is held."""

    def _egress(self, said: Mapping[str, Any], body_bytes: int) -> Egress:
        """What left this device: the request to the service, where that is elsewhere; else what it sent on."""
        return self._sent(body_bytes) if leaves_device(self._service.url) else _known(Egress, said["egress"])

    def _sent(self, body_bytes: int) -> Egress:
        far = leaves_device(self._service.url)
        return Egress(left_device=far, bytes_sent=body_bytes, destination=urlsplit(self._service.url).netloc)


def _body(request: AnswerRequest, target: str) -> dict[str, Any]:
    (message,) = request.messages
    *media, text = message.parts
    if not isinstance(text, TextPart):
        raise NotOffered("POST /infer shows pictures before the text")
    body: dict[str, Any] = {"model": target, "prompt": text.text, "images": []}
    for part in media:
        match part:
            case ImagePart(data=data):
                body["images"].append(_data_url(reduced(data, request.reduction) if request.reduction else data))
            case DocumentPart() | VideoPart() if request.reduction:
                raise NotOffered("pages and frames cannot be reduced before they are sent to a service")
            case DocumentPart(data=data):
                body["document"] = _data_url(data)
            case VideoPart(data=data):
                body["video"] = _data_url(data)
            case _:
                raise NotOffered("POST /infer takes media and one text")
    if isinstance(request.output, JsonFormat):
        schema = request.output.schema
        known = {"type": "json_object"} if schema is None else {"type": "json_schema", "schema": dict(schema)}
        body["response_format"] = known
    return {**body, "max_tokens": request.settings.max_tokens, "detail": request.detail}


def _data_url(data: bytes) -> str:
    kind = known_format(data) or ""
    named = kind if kind.startswith("image/") else "application/octet-stream"
    return f"data:{named};base64,{base64.b64encode(data).decode()}"


def _finished(said: Mapping[str, Any], egress: Egress) -> Finished:
    return Finished(
        model=said["model"],
        target=said["target"],
        finish_reason=said["finish_reason"],
        confidence=said.get("confidence"),
        usage=_known(Usage, said["usage"]),
        timings=_known(Timings, said["timings"]),
        images=tuple(_known(ImageReport, image) for image in said["images"]),
        memory=_known(Memory, said["memory"]),
        egress=egress,
        cost=_known(Cost, said["cost"]),
        notice=said["notice"],
    )


def _known(kind: type[Figures], said: Mapping[str, Any]) -> Figures:
    """A service of another version may tell more."""
    return kind(**{each.name: said[each.name] for each in fields(kind) if each.name in said})
