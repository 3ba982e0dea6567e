"""A report: what kept comparisons, or the file of an evaluation, come to, as one object that a page is made from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from comparisons.claims import checked
from comparisons.decision import VOLUME, Decision, decide
from comparisons.evidence import Case, Evidence, evidence_of_records, evidence_of_run
from comparisons.formulas import FORMULAS
from comparisons.pairs import Outcome, pairs_of, parse_weights
from comparisons.records import Record
from comparisons.report import chosen, differs, figures, severities, slices
from comparisons.run_file import read_run
from comparisons.scoreboard import scoreboard
from comparisons.store import Filter, Store
from models.errors import InvalidValue, NotFound
from serving.api.schemas import tidy
from serving.chain import Chain, Damaged
from serving.ledger import FOLDER
from serving.records import package_version
from serving.verdicts import decided_of, decision_object, two_of

NEWEST = 10_000  # records that one report is made of
ROWS, MAX_ROWS = 100, 500  # inputs that are shown one by one
MAX_CHARACTERS = 600  # of an answer or a question
MAX_VERDICTS = 8


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How a report is made. `targets`: the two of the verdict, comma-separated; `volume`: inputs a month."""

    targets: str | None = None
    weights: str = ""
    volume: int = VOLUME
    rows: int = ROWS
    data_dir: Path | None = None  # whose ledger's head is told
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MAX_ROWS:
            raise InvalidValue(f"rows must be 1 to {MAX_ROWS}, got {self.rows}", param="rows")


@dataclass(frozen=True, kw_only=True)
class Report:
    """`object`: all figures, as JSON has them. `thumbnails`: WebP by the rows' ids."""

    object: Mapping[str, Any]
    thumbnails: Mapping[str, bytes] = field(repr=False)


def report_of_records(store: Store, where: Filter, terms: Terms) -> Report:
    """Of the newest records that fit; blocks. Raises NotFound of none, InvalidValue for wrong terms."""
    found = list(islice(store.all(where, whole=False), NEWEST + 1))
    records = found[:NEWEST][::-1]
    evidence = evidence_of_records(records)
    if not evidence.cases:
        raise NotFound("there is no comparison to report on: nearfar compare and POST /compare keep some")
    shown = [record for record in records if not record.is_hidden()]
    verdicts, why = _verdicts(shown, evidence, terms)
    source = {
        "kind": "records",
        "name": "kept comparisons",
        "licence": None,
        "begun": _when(records[0].created_at),
        "ended": _when(records[-1].created_at),
        "more": len(found) > NEWEST,
    }
    rows = chosen(evidence.cases, terms.rows)
    ids = tuple(case.case_id for case in rows)
    pictures = {record.record_id: record.input.thumbnail for record in store.all(replace(where, ids=ids))}
    return _report(evidence, source, verdicts, why, rows, pictures, {}, terms)


def report_of_run(path: Path, terms: Terms) -> Report:
    """Of an evaluation's file, finished or not. Raises BadRequest for another file, NotFound without answers."""
    run = read_run(path)
    evidence = evidence_of_run(run)
    if not evidence.cases:
        raise NotFound(f"{path} has no answers to report on")
    names = two_of(terms.targets, set(evidence.targets)) or evidence.targets
    if unknown := set(names) - set(evidence.targets):
        raise InvalidValue(f"{path.name} has no target {min(unknown)!r}", param="targets")
    board = scoreboard(run.rows, names, run.answers, weights=parse_weights(terms.weights), volume=terms.volume)
    dataset = run.header["dataset"]
    source = {
        "kind": "run",
        "name": dataset["name"],
        "licence": run.header.get("licence"),
        "begun": run.header.get("begun"),
        "ended": run.sessions[-1]["begun"] if len(run.sessions) > 1 else None,
        "more": False,
    }
    rows = chosen(evidence.cases, terms.rows)
    pictures = {case.case_id: case.thumbnail for case in rows}
    hashes = {"run file, sha256": run.sha256, "data set, sha256": dataset["sha256"]}
    why = None if board.decisions else "a verdict takes two targets that were asked the same input"
    return _report(evidence, source, board.decisions, why, rows, pictures, hashes, terms)


