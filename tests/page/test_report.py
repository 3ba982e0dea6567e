"""The page of a report in a browser that has no network: what anybody wrote is text, and it reads everywhere."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.hosted.wire_server import DONE, WireServer, chunk, usage
from tests.serving.conftest import picture, running

SCRIPT = '</td><script>document.title = "taken"</script><img src=x onerror="document.title = 1"> & "red" $x^2$'
pytestmark = pytest.mark.browser


@contextmanager
def far_model(text: str) -> Iterator[str]:
    """A hosted model on loopback that answers everything with that text, as an endpoint's setting."""
    server, ready, loop = WireServer(), threading.Event(), asyncio.new_event_loop()
    server.script = [chunk(text), chunk(finish="stop"), usage(30, 5), DONE]
    stop = asyncio.Event()

    async def serve() -> None:
        async with server.listening():
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    try:
        assert ready.wait(10)
        yield f"far=http://127.0.0.1:{server.port}/v1,some-model"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=10)
        loop.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine comparisons of a model here with a far one that answers in HTML, the last asked in HTML too."""
    folder = tmp_path_factory.mktemp("report")
    with (
        far_model(SCRIPT) as endpoint,
        running(models=("tiny-scenes",), endpoints=(endpoint,), data_dir=folder, keep_inputs=True) as service,
    ):
        client = service.ready().client
        for place in range(9):
            fields = {"prompt": "What color is the circle?", "reference": "red"}
            fields |= {"prompt": SCRIPT, "reference": SCRIPT} if place == 8 else {}
            answer = client.post("/compare", files={"image": picture(100 + place, 100)}, data=fields)
            assert answer.status_code == 200, answer.text
        page = client.get("/report")
        assert page.status_code == 200, page.text
    file = folder / "report.html"
    file.write_bytes(page.content)
    return file


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Any]:
    """Opens it in a context without a network. Afterwards: no console error, no dialog, nothing asked for."""
    problems: list[str] = []
    asked: list[str] = []
    with ExitStack() as closing:

        def opened(**options: Any) -> Any:
            context = browser.new_context(offline=True, **options)
            closing.callback(context.close)
            page = context.new_page()
            page.on("console", lambda message: problems.append(message.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("dialog", lambda dialog: problems.append(dialog.message))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(report.as_uri())
            return page

        yield opened
    assert problems == []
    assert {url for url in asked if not url.startswith("data:")} <= {report.as_uri()}


def test_what_users_and_models_wrote_is_shown_and_does_nothing(opened: Any) -> None:
    page = opened()
    assert page.title() == "nearfar report: kept comparisons"
    answers = page.locator(".matrix .answer")
    assert answers.filter(has_text=SCRIPT).count() == 9
    assert page.locator(".prompt").filter(has_text=SCRIPT).count() == 1
    assert page.locator("script, [onerror]").count() == 0
    assert page.locator(".matrix img").count() == 9
    assert page.locator(".matrix img").evaluate_all("all => all.every((one) => one.naturalWidth > 0)")


def test_the_filter_works_without_a_script(opened: Any) -> None:
    page = opened(java_script_enabled=False)
    rows = page.locator(".matrix tbody tr:visible")
    assert rows.count() == 9
    wrong = page.locator(".matrix tbody tr.wrong").count()
    different = page.locator(".matrix tbody tr.different").count()
    page.locator("#show_wrong").check()
    assert rows.count() == wrong
    page.get_by_label(f"different answers ({different})").check()
    assert rows.count() == different > 0
    page.locator("#show_all").check()
    assert rows.count() == 9


def test_dark_light_and_print_have_their_own_ground_and_plots_follow(opened: Any) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = page.locator(".balance text").first.evaluate("text => getComputedStyle(text).fill")
        series = page.locator(".plots .plot use").last.evaluate("mark => getComputedStyle(mark).fill")
        seen[scheme] = (ground, ink, series)
    assert all(light != dark for light, dark in zip(seen["light"], seen["dark"], strict=True))
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".filter").is_visible()
    assert page.locator(".matrix tbody tr").last.bounding_box()["height"] > 0
    assert len(page.pdf()) > 10_000


@pytest.mark.parametrize("width", [360, 820, 1280])
def test_nothing_sticks_out_of_the_window(opened: Any, width: int) -> None:
    page = opened(viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
