"""Files that are there whole or not at all, and private ones."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from models.files import make_private, write_whole
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


LOCK = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def test_a_private_file_that_this_process_has_locked_stays_locked(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    make_private(file)
    assert (file.stat().st_mode & 0o077, file.parent.stat().st_mode & 0o077) == (0, 0)
    with file.open("r+") as locked:
        fcntl.lockf(locked, fcntl.LOCK_EX)
        make_private(file)
        other = subprocess.run([sys.executable, "-c", LOCK, str(file)], capture_output=True, text=True, check=False)
    assert "BlockingIOError" in other.stderr
