"""What this service keeps of comparisons: made of request and results, in a store that is opened when it is needed."""

from __future__ import annotations

import asyncio
import base64
import csv
import hashlib
import io
import json
import platform
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, TypeVar

from comparisons.ballots import Ballots, draw
from comparisons.database import database_url
from comparisons.measures import EXACTLY, Measure, Tolerance
from comparisons.rating import WINNERS
from comparisons.records import ArmRecord, Record, event_objects, input_record
from comparisons.results import Comparison
from comparisons.store import Retention, Store
from models.bundle import Bundle
from models.errors import BadRequest, NotFound
from models.request import AnswerRequest, Task
from serving.settings import Settings
from serving.targets import Target

Result = TypeVar("Result")
DAY_S = 86_400.0
SIDES = ("a", "b")
_RNG = random.SystemRandom()
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with which a spreadsheet's formula begins
PROMPT_FILES = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A comparison before it is run, as its record will need it."""

    request: AnswerRequest
    task: Task
    reference: str | None
    owner: str
    targets: tuple[Target, ...]
    parallel: bool = False
    blind: bool = False
    measure: Measure = "exact"
    tolerance: Tolerance = EXACTLY
    repeats: int = 1
    judge: str | None = None


class Records:
    """The records of one service, or of one command. Making it opens nothing.

    Where records are switched off, nothing is kept and nothing found.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.time) -> None:
        self._settings, self._clock = settings, clock
        self._url = database_url(settings.database, settings.data_dir)
        self._store: Store | None = None
        self._opening = threading.Lock()

    def store(self) -> Store:
        """The open store; blocks. Raises Unavailable, or NotFound where records are switched off."""
        settings = self._settings
        if not settings.records:
            raise NotFound("records are switched off here")
        with self._opening:
            if self._store is None:
                age = settings.records_days
                bound = Retention(max_age_s=age and age * DAY_S, max_bytes=settings.records_bytes or None)
                self._store = Store(self._url, retention=bound, clock=self._clock)
            return self._store

    async def check(self) -> None:
        """Before a comparison costs anything. Raises Unavailable where it could not be kept."""
        if self._settings.records:
            await self.work(Store.check_writable)

    def is_on(self) -> bool:
        """Whether comparisons are kept here."""
        return self._settings.records

    async def keep(self, asked: Asked, comparison: Comparison, shown: Mapping[str, Any]) -> None:
        """Keep a comparison; `shown` is its object of `POST /compare`. Raises Unavailable."""
        if self._settings.records:
            await self.work(lambda store: store.add(self._record(asked, comparison, shown)))

    async def work(self, task: Callable[[Store], Result]) -> Result:
        """Something with the store, in a worker thread."""
        return await asyncio.to_thread(lambda: task(self.store()))

    def close(self) -> None:
        """Give the connections back."""
        if self._store:
            self._store.close()

    def _record(self, asked: Asked, comparison: Comparison, shown: Mapping[str, Any]) -> Record:
        keep = self._settings.keep_inputs
        return Record(
            record_id=comparison.comparison_id,
            created_at=self._clock(),
            owner=asked.owner,
            task=asked.task,
            input=input_record(asked.request, keep=keep),
            settings=_settings_of(asked, whole=keep),
            reference=asked.reference,
            arms=tuple(
                ArmRecord(target=result.target, result=row, events=result.events, versions=target_versions(target))
                for result, row, target in zip(comparison.results, shown["results"], asked.targets, strict=True)
            ),
            tradeoff=shown["tradeoff"],
            verdict=shown["verdict"],
            besides={name: each for name, each in shown.items() if name in ("judge", "formulas")},
            blind=asked.blind and all(result.finished for result in comparison.results),
        )


def _settings_of(asked: Asked, *, whole: bool) -> dict[str, Any]:
    """How the answer was to be made. What an output format names is part of the input, and kept with it alone."""
    request, generation = asked.request, asked.request.settings
    output = request.output
    return {
        "max_tokens": generation.max_tokens,
        "temperature": generation.temperature,
        "seed": generation.seed,
        "detail": request.detail,
        "policy": request.policy,
        "cache": request.cache,
        "reduce": asdict(request.reduction) if request.reduction else None,
        "parallel": asked.parallel,
        "measure": asked.measure,
        "tolerance": asdict(asked.tolerance),
        "repeats": asked.repeats,
        "judge": asked.judge,
        "output": type(output).__name__ if output else None,
        "output_holds": asdict(output) if output and whole else None,
    }


def target_versions(target: Target) -> dict[str, Any]:
    """Of what made an answer: the model's own, and of the code around it."""
    return {**target.versions, **{name: package_version(name) for name in ("nearfar", "pillow", "genai-prices")}}


def bundle_versions(bundle: Bundle) -> dict[str, Any]:
    """A model of this machine by the hashes of what makes its answers."""
    manifest = bundle.manifest
    hashes = {name: entry.sha256 for name, entry in sorted(manifest.files.items())}
    return {
        "model": _digest({name: each for name, each in hashes.items() if name.startswith("onnx/")}),
        "recipe": manifest.recipe,
        "source": manifest.source.sha256,
        "revision": manifest.source.revision,
        "preprocessing": _digest(manifest.processing),
        "prompt": _digest({name: hashes.get(name) for name in PROMPT_FILES}),
        "onnxruntime": package_version("onnxruntime"),
        "machine": platform.machine(),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=asdict, sort_keys=True).encode()).hexdigest()[:16]


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def summary_object(record: Record) -> dict[str, Any]:
    """A row of `GET /compare`; with a thumbnail where the record was read whole."""
    picture = {"thumbnail": thumbnail_url(record)} if record.input.thumbnail else {}
    return {
        **picture,
        "id": record.record_id,
        "created_at": _when(record),
        "task": record.task,
        "input_sha256": record.input.sha256,
        "kept": record.input.is_kept,
        "prompt": record.input.prompt,
        "reference": record.reference,
        "blind": record.blind,
        "results": hidden_results(record)
        if record.is_hidden()
        else [
            {
                "target": arm.target,
                "ok": arm.result["ok"],
                "text": arm.result.get("text"),
                "correct": arm.correct,
                "confidence": arm.confidence,
                "total_ms": arm.result.get("timings", {}).get("total_ms"),
                "usd": arm.result.get("cost", {}).get("usd"),
            }
            for arm in record.arms
        ],
    }


