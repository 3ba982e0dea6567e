"""`nearfar doctor`: what this machine is, what can be served on it, and why the rest cannot."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from serving.cli.console import ConfigOption, JsonFlag, ModelsOption, OfflineFlag, fail, settings_from

if TYPE_CHECKING:
    from rich.console import Console

    from serving.doctor.diagnosis import Candidate, Diagnosis
    from serving.doctor.machine import Machine
    from serving.settings import Settings


def doctor(
    model: ModelsOption = None, config: ConfigOption = None, offline: OfflineFlag = False, as_json: JsonFlag = False
) -> None:
    """Look at this machine, recommend model, recipe and settings, and refuse with figures what cannot work.

    Looks at processor, memory, disk, accelerators, installed extras and network policy; sends, fetches and loads
    nothing. Exits 1 where nothing can work, or what is configured cannot.
    """
    from models.errors import NearfarError
    from serving.doctor.diagnosis import diagnose
    from serving.doctor.machine import look
    from serving.local_models import local_bundles

    settings = settings_from(config=config, models=tuple(model or ()), offline=offline or None)
    try:
        machine = look(settings, os.environ)
        diagnosis = diagnose(machine, settings, local_bundles(settings))
    except NearfarError as error:
        fail(error.message)
    if as_json:
        print(json.dumps(diagnosis_object(machine, settings, diagnosis), indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        print_diagnosis(machine, settings, diagnosis, Console())
    if diagnosis.problems:
        raise typer.Exit(1)


def diagnosis_object(machine: Machine, settings: Settings, diagnosis: Diagnosis) -> dict[str, Any]:
    """What `--json` prints. Bytes are bytes; null is not known, or not measured."""
    from models.execution import ROWS

    shown = asdict(machine)
    shown["processor"] = machine.processor._asdict()
    shown["memory"] = machine.memory._asdict()
    shown["disk"]["folder"] = str(machine.disk.folder)
    shown["providers"] = [
        {
            "name": name,
            "available": name in machine.providers,
            "tested": row.tested,
            "comes_with": row.comes_with,
        }
        for name, row in ROWS.items()
    ]
    candidates = [_candidate_object(each) for each in diagnosis.candidates]
    recommended = diagnosis.recommended
    return {
        "ok": not diagnosis.problems,
        "problems": diagnosis.problems,
        "notes": diagnosis.notes,
        "recommended": None
        if recommended is None
        else _candidate_object(recommended) | {"threads": diagnosis.threads, "measure": measure(recommended)},
        "budget_bytes": diagnosis.budget_bytes,
        "models": candidates,
        "machine": shown,
        "network": {
            "policy": settings.policy,
            "offline": settings.offline,
            "host": settings.host,
            "loopback": settings.is_loopback,
            "endpoints": [each.partition("=")[0] for each in settings.endpoints],
            "execution_provider": settings.execution_provider,
        },
    }


def _candidate_object(candidate: Candidate) -> dict[str, Any]:
    shown = asdict(candidate)
    shown["fit"] = candidate.fit._asdict() if candidate.fit else None
    for figures in (shown["speed"], shown["start_up"]):
        if figures:
            figures.pop("shape")
    return shown


def measure(candidate: Candidate) -> str:
    """The command that measures its speed here."""
    return f"nearfar bench --model {candidate.target}"


def print_diagnosis(machine: Machine, settings: Settings, diagnosis: Diagnosis, console: Console) -> None:
    """For people: the machine, the models, what to take; problems last, where they are seen."""
    from rich.markup import escape
    from rich.table import Table

    facts = Table(box=None, show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(machine, settings, diagnosis):
        facts.add_row(name, escape(value))
    models = Table(header_style="bold")
    models.add_column("model", no_wrap=True)
    for heading in ("needs", "slots x context", "files"):
        models.add_column(heading, justify="right", no_wrap=True)
    models.add_column("how", overflow="fold")
    for each in diagnosis.candidates:
        fitting = f"{each.fit.slots} x {each.fit.context:,}" if each.fit else "-"
        size = f"{each.file_bytes / 1e9:.1f} GB" if each.file_bytes >= 1e8 else f"{each.file_bytes / 1e6:.1f} MB"
        style = "dim" if each.refusals else "bold" if each is diagnosis.recommended else None
        cells = (each.target, _gb(each.need_bytes), fitting, size, "; ".join(each.refusals) or each.way)
        models.add_row(*map(escape, cells), style=style)
    console.print(facts)
    console.print(models)
    for line in (*diagnosis.notes, *_advice(diagnosis)):
        console.print(line, markup=False, soft_wrap=True)
    for problem in diagnosis.problems:
        console.print(f"cannot work: {problem}", style="bold red", markup=False, soft_wrap=True)


def _facts(machine: Machine, settings: Settings, diagnosis: Diagnosis) -> list[tuple[str, str]]:
    from models.execution import ROWS

    memory, disk = machine.memory, machine.disk
    limit = f", limit of the control group {_gb(memory.limit_bytes)}" if memory.limit_bytes else ""
    free = "not known" if memory.free_bytes is None else _gb(memory.free_bytes)
    origin = "set" if settings.memory_budget else "nine tenths of what is free"
    providers = [
        f"{name}{'' if row.tested else ' (untested)'}" for name, row in ROWS.items() if name in machine.providers
    ]
    extras = [f"{name} {'yes' if machine.has_extra(name) else 'no'}" for name in machine.extras]
    where = "loopback alone" if settings.is_loopback else settings.host
    return [
        ("processor", f"{machine.processor.name}, {machine.architecture}, {machine.cores} cores, "
                      f"{' '.join(machine.processor.instruction_sets) or 'instruction sets not known'}"),
        ("system", f"{machine.system}, Python {machine.python}"),
        ("memory", f"{_gb(memory.total_bytes)}, {free} free{limit}; budget {_gb(diagnosis.budget_bytes)} ({origin})"),
        ("disk", f"{_gb(disk.free_bytes)} free for {disk.folder}{'' if disk.writable else ', not writable'}"),
        ("runtime", f"{machine.runtime}: {', '.join(providers)}; chosen: {settings.execution_provider}"),
        ("GPUs", ", ".join(machine.gpus) or "none that NVML tells of"),
        ("extras", ", ".join(extras) or "not known: nearfar is not installed"),
        ("network", f"policy {settings.policy}, {'offline' if settings.offline else 'may fetch models'}, "
                    f"listens on {where}; keys set: {', '.join(machine.keys) or 'none'}"),
    ]  # fmt: skip


def speed(candidate: Candidate) -> str:
    """As it was measured on a processor with the same instructions."""
    if candidate.speed is None:
        return "unmeasured"
    return f"{candidate.speed.prompt_tokens_per_s:g} prompt, {candidate.speed.decode_tokens_per_s:g} answer tokens/s"


def _advice(diagnosis: Diagnosis) -> list[str]:
    best = diagnosis.recommended
    if best is None or best.fit is None:
        return []
    toy = ", a toy: nothing else fits or can be had" if best.target.startswith("tiny-scenes@") else ""
    lines = [
        f"recommended: {best.target}{toy}; {best.fit.slots} at once, {best.fit.context:,} positions each, "
        f"{diagnosis.threads} threads, {_gb(best.fit.bytes)} of memory",
    ]
    if best.command:
        lines.append(f"  {best.command}")
    lines.append(f"  nearfar serve --model {best.target}")
    if best.speed is None:
        lines.append(f"  its speed is unmeasured on such a processor: {measure(best)}")
    else:
        lines.append(f"  measured on {best.speed.machine}: {speed(best)}; here: {measure(best)}")
    return lines


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
