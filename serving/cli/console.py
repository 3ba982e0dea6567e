"""What the commands share: settings out of their options, one line for an error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from models.errors import NearfarError
from models.files import write_whole
from serving.settings import Settings

ConfigOption = Annotated[Path | None, typer.Option(help="settings file  [default: nearfar.toml here, if there is one]")]
ModelsOption = Annotated[
    list[str] | None,
    typer.Option("--model", help="model name or bundle folder; repeatable, the first is the default"),
]
FileArgument = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="picture (JPEG, PNG, WebP, GIF), video (MP4, WebM) or document (PDF, TIFF), by content"
    ),
]
YesFlag = Annotated[bool, typer.Option("--yes", "-y", help="fetch an absent model without asking")]
OfflineFlag = Annotated[bool, typer.Option("--offline", help="fetch nothing: only what is on this machine")]
JsonFlag = Annotated[bool, typer.Option("--json", help="print JSON; where HTTP has the same, its object")]


def settings_from(**overrides: Any) -> Settings:
    """Settings of file and environment with the given options over them. A wrong one ends the command with status 2."""
    try:
        return Settings(**{name: value for name, value in overrides.items() if value not in (None, (), [])})
    except NearfarError as error:
        fail(error.message, status=2)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        fail(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", status=2)


def fail(message: str, *, status: int = 1) -> NoReturn:
    """One line on stderr and the exit status."""
    print(f"nearfar: {message}", file=sys.stderr)
    raise typer.Exit(status)


def say(text: str) -> None:
    """One line on stderr."""
    print(f"nearfar: {text}", file=sys.stderr)


def write_page(path: Path, text: str) -> None:
    """Whole or not at all; where it cannot be written the command ends in one line."""
    try:
        write_whole(path, text)
    except OSError as error:
        fail(f"{path}: {error.strerror}")