def _verdicts(records: Sequence[Record], evidence: Evidence, terms: Terms) -> tuple[Sequence[Decision], str | None]:
    """The verdict, and those of its first target against all others; none, and why."""
    try:
        main = decided_of(records, targets=terms.targets, weights=terms.weights, volume=terms.volume)
    except NotFound as error:
        if terms.targets:
            raise
        return (), error.message
    others = [target for target in evidence.targets if target not in (main.first, main.second)]
    found = {target: pairs_of(records, main.first, target) for target in others[: MAX_VERDICTS - 1]}
    more = [
        decide(pairs, main.first, target, weights=main.weights, volume=terms.volume)
        for target, pairs in found.items()
        if pairs
    ]
    return (main, *more), None


def _report(
    evidence: Evidence,
    source: Mapping[str, Any],
    verdicts: Sequence[Decision],
    why: str | None,
    rows: Sequence[Case],
    pictures: Mapping[str, bytes | None],
    hashes: Mapping[str, str],
    terms: Terms,
) -> Report:
    decisions = [decision_object(each) for each in verdicts]
    for each in decisions:
        del each["formulas"]  # all are below
    corrupted = sum(case.is_corrupted for case in evidence.cases)
    whole = {
        "made": terms.now.isoformat(timespec="seconds"),
        "nearfar": package_version("nearfar"),
        "source": {
            **source,
            "inputs": len(evidence.cases) - corrupted,
            "corrupted": corrupted,
            "left_out": {reason: count for reason, count in evidence.left_out.items() if count},
        },
        "verdict": decisions[0] if decisions else None,
        "no_verdict": why,
        "other_verdicts": decisions[1:],
        "targets": [asdict(figures(target, evidence.cases)) for target in evidence.targets],
        "severities": [asdict(each) for each in severities(evidence)],
        "slices": {
            name: {target: asdict(share) for target, share in shares.items()}
            for name, shares in slices(evidence).items()
        },
        "rows": {
            "of": len(evidence.cases),
            "different": sum(map(differs, evidence.cases)),
            "shown": [_row(case) for case in rows],
        },
        "claims": [asdict(each) for each in checked(evidence)],
        "method": {
            "formulas": dict(FORMULAS),
            "versions": {target: list(known) for target, known in evidence.versions.items()},
            "settings": [{"asked": dict(settings), "times": times} for settings, times in evidence.settings],
            "hashes": {"inputs, sha256": _inputs_hash(evidence), **hashes, **_ledger(terms.data_dir)},
        },
    }
    shown = {case_id: data for case_id, data in pictures.items() if data}
    return Report(object=tidy(whole), thumbnails=shown)


def _row(case: Case) -> dict[str, Any]:
    return {
        "id": case.case_id,
        "sha256": case.sha256,
        "task": case.task,
        "prompt": case.prompt and _cut(case.prompt),
        "references": [_cut(each) for each in case.references],
        "slices": list(case.slices),
        "different": differs(case),
        "answers": {target: _answer(given) for target, given in case.answers.items()},
    }


def _answer(given: Sequence[Outcome]) -> dict[str, Any]:
    first = given[0]
    return {
        "ok": first.ok,
        "text": None if first.text is None else _cut(first.text),
        "error": first.error_type,
        "score": first.score,
        "total_ms": first.total_ms,
        "usd": first.usd,
        "asked": len(given),
    }


def _cut(text: str) -> str:
    """Bounded, and says what is missing."""
    more = len(text) - MAX_CHARACTERS
    return text if more <= 0 else f"{text[:MAX_CHARACTERS]} … and {more:,} more characters"


def _inputs_hash(evidence: Evidence) -> str:
    """Over the inputs' own hashes, in the order of the alphabet; a row without one counts by its id."""
    names = sorted(case.sha256 or case.case_id for case in evidence.cases)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _ledger(data_dir: Path | None) -> dict[str, str]:
    if data_dir is None:
        return {}
    try:
        head = Chain(data_dir / FOLDER).head()
    except Damaged as error:
        return {"egress ledger": error.message}
    return {"egress ledger, head": str(head)} if head.number else {}


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
