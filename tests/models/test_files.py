"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from models.files import write_whole
from serving.cli.console import write_page


def test_what_cannot_be_written_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    place = tmp_path / "page.html"
    write_whole(place, "old")
    write_whole(place, "new")
    with pytest.raises(UnicodeEncodeError):
        write_whole(place, "half\ud800")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("page.html", "new")]


def test_a_commands_page_that_has_no_place_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(typer.Exit):
        write_page(tmp_path / "none" / "page.html", "text")
    assert capsys.readouterr().err == f"nearfar: {tmp_path}/none/page.html: No such file or directory\n"
