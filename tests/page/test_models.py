"""The page's list of models: one is fetched from a hub on loopback, and becomes a target without a reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.catalog import ROWS
from serving.child import child_service
from tests.serving.hub import published_files, running_hub

NAME = "smolvlm2-500m"

pytestmark = pytest.mark.browser


def test_a_model_is_fetched_after_its_size_was_shown_and_confirmed(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    with running_hub() as hub:
        hub.repositories[str(ROWS[NAME].hub_id)] = published_files()
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("NEARFAR_DATA_DIR", str(tmp_path))
        with child_service() as address, browser.new_context() as context:
            page = context.new_page()
            page.set_default_timeout(20_000)
            page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept()))
            page.goto(address)
            page.locator("#models_box summary").click()
            assert page.get_by_role("button", name="Fetch smolvlm2-2.2b").count() == 0  # no ONNX files to fetch
            page.get_by_role("button", name=f"Fetch {NAME}").click()
            page.locator("#models_status", has_text=f"{NAME}@int4 is served now").wait_for()
            page.locator(f"#targets input[value='local/{NAME}@int4']").wait_for()
            assert page.get_by_role("button", name=f"Fetch {NAME}").count() == 0
    assert len(asked) == 1
    assert "MB" in asked[0]
    assert "not yet verified on published weights" in asked[0]
