"""`nearfar demo`: the whole path on a fresh machine. Two services on loopback, one question, both answers.

The near side is this machine's int8 model. The far side stands in for a hosted one: a second nearfar process that
serves the fp32 bundle through `/v1/chat/completions`, over real HTTP, and is labelled as what it is.
"""

from __future__ import annotations

import base64
import json
import signal
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from models.tiny_scenes import BUNDLES, SAMPLES
from serving.child import child_service, post
from serving.tables.comparisons import comparison_table, results_table


def first_sample() -> tuple[dict[str, str], dict[str, Any]]:
    """The first bundled picture's row, and the body that asks about it."""
    sample: dict[str, str] = json.loads((SAMPLES / "samples.json").read_text())[0]
    picture = base64.b64encode((SAMPLES / sample["file"]).read_bytes()).decode()
    return sample, {"prompt": sample["question"], "images": [f"data:image/png;base64,{picture}"]}


def run_demo(*, keep: bool, port: int, console: Console) -> None:
    """Start both services, ask, print, stop them; with `keep`, go on serving until interrupted."""
    sample, body = first_sample()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with ExitStack() as stack:
        with Progress(*columns, console=console) as progress:
            step = progress.add_task("starting the far side: a second nearfar on loopback, fp32", total=None)
            far = stack.enter_context(child_service("--model", str(BUNDLES["tiny-scenes@fp32"])))
            progress.update(step, description="starting the near side: int8, on this machine")
            options = ("--model", str(BUNDLES["tiny-scenes@int8"]), "--endpoint", f"far={far}/v1,tiny-scenes@fp32")
            near = stack.enter_context(child_service(*options, port=port))
            progress.update(step, description="asking /infer")
            answer = post(f"{near}/infer", body)
            progress.update(step, description="asking /compare")
            targets = ["local/tiny-scenes@int8", "far/tiny-scenes@fp32"]
            compared = post(f"{near}/compare", {**body, "targets": targets, "reference": sample["answer"]})
            progress.update(step, description="done")
        console.print(f"\n[bold]POST /infer[/bold]  {sample['file']}: {sample['question']}")
        results_table([answer], console)
        console.print(f"\n[bold]POST /compare[/bold]  right answer: {sample['answer']}")
        comparison_table(compared, console)
        console.print("tiny-scenes is a toy: it knows drawn shapes and numbers, and nothing of photographs.")
        if keep:
            console.print(f"\nserving on {near} until Ctrl-C")
            signal.pause()  # both signals end it by an exception, and the services with it
