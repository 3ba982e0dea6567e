"""The break-even on the page: sliders, plot and table are one answer of the service."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.page.test_page import choose_sample, wait_for_verdict

pytestmark = [pytest.mark.browser, pytest.mark.enable_socket, pytest.mark.timeout(300)]
OpenPage = Callable[..., Any]
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def opened(open_page: OpenPage, **options: Any) -> Any:
    page = open_page(**options)
    page.get_by_role("link", name="Break-even").click()
    page.locator("#even_plot svg").wait_for()
    return page


def row(page: Any, target: str) -> Any:
    return page.locator("#even_rows tr").filter(has=page.get_by_text(target, exact=True))


def figure(page: Any, target: str) -> float:
    text = row(page, target).locator("td").nth(1).inner_text().split("\n")[0]
    return float(text.removeprefix("$").replace(",", ""))


def test_a_moved_slider_changes_table_plot_and_the_list_of_inputs(open_page: OpenPage) -> None:
    page = opened(open_page)
    assert page.locator("#even_heading").inner_text() == "At 10,000 images a month"
    before, drawn = figure(page, "local"), page.locator("#even_plot .own").get_attribute("d")
    page.locator("input[name=local_operations_hours]").focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    expect(row(page, "local").locator("td").nth(1)).not_to_contain_text(f"${before:.2f}")
    assert figure(page, "local") > before
    assert page.locator("#even_plot .own").get_attribute("d") != drawn
    page.get_by_text("Everything that it rests on").click()
    given = page.locator("#even_inputs tr.given")
    assert given.count() == 1
    assert given.inner_text().startswith("local_operations_hours")
    assert "as you say" in given.inner_text()


def test_each_line_has_a_row_of_its_own_and_differs_by_more_than_colour(open_page: OpenPage) -> None:
    page = opened(open_page)
    lines, rows = page.locator("#even_plot path"), page.locator("#even_rows tr")
    assert lines.count() == rows.count()
    ways = [f"{line.get_attribute('stroke-dasharray')} {'own' in line.get_attribute('class')}" for line in lines.all()]
    assert len(set(ways)) == len(ways)
    assert rows.first.inner_text().startswith("local")
    assert rows.last.inner_text().startswith("reviews")


def test_batch_prices_are_a_choice(open_page: OpenPage) -> None:
    page = opened(open_page)
    at_once = page.locator("#even_rows th span").all_inner_texts()
    assert not any("(batch)" in name for name in at_once)
    page.locator("#even_mode").select_option("batch")
    in_a_batch = page.locator("#even_rows th span").all_inner_texts()
    assert len(in_a_batch) > 2
    assert all("(batch)" in name for name in in_a_batch[1:-1])


def test_what_was_measured_here_takes_the_place_of_the_assumed_machine(open_page: OpenPage) -> None:
    page = open_page()
    choose_sample(page)
    page.locator("#ask").click()
    wait_for_verdict(page)
    page.get_by_role("link", name="Break-even").click()
    row(page, "local").wait_for()
    page.locator("#even_measured").check()
    row(page, "local/tiny-scenes@int8").wait_for()
    assert row(page, "local").count() == 0
    assert "measured: n " in row(page, "local/tiny-scenes@fp32").inner_text()
    dashes = [line.get_attribute("stroke-dasharray") for line in page.locator("#even_plot .own").all()]
    assert len(set(dashes)) == 2


def test_it_fits_a_phone_and_a_slider_tells_its_value(open_page: OpenPage) -> None:
    page = opened(open_page, **PHONE)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    volume = page.get_by_role("slider", name=re.compile("Images a month"))
    assert volume.get_attribute("aria-valuetext") == "10,000"
