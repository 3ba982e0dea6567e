"""`nearfar demo`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from models.errors import NearfarError
from serving.cli.console import fail


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="keep serving and print the page's address")] = False,
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 0,
) -> None:
    """Start the service, ask it about a bundled picture, show both answers side by side."""
    from serving.demo import run_demo

    try:
        run_demo(keep=keep, port=port, console=Console())
    except NearfarError as error:
        fail(error.message)
    except KeyboardInterrupt:
        print()  # the services have ended; Ctrl-C is how --keep is meant to end
