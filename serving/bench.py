"""`nearfar bench`: how fast this machine answers, over HTTP, as a client sees it.

A closed loop: each client sends its next request when its last answer is whole. Every client count runs against the
same service, one after the other, so that ratios between them are of one run.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from models.errors import Unavailable
from serving.child import child_service, post
from serving.demo import first_sample

WARM_UP_REQUESTS = 5


@dataclass(frozen=True, kw_only=True)
class Load:
    """One client count. Latencies in milliseconds from send to whole answer; `p95_ms` is None under 20 requests."""

    clients: int
    requests: int
    errors: int
    requests_per_second: float
    p50_ms: float
    p95_ms: float | None


def percentile(ordered: list[float], share: float) -> float:
    """Nearest rank of sorted values: the smallest that at least that share does not exceed."""
    return ordered[max(0, -(-int(share * 100) * len(ordered) // 100) - 1)]


def run_load(url: str, body: dict[str, Any], *, clients: int, requests: int, progress: Progress) -> Load:
    """Share `requests` among `clients` threads and time each."""
    task = progress.add_task(f"{clients} client{'s' if clients > 1 else ''}", total=requests)
    left = iter(range(requests))
    lock = threading.Lock()
    latencies: list[float] = []
    errors: list[str] = []

    def client() -> None:
        while True:
            with lock:
                if next(left, None) is None:
                    return
            begun = time.perf_counter()
            try:
                post(url, body)
                taken = (time.perf_counter() - begun) * 1000
                with lock:
                    latencies.append(taken)
            except Exception as error:
                with lock:
                    errors.append(str(error))
            progress.advance(task)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - begun
    ordered = sorted(latencies)
    if not ordered:
        raise Unavailable(f"every request failed: {errors[0]}")
    return Load(
        clients=clients,
        requests=requests,
        errors=len(errors),
        requests_per_second=round(len(ordered) / elapsed, 1),
        p50_ms=round(percentile(ordered, 0.5), 2),
        p95_ms=round(percentile(ordered, 0.95), 2) if len(ordered) >= 20 else None,
    )


def run_bench(*, clients: list[int], requests: int, model: str | None, console: Console) -> dict[str, Any]:
    """Serve, warm up, load; the figures with the machine named."""
    sample, body = first_sample()
    begun = time.perf_counter()
    with child_service(*(("--model", model) if model else ())) as near:
        ready_s = time.perf_counter() - begun
        for _ in range(WARM_UP_REQUESTS):
            answer = post(f"{near}/infer", body)
        with Progress(console=console, transient=True) as progress:
            loads = [
                run_load(f"{near}/infer", body, clients=count, requests=requests, progress=progress)
                for count in clients
            ]
        answer = post(f"{near}/infer", body)
    return {
        "machine": machine(),
        "target": answer["target"],
        "question": f"{sample['file']}: {sample['question']}",
        "start_to_ready_s": round(ready_s, 2),
        "process_peak_bytes": answer["memory"]["process_peak_bytes"],
        "loads": [asdict(load) for load in loads],
    }


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in facts.items()}
    flags = named.get("flags", "").split()
    return {
        "processor": named.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "instruction_sets": [name for name in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if name in flags],
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def bench_table(result: dict[str, Any], console: Console) -> None:
    """The same figures for people, with each formula beside its name."""
    facts = result["machine"]
    sets = ", ".join(facts["instruction_sets"]) or "none of interest"
    console.print(f"{facts['processor']}, {facts['cores']} cores ({sets}), {facts['system']}", markup=False)
    console.print(f"{result['target']}  {result['question']}", markup=False)
    table = Table(header_style="bold")
    for heading in ("clients", "n", "errors", "requests/s (answers / elapsed)", "p50 ms", "p95 ms (nearest rank)"):
        table.add_column(heading, justify="right")
    for load in result["loads"]:
        p95 = "-" if load["p95_ms"] is None else str(load["p95_ms"])
        cells = (load["clients"], load["requests"], load["errors"], load["requests_per_second"], load["p50_ms"], p95)
        table.add_row(*map(str, cells))
    console.print(table)
    peak = result["process_peak_bytes"] / 1e6
    console.print(f"start to ready {result['start_to_ready_s']} s, peak of the process {peak:.0f} MB")
