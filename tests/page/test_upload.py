"""Before the first upload to a destination the page says what goes there. Here nothing does: the proxy is not there."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import expect

from models.tiny_scenes import SAMPLES
from serving.chain_check import entries_of
from serving.child import child_service, get
from serving.ledger import FOLDER

pytestmark = [pytest.mark.browser, pytest.mark.enable_socket, pytest.mark.timeout(300)]

OpenPage = Callable[..., Any]
NOWHERE = "http://127.0.0.1:9"
PRICED, UNPRICED = "openai/gpt-4.1-mini", "box/m"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def service(data_dir: Path) -> Iterator[str]:
    settings = {
        "NEARFAR_DATA_DIR": str(data_dir),
        "NEARFAR_ENDPOINTS": "box=http://192.0.2.1:8080/v1,m",
        "NEARFAR_ROUTES": '{"mixed": ["box/m", "local/tiny-scenes"]}',
        "OPENAI_API_KEY": "sk-of-nobody-0123456789",
        "HTTP_PROXY": NOWHERE,
        "HTTPS_PROXY": NOWHERE,
    }
    with child_service("--policy", "any", settings=settings) as address:
        yield address


def choose(page: Any, *targets: str) -> None:
    for box in page.locator("#targets input").all():
        box.set_checked(box.get_attribute("value") in targets)


def ask(page: Any) -> None:
    page.locator("#question").press("Enter")


def test_the_first_upload_to_each_destination_is_shown_and_confirmed(
    open_page: OpenPage, service: str, data_dir: Path
) -> None:
    page = open_page(viewport={"width": 1100, "height": 800})
    compared: list[str] = []
    page.on("request", lambda request: compared.append(request.url) if request.url.endswith("/compare") else None)
    page.locator(".sample").first.click()
    page.locator("#preview").wait_for()
    choose(page, "local/tiny-scenes@int8", PRICED)
    dialog = page.locator("#upload")

    ask(page)
    expect(dialog).to_be_visible()
    text = dialog.inner_text()
    assert f"{PRICED}, at api.openai.com:443" in text
    shown = re.search(r"About ([\d.]+) kB: your question and picture", text)
    assert shown
    assert re.search(r"At most \$0\.0\d+, estimated", text)
    page.keyboard.press("Escape")
    expect(page.get_by_role("alert")).to_have_text("Nothing was sent.")
    ask(page)
    dialog.get_by_role("button", name="Do not send").click()
    expect(page.get_by_role("alert")).to_have_text("Nothing was sent.")
    assert compared == []
    assert json.loads(get(f"{service}/egress"))["entries"] == 0

    ask(page)
    dialog.get_by_role("button", name="Send", exact=True).click()
    page.locator(".verdict:visible").wait_for()
    departures = [entry for entry in entries_of(data_dir / FOLDER) if entry["event"] == "departure"]
    assert departures
    assert all(0 < entry["bytes"] <= float(shown[1]) * 1000 + 50 for entry in departures)

    ask(page)
    expect(page.locator("#status")).to_have_text("Done.")
    assert not dialog.is_visible()
    choose(page, PRICED, UNPRICED)
    ask(page)
    expect(dialog).to_be_visible()
    assert dialog.locator("li").count() == 1
    assert "192.0.2.1:8080" in dialog.inner_text()
    assert "The price is not known." in dialog.inner_text()
    dialog.get_by_role("button", name="Do not send").click()
    assert len(compared) == 2


def test_what_stays_on_the_device_is_not_asked_about_and_costs_no_estimate(open_page: OpenPage) -> None:
    page = open_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.locator(".sample").first.click()
    page.locator("#preview").wait_for()
    choose(page, "local/tiny-scenes@int8")
    ask(page)
    page.locator(".verdict:visible").wait_for()
    assert not [url for url in asked if url.endswith("/estimate")]
    assert not page.locator("#upload").is_visible()


def test_a_route_that_may_not_leave_here_is_asked_without_a_word(open_page: OpenPage) -> None:
    page = open_page(extra_http_headers={"x-nearfar-policy": "local-only"})  # as a key with a policy of its own has it
    page.locator(".sample").first.click()
    page.locator("#preview").wait_for()
    choose(page, "mixed")
    ask(page)
    page.locator(".verdict:visible").wait_for()
    assert not page.locator("#upload").is_visible()


def test_of_a_webp_it_says_that_its_bytes_are_not_known(open_page: OpenPage) -> None:
    page = open_page()
    with Image.open(SAMPLES / "red-circle.png") as sample:
        sample.save(webp := io.BytesIO(), "WEBP")
    page.locator("#file").set_input_files({"name": "a.webp", "mimeType": "image/webp", "buffer": webp.getvalue()})
    page.locator("#question").fill("What color is the circle?")
    choose(page, PRICED)
    ask(page)
    expect(page.locator("#upload")).to_be_visible()
    assert "leaves as PNG, with more bytes" in page.locator("#upload").inner_text()
    page.get_by_role("button", name="Do not send").click()


def test_of_a_video_it_says_what_is_not_known(open_page: OpenPage) -> None:
    page = open_page()
    page.locator("#file").set_input_files(Path(__file__).parents[1] / "models" / "golden" / "short.mp4")
    page.locator("#question").fill("What color is the circle?")
    choose(page, PRICED)
    ask(page)
    expect(page.locator("#upload")).to_be_visible()
    assert "frames or pages of your file come on top" in page.locator("#upload").inner_text()
    page.get_by_role("button", name="Do not send").click()


def test_the_estimate_hands_over_sizes_and_no_picture(open_page: OpenPage) -> None:
    page = open_page()
    page.locator(".sample").first.click()
    page.locator("#preview").wait_for()
    choose(page, PRICED)
    with page.expect_request("**/estimate") as asked:
        ask(page)
    size = (SAMPLES / "red-circle.png").stat().st_size
    assert json.loads(asked.value.post_data)["pictures"] == [{"width": 160, "height": 160, "bytes": size}]
    page.get_by_role("button", name="Do not send").click()
