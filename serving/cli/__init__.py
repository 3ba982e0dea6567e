"""The command line: each command parses, calls and prints. What one needs is imported when it is called, no sooner.

`export` is reached lazily: serving needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

# Name of a command -> module and the function, or the group of commands, in it.
COMMANDS = {
    "serve": "serve:serve",
    "infer": "infer:infer",
    "compare": "compare:compare",
    "evaluate": "evaluate:evaluate",
    "verdict": "verdict:verdict",
    "leaderboard": "verdict:leaderboard",
    "break-even": "money:break_even",
    "report": "report:report",
    "records": "records:app",
    "replay": "records:replay",
    "calibrate": "calibrate:calibrate",
    "models": "models:models",
    "pull": "models:pull",
    "export": "export:export",
    "finetune": "finetune:finetune",
    "adopt": "models:adopt",
    "verify": "models:verify",
    "bench": "bench:bench",
    "demo": "demo:demo",
    "doctor": "doctor:doctor",
    "config": "settings:config",
    "key": "settings:key",
    "spend": "money:spend",
    "egress": "egress:app",
}


class Commands(TyperGroup):
    """The commands of the table, each imported when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names as help lists them."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        found = getattr(import_module(f"serving.cli.{module}"), name)
        if isinstance(found, typer.Typer):
            return typer.main.get_group(found)
        alone = typer.Typer(add_completion=False)
        alone.command(cmd_name)(found)
        return typer.main.get_command(alone)


app = typer.Typer(
    name="nearfar",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def nearfar() -> None:
    """Questions about images, answered on this machine, and beside it what a hosted model answers, costs and sees."""


def main() -> None:
    """Entry point of the `nearfar` command."""
    app()
