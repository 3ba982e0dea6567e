"""`nearfar config` and `nearfar key`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from serving.cli.console import ConfigOption, JsonFlag, fail, say, settings_from
from serving.keys import new_key


def config(config: ConfigOption = None, as_json: JsonFlag = False) -> None:
    """Show every setting as it takes effect, and where it comes from. Of keys only the names are shown."""
    from serving.tables.service import settings_table

    effective = settings_from(config=config).effective()
    if as_json:
        print(json.dumps({name: shown._asdict() for name, shown in effective.items()}, indent=2))
    else:
        settings_table(effective, Console())


def key(name: Annotated[str, typer.Argument(help="whose key it is: letters, digits, dots, dashes")]) -> None:
    """Make an API key: it is shown once, on stderr; what nearfar.toml keeps of it goes to stdout."""
    try:
        made = new_key(name)
    except ValidationError:
        fail("a key's name is 1 to 64 letters, digits, dots, dashes and underscores", status=2)
    say(f"the key, shown this once: {made.key}")
    print(made.section)
