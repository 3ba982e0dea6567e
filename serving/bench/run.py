"""`nearfar bench`: how fast this machine answers, over HTTP, as a client sees it.

Every system runs in the same run on the same machine, one after the other, so that ratios between them mean something.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from models.bundle import Bundle
from models.machine import machine
from models.memory import need_of, total_bytes
from serving.bench.engine import BundleContestant, Contestant, Scale, row_in_words, run_scales
from serving.bench.load import Limits, Load, run_load, text_question
from serving.bench.request import PICTURE_PROMPT, noise_url, overhead, picture_first_token
from serving.child import child_service, post
from serving.demo import first_sample

WARM_UP_REQUESTS = 2
NEW_TOKENS = 64


def run_bench(
    *,
    clients: Sequence[int],
    requests: int,
    slots: int,
    limits: Limits,
    folder: Path,
    others: Sequence[Contestant],
    scales: Sequence[Scale],
    rounds: int,
    picture_px: int | None,
    console: Console,
) -> dict[str, Any]:
    """The bundle alone beside `others`, then one request by its stages, then services under load; machine named.

    The request asks the embedded model's first sample, or about a noise picture of `picture_px` a side at detail=high;
    then each service is asked about such pictures, for its first token, and under load about text.
    `process_peak_bytes` is the service's, to be at most `counted_bytes`: what the memory budget counts for it.
    """
    ours = BundleContestant(folder)
    sample, body = first_sample()
    asked = f"{sample['file']}: {sample['question']}"
    if picture_px:
        body = {"prompt": PICTURE_PROMPT, "images": [noise_url(picture_px, 0)], "detail": "high", "max_tokens": 16}
        asked = f"noise, {picture_px} px square, detail=high, at most 16 tokens: {body['prompt']}"
    with Progress(console=console, transient=True) as progress:
        rows = run_scales([ours, *others], scales, rounds=rounds, progress=progress) if scales else []
        begun = time.perf_counter()
        with child_service("--model", str(folder)) as near:
            ready_s = time.perf_counter() - begun
            answers = [post(f"{near}/infer", body) for _ in range(WARM_UP_REQUESTS + 1)]
            beside = overhead(near)
        services = [
            each
            for contestant in (ours, *others)
            if (each := measured_service(contestant, clients, requests, slots, limits, picture_px, progress))
        ]
    first = answers[0]
    return {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("nearfar", "onnxruntime", "numpy")},
        "target": first["target"],
        "question": asked,
        "engine": rows,
        "stages": first["timings"],
        "overhead": beside,
        "first_token": [service.first_token for service in services if service.first_token],
        "tiles": sum(image["tiles"] for image in first["images"]),
        "prompt_tokens": first["usage"]["prompt_tokens"],
        "start_to_ready_s": round(ready_s, 2),
        "process_peak_bytes": answers[-1]["memory"]["process_peak_bytes"],
        "counted_bytes": counted_bytes(folder),
        "slots": slots,
        "limits": asdict(limits),
        "loads": [asdict(load) for service in services for load in service.loads],
        "pareto": Bundle.load(folder).manifest.quality.get("pareto", []),
    }


class MeasuredService(NamedTuple):
    """What clients saw of one service."""

    first_token: dict[str, Any] | None
    loads: list[Load]


def measured_service(
    contestant: Contestant,
    clients: Sequence[int],
    requests: int,
    slots: int,
    limits: Limits,
    picture_px: int | None,
    progress: Progress,
) -> MeasuredService | None:
    """Start its service, ask it about a picture and put it under load; None where it has none, or nothing is asked."""
    running = contestant.service(slots) if clients or picture_px else None
    if running is None:
        return None
    with running as url:
        first_token = picture_first_token(contestant.name, url, picture_px) if picture_px else None
        loads = [
            run_load(
                contestant.name, url, text_question(NEW_TOKENS), clients=count, requests=requests, limits=limits,
                progress=progress,
            )
            for count in clients
        ]  # fmt: skip
    return MeasuredService(first_token, loads)


def counted_bytes(folder: Path) -> int:
    """What the memory budget counts for a service with that one model and one request at a time, over its context."""
    wanted = need_of(Bundle.read(folder))
    return total_bytes([wanted], 1, wanted.max_positions)


def bench_table(result: dict[str, Any], console: Console) -> None:
    """The same figures for people, with each formula beside its name."""
    facts = result["machine"]
    sets = ", ".join(facts["instruction_sets"]) or "none of interest"
    console.print(f"{facts['processor']}, {facts['cores']} cores ({sets}), {facts['system']}", markup=False)
    console.print(f"{result['target']}  {result['question']}", markup=False)
    for row in result["engine"]:
        console.print(row_in_words(row), markup=False, soft_wrap=True)
    if result["loads"]:
        console.print(load_table(result))
    for row in result["first_token"]:
        console.print(first_token_in_words(row, result["first_token"][0]["new_ms"]), markup=False, soft_wrap=True)
    beside = result["overhead"]
    console.print(
        f"beside the sessions: {beside['request_ms']:g} ms a request, {beside['decode_share']:.1%} of decoding",
        markup=False,
    )
    stages = {name: value for name, value in result["stages"].items() if value is not None}
    console.print("one request: " + ", ".join(f"{name} {value:g}" for name, value in stages.items()), markup=False)
    peak, counted = result["process_peak_bytes"] / 1e6, result["counted_bytes"] / 1e6
    ready = f"start to ready {result['start_to_ready_s']} s"
    console.print(f"{ready}, peak of the process {peak:.0f} MB, at most {counted:.0f} are counted for it")


def first_token_in_words(row: dict[str, Any], new_ms: float) -> str:
    """One line: each time beside the time of a new picture, and that beside `new_ms`."""
    parts = [f"{row['new_ms']:g} ms ({row['new_ms'] / new_ms:.2f}x)"]
    for name, what in (("again_ms", "again"), ("behind_text_ms", "behind other text"), ("text_ms", "text as long")):
        parts.append(f"{what} {row[name]:g} ms ({row[name] / row['new_ms']:.1%})")
    return f"first token over HTTP, {row['system']}: new picture " + ", ".join(parts)


def load_table(result: dict[str, Any]) -> Table:
    """The loads, with each formula beside its name."""
    limits = result["limits"]
    good = f"good/s (TTFT <= {limits['ttft_ms']:g} ms, mean gap <= {limits['gap_ms']:g} ms)"
    table = Table(header_style="bold", title=f"other text each time, {NEW_TOKENS} tokens each, {result['slots']} slots")
    for heading in ("system", "clients", "n", "errors", "requests/s", "tokens/s", good):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for heading in ("TTFT ms", "gap ms", "whole ms"):
        table.add_column(f"{heading} p50/p95/p99 (median, nearest rank)", justify="right")
    for load in result["loads"]:
        rates = (load["clients"], load["requests"], load["errors"], load["requests_per_second"])
        spread = ["/".join("-" if each is None else f"{each:g}" for each in load[name].values())
                  for name in ("ttft_ms", "gap_ms", "total_ms")]  # fmt: skip
        table.add_row(load["system"], *map(str, (*rates, load["tokens_per_second"], load["goodput"])), *spread)
    return table
