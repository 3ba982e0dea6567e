"""`python -m tests.page.gallery OUT`: pictures of each view of the page, of a real service with real answers.

A second service on loopback stands in for a hosted model, as in `nearfar demo`. OUT gets a few small PNGs, those of
`serving/page/gallery/`; with `--all` every view on a wide screen and a phone, light and dark, whole and unshrunk.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter

from models.tiny_scenes import BUNDLES, SAMPLES
from serving.child import child_service, post
from tests.page.conftest import BROWSER_ARGS

SCREENS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 860}},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}
SCHEMES = ("light", "dark")
KEPT = {
    ("compare", "desktop", "light"),
    ("compare", "phone", "dark"),
    ("history", "desktop", "light"),
    ("verdict", "desktop", "dark"),
    ("break-even", "desktop", "light"),
    ("metrics", "desktop", "dark"),
}
COLOURS = 256  # of a kept picture, by octree, which loses no hue: flat areas and text, which a palette keeps well


@contextmanager
def services() -> Iterator[str]:
    """The address of a service with two models of its own and one on another, with records of its own."""
    with ExitStack() as stack:
        data = stack.enter_context(tempfile.TemporaryDirectory())
        far = stack.enter_context(child_service("--model", str(BUNDLES["tiny-scenes@fp32"])))
        endpoint = f"far={far}/v1,tiny-scenes@fp32"
        yield stack.enter_context(
            child_service("--endpoint", endpoint, "--keep-inputs", settings={"NEARFAR_DATA_DIR": data})
        )


def fill(address: str) -> None:
    """Comparisons and blind votes, on pictures of which some are hard: there is something to list and to decide on."""
    samples = json.loads((SAMPLES / "samples.json").read_text())
    for turn, sample in itertools.product(range(4), samples):
        body = {"prompt": sample["question"], "images": [f"data:image/png;base64,{worsened(sample['file'], turn)}"]}
        post(f"{address}/compare", {**body, "reference": sample["answer"]})
        made = post(f"{address}/compare", {**body, "blind": True})
        right = [result.get("text") == sample["answer"] for result in made["results"]]
        winner = {(True, False): "a", (False, True): "b", (True, True): "tie"}.get(tuple(right), "both_bad")
        post(f"{address}/compare/{made['id']}/vote", {"winner": winner, "voter": "gallery"})


def worsened(file: str, turn: int) -> str:
    """A sample, turned and blurred the more the later, as base64."""
    written = io.BytesIO()
    with Image.open(SAMPLES / file) as image:
        ground = image.convert("RGB").getpixel((1, 1))
        turned = image.convert("RGB").rotate(9 * turn, fillcolor=ground)
    turned.filter(ImageFilter.GaussianBlur(2.5 * turn)).save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def compared(page: Any) -> None:
    """The last sample, which is cut into tiles, asked about."""
    page.goto(f"{page.url.partition('#')[0]}#/compare")
    page.reload()
    page.locator(".sample").last.click()
    page.locator("#preview").wait_for()
    page.locator("#detail").select_option("high")
    page.locator("#ask").click()
    page.locator(".verdict:visible").wait_for()
    page.locator(".card .tiles").first.wait_for()


def blind(page: Any) -> None:
    """Two sides before the vote."""
    page.goto(f"{page.url.partition('#')[0]}#/compare")
    page.reload()
    page.locator(".sample").nth(1).click()
    page.locator("#preview").wait_for()
    page.locator("#blind").check()
    page.locator("#ask").click()
    page.locator(".vote:visible").wait_for()


def kept(page: Any) -> None:
    """One of the list, opened."""
    page.goto(f"{page.url.partition('#')[0]}#/history")
    page.locator(".kept").nth(3).click()
    page.locator("#record .verdict:visible, #record .vote:visible").first.wait_for()


def view(name: str, there: str) -> Callable[[Any], None]:
    """A view by its address, once that part of it is there."""

    def show(page: Any) -> None:
        page.goto(f"{page.url.partition('#')[0]}#/{name}")
        page.locator(there).first.wait_for()

    return show


def working(page: Any) -> None:
    """The metrics while the service answers: a few looks, so that there is a curve."""
    address = page.url.partition("#")[0]
    view("metrics", "#metrics_rows tr")(page)
    sample = json.loads((SAMPLES / "samples.json").read_text())[-1]
    image = base64.b64encode((SAMPLES / sample["file"]).read_bytes()).decode()
    body = {"prompt": sample["question"], "images": [f"data:image/png;base64,{image}"]}
    for pause_ms in (700, 200, 1200, 400, 100, 900, 1500, 300, 2000, 600, 200, 1100):
        post(f"{address}compare", body)
        page.wait_for_timeout(pause_ms)


VIEWS: dict[str, Callable[[Any], None]] = {
    "compare": compared,
    "blind": blind,
    "kept": kept,
    "history": view("history", ".kept"),
    "leaderboard": view("leaderboard", "#leaderboard_rows tr"),
    "verdict": view("verdict", "#verdict_rows tr"),
    "break-even": view("break-even", "#even_plot svg"),
    "metrics": working,
}


def main() -> None:
    """Take them."""
    from playwright.sync_api import sync_playwright

    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--all", action="store_true", dest="everything")
    arguments.add_argument("--only", help="views, comma-separated")
    arguments.add_argument("--at", help="address of a service that runs, instead of one of its own")
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    only = options.only.split(",") if options.only else VIEWS
    with ExitStack() as stack:
        address = options.at or stack.enter_context(services())
        if not options.at:
            fill(address)
        driver = stack.enter_context(sync_playwright())
        executable = shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=executable, args=BROWSER_ARGS)
        for screen, scheme in itertools.product(SCREENS, SCHEMES):
            context = browser.new_context(color_scheme=scheme, reduced_motion="reduce", **SCREENS[screen])
            page = context.new_page()
            page.goto(address)
            page.locator(".sample img").first.wait_for()
            for name in only:
                if options.everything or (name, screen, scheme) in KEPT:
                    VIEWS[name](page)
                    take(page, options.out / f"{name}-{screen}-{scheme}.png", small=not options.everything)
            context.close()
        browser.close()


def take(page: Any, path: Path, *, small: bool) -> None:
    """A picture of the whole view; `small`, with few colours, and no longer than two screens."""
    page.mouse.move(0, 0)
    page.screenshot(path=path, full_page=True)
    if small:
        with Image.open(path) as image:
            height = min(image.height, 2 * page.viewport_size["height"])
            image.crop((0, 0, image.width, height)).convert("RGB").quantize(COLOURS, Image.Quantize.FASTOCTREE).save(
                path, optimize=True
            )
    print(f"{path}: {os.path.getsize(path) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
