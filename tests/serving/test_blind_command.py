"""`nearfar compare --blind` on a terminal: two nameless answers, a vote, and then who they were."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from comparisons.ballots import Ballots
from comparisons.database import database_url
from comparisons.store import Store
from models.tiny_scenes import SAMPLES

COMMAND = [sys.executable, "-m", "serving.cli", "compare", str(SAMPLES / "red-circle.png"), "What color is the circle?"]


def settings(data_dir: Path) -> dict[str, str]:
    return {**os.environ, "NEARFAR_DATA_DIR": str(data_dir), "NEARFAR_CONFIG": os.devnull, "TERM": "dumb"}


def read_until(terminal: int, text: str, within_s: float = 120) -> str:
    """What the command has written, up to that text."""
    said, deadline = b"", time.monotonic() + within_s
    while text.encode() not in said:
        assert time.monotonic() < deadline, said.decode()
        if select.select([terminal], [], [], 1)[0]:
            said += os.read(terminal, 4096)
    return said.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_names_and_figures_come_with_the_vote_and_the_vote_is_kept(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "--blind"], env=settings(tmp_path), stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL
    ) as process:
        before = read_until(ours, "both_bad:")
        os.write(ours, b"neither\n")
        read_until(ours, "both_bad:")
        os.write(ours, b"tie\n")
        after = read_until(ours, "one input is no ground")
        assert process.wait(60) == 0
    os.close(theirs)
    os.close(ours)
    assert "Side A" in before
    assert "Side B" in before
    assert before.count("red") == 2
    assert "tiny-scenes" not in before
    assert " ms" not in before
    assert "Side A was local/tiny-scenes@" in after
    store = Store(database_url(None, tmp_path))
    assert [vote.winner for vote in Ballots(store).votes("")] == ["tie"]
    store.close()


def test_without_a_terminal_it_asks_nobody(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--blind"], env=settings(tmp_path), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith("--blind asks for a vote: it takes a terminal, and no --json")
