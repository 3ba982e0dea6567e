"""What a report rests on: inputs and what every target made of them, out of kept comparisons or out of a run's file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comparisons.pairs import Outcome, outcome
from comparisons.records import Record
from comparisons.run_file import Answered, Run
from comparisons.scoreboard import outcome_of
from models.request import Task


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input. `answers` by target, the first asking first; a target that was not asked has none.

    `slices` are the groups it counts in. `is_corrupted`: something was done to the pictures of another input.
    """

    case_id: str
    sha256: str | None
    prompt: str | None
    task: Task
    references: tuple[str, ...]
    slices: tuple[str, ...]
    is_corrupted: bool
    answers: Mapping[str, tuple[Outcome, ...]]
    thumbnail: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All inputs in the order in which they came. `versions`: of each target, every set of them and its answers.

    `settings`: each way in which was asked, and how often. `left_out`: what does not count, by why.
    """

    targets: tuple[str, ...]
    cases: tuple[Case, ...]
    versions: Mapping[str, tuple[Mapping[str, Any], ...]]
    settings: tuple[tuple[Mapping[str, Any], int], ...]
    left_out: Mapping[str, int]


def evidence_of_records(records: Sequence[Record]) -> Evidence:
    """Of records, the oldest first. Sides that are hidden until a vote are left out.

    Of an input's records, the first with a reference counts for each target, else the first: asked again, the same
    input is no new sample.
    """
    shown = [record for record in records if not record.is_hidden()]
    by_input: dict[str, list[Record]] = {}
    for record in shown:
        by_input.setdefault(record.input.sha256, []).append(record)
    cases = []
    for same in by_input.values():
        ordered = sorted(same, key=lambda record: not _has_reference(record))
        answers: dict[str, tuple[Outcome, ...]] = {}
        for record in ordered:
            for arm in record.arms:
                found = outcome(arm.result, has_reference=_has_reference(record))
                answers.setdefault(arm.target, (found,))
        first = ordered[0]
        cases.append(
            Case(
                case_id=first.record_id,
                sha256=first.input.sha256,
                prompt=first.input.prompt,
                task=first.task,
                references=(first.reference,) if first.reference and _has_reference(first) else (),
                slices=(f"task={first.task}",),
                is_corrupted=False,
                answers=answers,
            )
        )
    return Evidence(
        targets=tuple(dict.fromkeys(arm.target for record in shown for arm in record.arms)),
        cases=tuple(cases),
        versions=_versions((arm.target, arm.versions) for record in shown for arm in record.arms),
        settings=_counted([record.settings for record in shown]),
        left_out={
            "records that asked an input again": len(shown) - len(cases),
            "blind comparisons that nobody has voted on": len(records) - len(shown),
        },
    )


def evidence_of_run(run: Run) -> Evidence:
    """Of the rows that were asked."""
    targets: tuple[str, ...] = tuple(run.header["targets"])
    given: dict[str, dict[str, list[Answered]]] = {}
    for ask, answered in sorted(run.answers.items(), key=lambda each: each[0].repeat):
        given.setdefault(ask.row_id, {}).setdefault(ask.target, []).append(answered)
    cases = tuple(
        Case(
            case_id=row.row_id,
            sha256=run.inputs[row.row_id].sha256 if row.row_id in run.inputs else None,
            prompt=row.prompt,
            task=row.task,
            references=row.references,
            slices=row.slices,
            is_corrupted=row.is_corrupted,
            answers={
                target: tuple(outcome_of(each, has_reference=bool(row.references)) for each in found)
                for target, found in given[row.row_id].items()
            },
            thumbnail=run.inputs[row.row_id].thumbnail if row.row_id in run.inputs else None,
        )
        for row in run.rows
        if row.row_id in given
    )
    told = ("repeats", "seed", "max_tokens", "detail", "reduction")
    return Evidence(
        targets=targets,
        cases=cases,
        versions=_versions(pair for session in run.sessions for pair in session["versions"].items()),
        settings=(({name: run.header.get(name) for name in told}, len(run.answers)),),
        left_out={"rows that were not asked yet": len(run.rows) - len(cases)},
    )


def _has_reference(record: Record) -> bool:
    return bool(record.reference and record.reference.strip())


def _versions(told: Any) -> dict[str, tuple[Mapping[str, Any], ...]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for target, versions in told:
        known = found.setdefault(target, [])
        if versions and versions not in known:
            known.append(versions)
    return {target: tuple(known) for target, known in found.items()}


def _counted(settings: Sequence[Mapping[str, Any]]) -> tuple[tuple[Mapping[str, Any], int], ...]:
    by_text = {repr(sorted(each.items())): each for each in settings}
    count = Counter(repr(sorted(each.items())) for each in settings)
    return tuple((by_text[text], times) for text, times in count.most_common())
