"""Files that are there whole or not at all, that are for their owner alone, or that hold one JSON object."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from models.errors import NearfarError


def write_whole(path: Path, text: str) -> None:
    """Write it beside and take its place. Raises OSError, and leaves what was there."""
    beside = path.parent / f".{path.name}.part"  # with_name refuses what has no name, as "." and "/"
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def make_private(file: Path) -> None:
    """The file is there, for its owner alone; what SQLite makes beside it takes its permissions.

    One that is there is not opened: closing it would drop the locks that this process's connections hold on it, and
    another process could then take away the log that they write into (https://sqlite.org/howtocorrupt.html, 2.2).
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def read_object(folder: Path, name: str, kind: type[NearfarError], *, otherwise: str) -> dict[str, Any]:
    """The JSON object in a folder's file. Raises that kind; `otherwise`: what a folder without such a file is."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise kind(f"{folder} is {otherwise}: {name} cannot be read") from error
    except ValueError as error:
        raise kind(f"{folder / name} is not JSON") from error
    if not isinstance(content, dict):
        raise kind(f"{folder / name} holds no JSON object")
    return content