def hidden_results(record: Record) -> list[dict[str, Any]]:
    """The sides of a blind comparison, before the vote."""
    return [side_object(side, arm.result) for side, arm in zip(SIDES, record.arms, strict=True)]


def side_object(side: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """What one side of a blind comparison said, and nothing of who it was or what it took."""
    if result["ok"]:
        return {"side": side, "ok": True, "text": result["text"]}
    return {"side": side, "ok": False, "error": {"type": "no_answer", "message": "this side gave no answer"}}


def blind_object(shown: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison's object without what tells who is who. `votable`: false where a side gave no answer."""
    results = [side_object(side, result) for side, result in zip(SIDES, shown["results"], strict=True)]
    return {"id": shown["id"], "blind": True, "results": results, "votable": all(each["ok"] for each in results)}


async def two_sides(records: Records, owner: str, targets: Sequence[Target]) -> list[Target]:
    """The two of the targets that were shown least, on sides by chance. Raises BadRequest."""
    if not records.is_on():
        raise BadRequest("a blind comparison is one that is kept, and records are switched off here", param="blind")
    seen = await records.work(lambda store: Ballots(store).shown(owner))
    by_name = {target.name: target for target in targets}
    return [by_name[name] for name in draw(list(by_name), seen, _RNG)]


def record_object(record: Record, voter: str | None = None) -> dict[str, Any]:
    """`GET /compare/{id}`: what `POST /compare` answered, and all that is known beside it, unless it is hidden."""
    common = _common_object(record)
    if record.is_hidden(voter):
        return {**common, "results": hidden_results(record)}
    whole = {
        **common,
        "results": [arm.result for arm in record.arms],
        "tradeoff": record.tradeoff,
        "verdict": record.verdict,
        **record.besides,
        "events": {arm.target: event_objects(arm.events) for arm in record.arms},
        "versions": {arm.target: arm.versions for arm in record.arms},
    }
    if record.blind:
        counts = Counter(cast.winner for cast in record.votes)
        whole["sides"] = dict(zip(SIDES, (arm.target for arm in record.arms), strict=True))
        whole["votes"] = {winner: counts[winner] for winner in WINNERS}
    return whole


def _common_object(record: Record) -> dict[str, Any]:
    asked = record.input
    return {
        "id": record.record_id,
        "created_at": _when(record),
        "owner": record.owner or None,
        "task": record.task,
        "input": {
            "sha256": asked.sha256,
            "prompt_sha256": asked.prompt_sha256,
            "prompt": asked.prompt,
            "files": [{"kind": each.kind, "sha256": each.sha256, "bytes": each.size_bytes} for each in asked.files],
            "kept": asked.is_kept,
            "thumbnail": thumbnail_url(record),
        },
        "settings": record.settings,
        "reference": record.reference,
        "blind": record.blind,
    }


def thumbnail_url(record: Record) -> str | None:
    """The thumbnail as a data URL."""
    picture = record.input.thumbnail
    return f"data:image/webp;base64,{base64.b64encode(picture).decode()}" if picture else None


_COLUMNS = (
    *("id", "created_at", "task", "input_sha256", "reference", "target", "order", "ok", "correct", "confidence"),
    *("text", "error", "prompt_tokens", "completion_tokens", "ttft_ms", "total_ms", "usd", "bytes_sent", "left_device"),
)


def csv_rows(records: Iterator[Record]) -> Iterator[Sequence[Any]]:
    """A heading, then a row for each arm. A text that a spreadsheet would take for a formula gets an apostrophe."""
    yield _COLUMNS
    for record in records:
        known: Sequence[Mapping[str, Any]] = [arm.result for arm in record.arms]
        for result in hidden_results(record) if record.is_hidden() else known:
            found = {**result, **result.get("usage", {}), **result.get("timings", {}), **result.get("egress", {})}
            found |= {"usd": result.get("cost", {}).get("usd"), "error": result.get("error", {}).get("type")}
            found |= {"id": record.record_id, "created_at": _when(record), "task": record.task}
            found |= {"input_sha256": record.input.sha256, "reference": record.reference}
            yield [_cell(found.get(column)) for column in _COLUMNS]


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def exported(records: Iterator[Record], form: Literal["jsonl", "csv"]) -> Iterator[str]:
    """The lines of a file, in pieces."""
    match form:
        case "jsonl":
            for record in records:
                yield json.dumps(record_object(record), ensure_ascii=False) + "\n"
        case "csv":
            for row in csv_rows(records):
                line = io.StringIO()
                csv.writer(line).writerow(row)
                yield line.getvalue()


def seconds_of(moment: datetime | None) -> float | None:
    """Seconds since 1970; a time without a zone is UTC."""
    if moment is None:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _when(record: Record) -> str:
    return datetime.fromtimestamp(record.created_at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
