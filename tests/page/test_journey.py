"""The whole way through the page against the real service: from a dropped picture to each view that it ends in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from models.tiny_scenes import SAMPLES
from serving.child import child_service
from tests.page.test_page import LOWEST_CONTRAST, choose_sample, sideways_px, wait_for_verdict

pytestmark = [pytest.mark.browser, pytest.mark.enable_socket, pytest.mark.timeout(300)]
OpenPage = Callable[..., Any]
KEY = "nf-a-key-for-this-test-alone-0123456789"
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
VIEWS = {
    "history": ".kept",
    "leaderboard": "#leaderboard_text:not(:empty)",
    "verdict": "#verdict_rows tr",
    "break-even": "#even_plot svg",
    "metrics": "#metrics_rows tr",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service without records from other tests."""
    with child_service(settings={"NEARFAR_DATA_DIR": str(tmp_path_factory.mktemp("data"))}) as address:
        yield address


def drop(page: Any, path: str) -> None:
    """A file from the desktop, dropped by the browser itself: the page gets a trusted event."""
    box = page.locator("#drop").bounding_box()
    at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    dragged = {"items": [], "files": [path], "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **at, "data": dragged})


def go(page: Any, view: str) -> None:
    page.get_by_role("navigation").get_by_role("link", name=view).click()
    expect(page.get_by_role("heading", level=1, name=view)).to_be_focused()


def test_from_a_dropped_picture_to_answers_vote_history_and_decisions(open_page: OpenPage) -> None:
    page = open_page()
    drop(page, str(SAMPLES / "wide.png"))
    page.get_by_alt_text("Chosen picture: wide.png").wait_for()
    page.locator("#question").fill("Describe the image.")
    page.locator("#reference").fill("4 shapes: blue square, pink triangle, orange circle, purple circle")
    page.locator("#question").press("Enter")
    wait_for_verdict(page)
    figure = page.locator("figure.tiles").first
    assert "2 × 1 tiles of 64 × 64 px, row by row, and last the global tile" in figure.inner_text()
    assert figure.locator(".tile_grid b").all_inner_texts() == ["1", "2"]
    assert page.locator(".stayed").all_inner_texts() == ["⌂ Stayed here"] * 2

    link = page.url
    assert "#/compare/cmp_" in link
    page.reload()
    page.get_by_role("heading", name="Kept comparison").wait_for()
    right = page.locator("#record dd").nth(1).inner_text()  # waits until the record is there
    assert page.locator(".answer:visible").all_inner_texts() == [right] * 2
    assert "Drawn on the stored thumbnail" in page.locator("#record figure.tiles").first.inner_text()
    assert page.locator("#record_picture").evaluate("image => image.naturalWidth") == 128

    go(page, "Compare")
    choose_sample(page)
    page.locator("#blind").check()
    page.locator("#ask").click()
    page.get_by_role("button", name="Equally good").click()
    expect(page.locator("[data-slot=vote_text]").first).to_contain_text("Side A was local/tiny-scenes@")

    go(page, "History")
    expect(page.locator(".kept")).to_have_count(2)
    assert page.locator(".kept img.thumbnail").count() == 2
    page.locator("#history_form [name=correct]").select_option("false")
    expect(page.locator("#history_text")).to_have_text("No comparison fits that.")
    assert page.url.endswith("#/history?correct=false")
    page.locator("#history_form [name=correct]").select_option("true")
    expect(page.locator(".kept")).to_have_count(2)
    page.locator(".kept").last.click()
    assert page.url == link
    page.go_back()

    go(page, "Leaderboard")
    expect(page.locator("#leaderboard_rows tr")).to_have_count(2)
    go(page, "Verdict")
    expect(page.locator("#verdict_text")).to_contain_text(re.compile("^Undecided: .* n = 2"))
    page.get_by_role("slider", name="Privacy").press("End")
    expect(page.locator("#verdict_reasons")).to_contain_text("privacy, weight 1:")
    assert re.search(r"#/verdict\?weights=quality.*privacy%3D1", page.url)
    decided, verdict = page.url, page.locator("#verdict_text").inner_text()
    base = page.url.partition("#")[0]
    slider = page.get_by_role("slider", name="Cost")
    slider.evaluate("(it) => { it.value = it.max; it.dispatchEvent(new Event('input')); location.hash = '#/history'; }")
    page.wait_for_timeout(300)  # a slider asks 150 ms after it was moved, unless another view is shown by then
    assert page.url == f"{base}#/history"
    page.route("**/verdict?*", lambda route: route.fulfill(response=route.fetch(url=f"{base}verdict")))
    with page.expect_request("**/verdict?*") as asked:  # a plus that is not escaped would be a space
        page.goto(f"{base}#/verdict?targets=local/a%2Bb,local/c")
    assert asked.value.url.endswith("verdict?targets=local%2Fa%2Bb%2Clocal%2Fc")
    go(page, "Break-even")
    page.locator("#even_plot svg").wait_for()
    go(page, "Metrics")
    expect(page.locator("#metrics_rows tr")).to_have_count(2)
    assert [row.split()[1] for row in page.locator("#metrics_rows tr").all_inner_texts()] == ["2", "2"]

    page.unroute_all()
    page.goto(decided)
    expect(page.locator("#verdict_text")).to_have_text(verdict)
    problems: list[str] = []
    page.context.on("console", lambda message: problems.append(message.text))
    with page.expect_popup() as opening:
        page.get_by_role("button", name="Report").click()
    report = opening.value
    choice, _, text = verdict.partition(": ")
    expect(report.locator("h1")).to_have_text(choice)
    assert report.locator("h1").bounding_box()["y"] < 300, "on top"
    assert report.locator("#verdict .lead").inner_text() == text[0].upper() + text[1:]
    assert "privacy, weight 1:" in report.locator("#verdict").inner_text(), "with the weights of the view"
    assert report.locator(".matrix tbody tr").count() == 2
    assert report.locator(".matrix img").evaluate_all("all => all.every((one) => one.naturalWidth > 0)")
    assert report.locator("svg.plot").count() > 0
    assert problems == []


def test_with_a_key_the_report_is_a_file_and_that_of_nothing_is_a_line_in_the_view(
    browser: Any, tmp_path: Path
) -> None:
    settings = {"NEARFAR_DATA_DIR": str(tmp_path), "NEARFAR_API_KEYS": KEY}
    with child_service(settings=settings) as address, browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{address}/#/history")
        page.locator("#key").fill(KEY)
        page.locator("#use_key").click()
        expect(page.locator("#history_text")).to_contain_text("Nothing is kept yet")
        page.get_by_role("button", name="Report").click()
        expect(page.locator("#history_message")).to_contain_text("there is no comparison to report on")

        go(page, "Compare")
        choose_sample(page)
        page.locator("#ask").click()
        wait_for_verdict(page)
        go(page, "History")
        with page.expect_download() as loading:
            page.get_by_role("button", name="Report").click()
        expect(page.locator("#history_message")).to_be_empty()
        assert loading.value.suggested_filename == "nearfar-report.html"
        assert len(context.pages) == 1
        loading.value.save_as(tmp_path / "report.html")
        problems: list[str] = []
        context.on("console", lambda message: problems.append(message.text))
        page.goto((tmp_path / "report.html").as_uri())
        expect(page.locator(".matrix tbody tr")).to_have_count(1)
        assert problems == []


def test_a_comparison_is_deleted_once_that_was_confirmed(open_page: OpenPage) -> None:
    page = open_page()
    choose_sample(page)
    page.locator("#ask").click()
    wait_for_verdict(page)
    deleted = page.url.partition("#")[2]
    page.reload()
    page.locator("#record_remove").click()
    page.keyboard.press("Escape")
    expect(page.locator("#delete")).not_to_be_visible()
    page.locator("#record_remove").click()
    page.locator("#delete").get_by_role("button", name="Delete").click()
    page.locator(".kept").first.wait_for()
    assert page.locator(f".kept[href='#{deleted}']").count() == 0
    page.locator(".kept_row button").first.click()
    left = page.locator(".kept").count()
    page.locator("#delete").get_by_role("button", name="Delete").click()
    expect(page.locator(".kept")).to_have_count(left - 1)


def test_letters_go_to_views_and_a_dialog_lists_them(open_page: OpenPage) -> None:
    page = open_page()
    page.keyboard.press("/")
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("gh?")
    assert page.locator("#question").input_value() == "gh?", "in a field they are letters"
    page.keyboard.press("Tab")
    page.locator("h1:visible").focus()
    page.keyboard.press("?")
    assert "g" in page.locator("#shortcuts").inner_text()
    page.keyboard.press("Escape")
    expect(page.locator("#shortcuts")).not_to_be_visible()
    page.keyboard.type("gb")
    expect(page.get_by_role("heading", name="Break-even")).to_be_focused()
    assert page.title() == "Break-even · nearfar"
    page.keyboard.press("?")
    page.locator("#shortcuts_on").uncheck()
    page.keyboard.press("Escape")
    page.keyboard.type("gm")
    assert page.url.endswith("#/break-even")


def test_every_view_fits_a_phone_and_is_legible_in_light_and_dark(open_page: OpenPage) -> None:
    page = open_page(**PHONE)
    choose_sample(page, 5)
    page.locator("#ask").click()
    wait_for_verdict(page)
    for view, there in VIEWS.items():
        page.evaluate("view => { location.hash = `#/${view}`; }", view)
        page.locator(there).first.wait_for()
        assert sideways_px(page) <= 0, view
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            ratio, text = page.evaluate(LOWEST_CONTRAST)
            assert ratio >= 4.5, f"{view}, {scheme}: {text}"


def test_metrics_are_read_only_while_they_are_looked_at(open_page: OpenPage) -> None:
    page = open_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/metrics") else None)
    page.clock.install()
    go(page, "Metrics")
    page.locator("#metrics_tiles .stat").first.wait_for()
    with page.expect_response("**/metrics"):
        page.clock.run_for(2000)
    go(page, "History")
    before = len(asked)
    page.clock.run_for(10_000)
    assert len(asked) == before >= 2


def test_the_grid_is_what_the_report_tells_and_nothing_is_drawn_where_it_does_not(open_page: OpenPage) -> None:
    page = open_page()
    reports: list[tuple[dict[str, Any], Any]] = [
        ({"used_width": 64, "used_height": 64, "tiles": 1}, {"rows": 0, "cols": 0, "tile_px": 64}),
        ({"used_width": 2048, "used_height": 1536, "tiles": 13}, {"rows": 3, "cols": 4, "tile_px": 512}),
        ({"used_width": 512, "used_height": 1024, "tiles": 3}, {"rows": 2, "cols": 1, "tile_px": 512}),
        ({"used_width": 320, "used_height": 200, "tiles": None}, None),
        ({"used_width": 300, "used_height": 200, "tiles": 3}, None),
    ]
    read = "async (reports) => { const { gridOf } = await import('/page/tiles.js'); return reports.map(gridOf); }"
    assert page.evaluate(read, [report for report, _ in reports]) == [grid for _, grid in reports]
    whole = {"width": 640, "height": 480}
    fits = """async ([report, size, reduced]) =>
        (await import('/page/tiles.js')).fits(report, size, reduced)"""
    assert page.evaluate(fits, [whole, whole, False])
    assert page.evaluate(fits, [whole, {"width": 128, "height": 96}, True])
    assert not page.evaluate(fits, [whole, {"width": 480, "height": 640}, False])
    assert not page.evaluate(fits, [{**whole, "reduced": True}, whole, False])
    assert not page.evaluate(fits, [{**whole, "timestamp_s": 0.5}, whole, False])


def test_quantiles_are_read_from_prometheus_text(open_page: OpenPage) -> None:
    page = open_page()
    lines = [f't_bucket{{le="{bound}",target="a\\"b"}} {count}' for bound, count in ((1, 10), (2, 20), ("+Inf", 20))]
    read = """async (text) => {
      const { histogram, parse, quantile, sum } = await import('/page/prometheus.js');
      const samples = parse(text);
      const found = histogram(samples, 't', { target: 'a"b' });
      return [found.n, quantile(found, 0.5), quantile(found, 0.95), sum(samples, 'c'), sum(samples, 'absent'),
        quantile(histogram(samples, 't', { target: 'none' }), 0.5), quantile({ n: 5, buckets: [[1, 5]] }, 0.95),
        quantile(histogram(samples, 't', {}, samples), 0.5)];
    }"""
    text = "\n".join(["# HELP c of nothing", 'c{x="1"} 2', "c 3.5", *lines])
    assert page.evaluate(read, text) == [20, 1, 1.9, 5.5, None, None, None, None]
