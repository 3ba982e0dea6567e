"""A blind comparison on the page: two nameless sides, the vote, who they were, and the leaderboard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.page.test_page import LOWEST_CONTRAST, choose_sample, wait_for_verdict

pytestmark = [pytest.mark.browser, pytest.mark.enable_socket, pytest.mark.timeout(300)]
OpenPage = Callable[..., Any]
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def blind(open_page: OpenPage, **options: Any) -> Any:
    """A page on which a blind comparison has been answered."""
    page = open_page(**options)
    choose_sample(page)
    page.locator("#blind").check()
    page.locator("#ask").click()
    page.locator(".vote:visible").wait_for()
    return page


def test_names_and_figures_come_with_the_vote(open_page: OpenPage) -> None:
    page = blind(open_page)
    shown = page.locator("#live").inner_text()
    assert "Side A" in shown
    assert "Side B" in shown
    assert "tiny-scenes" not in shown
    assert " ms" not in shown
    assert not page.locator(".verdict").first.is_visible()
    page.get_by_role("button", name="B is better").focus()
    page.keyboard.press("Enter")
    wait_for_verdict(page)
    assert (
        "Your vote is kept. Side A was local/tiny-scenes@" in page.locator("[data-slot=vote_text]").first.inner_text()
    )
    assert {card.get_attribute("aria-label") for card in page.locator(".card").all()} == {
        "local/tiny-scenes@int8",
        "local/tiny-scenes@fp32",
    }
    assert page.locator(".card [data-slot=headline]").first.is_visible()
    assert not page.locator("[data-slot=vote_buttons]").first.is_visible()
    assert page.evaluate(LOWEST_CONTRAST)[0] >= 4.5


def test_the_leaderboard_has_the_vote_and_its_share_with_n(open_page: OpenPage) -> None:
    page = blind(open_page)
    page.get_by_role("link", name="Leaderboard").click()
    page.locator("#leaderboard_text").filter(has_text="vote").wait_for()
    before = page.locator("#leaderboard_text").inner_text()
    page.go_back()
    page.get_by_role("button", name="Equally good").click()
    page.locator("[data-slot=vote_text]", has_text="Your vote is kept").wait_for()
    page.get_by_role("link", name="Leaderboard").click()
    expect(page.locator("#leaderboard_text")).not_to_have_text(before)
    rows = page.locator("#leaderboard_rows tr")
    assert rows.count() == 2
    for row in rows.all():
        assert " %, n " in row.inner_text()
        assert "tied" in row.inner_text()
    assert page.evaluate(LOWEST_CONTRAST)[0] >= 4.5


def test_one_target_alone_is_refused_before_it_is_sent(open_page: OpenPage) -> None:
    page = open_page()
    choose_sample(page)
    page.locator("#blind").check()
    page.locator("#targets input").first.uncheck()
    page.locator("#ask").click()
    expect(page.locator("#message")).to_have_text("Choose at least two targets to compare blind.")


def test_voting_fits_a_phone(open_page: OpenPage) -> None:
    page = blind(open_page, **PHONE)
    page.get_by_role("button", name="Both bad").click()
    wait_for_verdict(page)
    page.get_by_role("link", name="Leaderboard").click()
    page.locator("#leaderboard_rows tr").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
