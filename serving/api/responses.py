"""`/v1/responses`: the Responses dialect of OpenAI. Nothing is stored: a conversation comes whole with each request."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal, assert_never

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Discriminator, Field, Tag

from models.answerer import Answer, Answerer, whole
from models.errors import BadRequest, NearfarError
from models.events import AnswerEvent, Failed, Finished, Restarted, TextDelta, ToolCallDelta, Usage
from models.images import Detail
from models.request import (
    MAX_TOKENS_BOUND,
    AnswerRequest,
    GenerationSettings,
    ImagePart,
    Message,
    Part,
    TextPart,
    ToolCallPart,
    ToolResultPart,
    VideoPart,
)
from serving.api.accounts import route_extension
from serving.api.body import AtLeastOne, Temperature, TopLogprobs, TopP, decode_data_url
from serving.api.caller import choose
from serving.api.dialects import Loose, OrText, error_events, file_part, one_detail, read_body, token_object, translated
from serving.api.errors import openai_error_object
from serving.api.formats import openai_tool_use, output_format
from serving.api.security import require_key
from serving.api.streaming import event_stream, unless_client_leaves

LOGPROBS = "message.output_text.logprobs"  # in `include`
router = APIRouter(prefix="/v1", dependencies=[Depends(require_key)])


class TextContent(Loose):
    type: Literal["input_text", "output_text"]
    text: str


class RefusalContent(Loose):
    type: Literal["refusal"]
    refusal: str


class ImageContent(Loose):
    type: Literal["input_image"]
    image_url: str | None = None
    detail: Literal["low", "high", "auto", "original"] = "auto"


class VideoContent(Loose):
    """No part of that dialect: named as its pictures are."""

    type: Literal["input_video"]
    video_url: str


class FileContent(Loose):
    type: Literal["input_file"]
    file_data: str | None = None


Content = TextContent | RefusalContent | ImageContent | VideoContent | FileContent
Contents = Annotated[
    list[Annotated[Content, Field(discriminator="type")]], OrText(lambda text: {"type": "input_text", "text": text})
]


class MessageItem(Loose):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Contents

    def to_message(self) -> Message:
        return Message(role="system" if self.role == "developer" else self.role, parts=tuple(map(_part, self.content)))


class CallItem(Loose):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    def to_message(self) -> Message:
        call = ToolCallPart(call_id=self.call_id, name=self.name, arguments=self.arguments)
        return Message(role="assistant", parts=(call,))


class CallOutputItem(Loose):
    type: Literal["function_call_output"]
    call_id: str
    output: Contents

    def to_message(self) -> Message:
        """The result in words, then its pictures."""
        text = "\n".join(piece.text for piece in self.output if isinstance(piece, TextContent))
        others = (_part(piece) for piece in self.output if not isinstance(piece, TextContent))
        return Message(role="tool", parts=(ToolResultPart(call_id=self.call_id, text=text), *others))


class ReasoningItem(Loose):
    """What another model thought in an earlier turn: of no use to this one."""

    type: Literal["reasoning"]


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        lambda item: (item.get("type") or "message") if isinstance(item, dict) else None,
        custom_error_type="input_item",
        custom_error_message="an item is a message, function_call, function_call_output or reasoning",
    ),
]


class TextConfig(Loose):
    format: dict[str, Any] = Field(default_factory=lambda: {"type": "text"})


class ResponsesBody(Loose):
    """What is read of a request for a response."""

    input: Annotated[list[Item], Field(min_length=1), OrText(lambda text: {"role": "user", "content": text})]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: AtLeastOne | None = None
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    stream: bool = False
    text: TextConfig = TextConfig()
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    include: tuple[str, ...] = ()
    top_logprobs: TopLogprobs = 0
    metadata: dict[str, str] = Field(default_factory=dict)
    previous_response_id: object = Field(None, description="400: nothing is kept here")
    conversation: object = Field(None, description="400: nothing is kept here")
    background: bool = Field(False, description="true is 400")

    def to_request(self) -> AnswerRequest:
        """The nouns below HTTP. `max_output_tokens` is cut to what any model here can take."""
        for name in ("previous_response_id", "conversation", "background"):
            if getattr(self, name):
                raise BadRequest(f"{name}: responses are not kept here; send the whole conversation", param=name)
        limit = self.max_output_tokens
        settings = GenerationSettings(
            max_tokens=min(limit, MAX_TOKENS_BOUND) if limit is not None else 256,
            temperature=self.temperature,
            top_p=self.top_p,
            top_logprobs=self.top_logprobs if LOGPROBS in self.include else None,
        )
        first = [Message(role="system", parts=(TextPart(text=self.instructions),))] if self.instructions else []
        turns = [item.to_message() for item in self.input if not isinstance(item, ReasoningItem)]
        return AnswerRequest(
            messages=(*first, *turns),
            settings=settings,
            detail=one_detail(self._details()),
            output=output_format(self.text.format),
            tool_use=openai_tool_use(self.tools, self.tool_choice, parallel=self.parallel_tool_calls),
        )

    def _details(self) -> Iterator[Detail]:
        for item in self.input:
            for piece in item.content if isinstance(item, MessageItem) else ():
                if isinstance(piece, ImageContent):
                    yield "high" if piece.detail == "original" else piece.detail


def _part(piece: Content) -> Part:
    match piece:
        case TextContent(text=text) | RefusalContent(refusal=text):
            return TextPart(text=text)
        case ImageContent(image_url=url):
            return ImagePart(data=_data(url, "image_url"))
        case VideoContent(video_url=url):
            return VideoPart(data=_data(url, "video_url"))
        case FileContent(file_data=url):
            return file_part(_data(url, "file_data"))
        case _:
            assert_never(piece)


def _data(url: str | None, name: str) -> bytes:
    if url is None:
        raise BadRequest(f"files are not kept here and nothing is fetched: {name} takes a data URL", param="input")
    return decode_data_url(url, "input")


@router.post("/responses")
async def create_response(request: Request) -> Response:
    """One response, plainly or streamed."""
    body = await read_body(ResponsesBody, request)
    answerer = choose(request, body.model).answerer
    question = body.to_request()
    translator = ResponseEvents(_frame(body, answerer.name), request.state.request_id)
    if body.stream:
        written = translated(answerer.stream(question), translator)
        return await event_stream(request, written, error_events(translator))
    return JSONResponse(await unless_client_leaves(request, _whole(answerer, question, translator)))


async def _whole(answerer: Answerer, question: AnswerRequest, translator: ResponseEvents) -> dict[str, Any]:
    """The response that the last event of the stream would hold."""
    answer = await whole(answerer, question)
    *_, last = [data for event in _events(answer) for data in translator.push(event)]
    response: dict[str, Any] = last["response"]
    return response


def _events(answer: Answer) -> Iterator[AnswerEvent]:
    if answer.text:
        yield TextDelta(text=answer.text, tokens=answer.tokens)
    for index, call in enumerate(answer.tool_calls):
        yield ToolCallDelta(index=index, arguments=call.arguments, call_id=call.call_id, name=call.name)
    yield answer.finished


def _frame(body: ResponsesBody, model: str) -> dict[str, Any]:
    """What a response says of its request."""
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "temperature": body.temperature,
        "text": {"format": body.text.format},
        "tool_choice": body.tool_choice,
        "tools": body.tools,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "metadata": body.metadata,
        "store": False,
    }


def _usage(usage: Usage) -> dict[str, Any] | None:
    if usage.prompt_tokens is None or usage.completion_tokens is None:
        return None
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens or 0,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.thinking_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


class ResponseEvents:
    """The events of one response: items, one open at a time, a message with its text or a function call."""

    def __init__(self, frame: dict[str, Any], request_id: str) -> None:
        self._frame, self._request_id = frame, request_id
        self._number = 0
        self._output: list[dict[str, Any]] = []  # the items; the last is open where _open is set
        self._open: Literal["text"] | int | None = None  # the kind of the open item, or the number of its tool call
        self._pieces: list[str] = []  # of the open item
        self._logprobs: list[dict[str, Any]] = []  # of its tokens

    def begin(self) -> Iterator[dict[str, Any]]:
        """What is known before the answer."""
        yield self._event("response.created", response=self._frame)
        yield self._event("response.in_progress", response=self._frame)

    def push(self, event: AnswerEvent) -> Iterator[dict[str, Any]]:
        """What one event becomes. The last one holds the whole response."""
        match event:
            case TextDelta(text=text, tokens=tokens):
                if self._open != "text":
                    yield from self._leave()
                    yield from self._enter_message()
                self._pieces.append(text)
                logprobs = list(map(token_object, tokens))
                self._logprobs += logprobs
                yield self._in_item("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)
            case ToolCallDelta(index=index, arguments=arguments):
                if self._open != index:
                    yield from self._leave()
                    yield from self._enter_call(event)
                if arguments:
                    self._pieces.append(arguments)
                    yield self._in_item("response.function_call_arguments.delta", delta=arguments)
            case Restarted():
                raise NearfarError("a restart that nobody asked for")
            case Finished():
                yield from self._finish(event)
            case Failed(error=error):
                if not self._number:  # the silence before the answer was filled, and then it failed
                    yield from self.begin()
                told = openai_error_object(error, self._request_id)
                names = ("code", "message", "param", "request_id", "nearfar")
                yield self._event("error", **{name: told[name] for name in names if name in told})
                failure = {"code": told["code"], "message": told["message"]}
                usage = _usage(error.account.usage) if error.account and error.account.usage else None
                failed = self._response(status="failed", error=failure, usage=usage)
                yield self._event("response.failed", response=failed)
            case _:
                assert_never(event)

    def _finish(self, finished: Finished) -> Iterator[dict[str, Any]]:
        reasons = {"length": "max_output_tokens", "refusal": "content_filter"}
        reason = reasons.get(finished.finish_reason)
        status = "incomplete" if reason else "completed"
        yield from self._leave(status)
        response = self._response(
            status=status,
            incomplete_details={"reason": reason} if reason else None,
            usage=_usage(finished.usage),
            **route_extension(finished),
        )
        yield self._event(f"response.{status}", response=response)

    def _enter_message(self) -> Iterator[dict[str, Any]]:
        item = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "content": []}
        yield self._enter("text", item)
        yield self._in_item("response.content_part.added", content_index=0, part=_text_part("", []))

    def _enter_call(self, call: ToolCallDelta) -> Iterator[dict[str, Any]]:
        item = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "arguments": ""}
        yield self._enter(call.index, {**item, "call_id": call.call_id, "name": call.name})

    def _enter(self, key: Literal["text"] | int, item: dict[str, Any]) -> dict[str, Any]:
        self._open = key
        self._pieces, self._logprobs = [], []
        self._output.append({**item, "status": "in_progress"})
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=self._output[-1])

    def _leave(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """Close the open item, if one is. Its text or arguments are whole, unless the answer was cut."""
        if self._open is None:
            return
        whole = "".join(self._pieces)
        if self._open == "text":
            part = _text_part(whole, self._logprobs)
            yield self._in_item("response.output_text.done", content_index=0, text=whole, logprobs=self._logprobs)
            yield self._in_item("response.content_part.done", content_index=0, part=part)
            done: dict[str, Any] = {"content": [part]}
        else:
            name = self._output[-1]["name"]
            yield self._in_item("response.function_call_arguments.done", name=name, arguments=whole)
            done = {"arguments": whole}
        self._open = None
        self._output[-1] = {**self._output[-1], **done, "status": status}
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=self._output[-1])

    def _response(self, **known: Any) -> dict[str, Any]:
        return {**self._frame, "output": list(self._output), **known}

    def _in_item(self, kind: str, **fields: Any) -> dict[str, Any]:
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
