"""The commands of every README.md: which of them tests run, and which are marked as needing what a test has not.

`python -m tests.readmes` (`make commands`) lists the latter with their reasons. A command stands in a fence marked
`sh`; lines that end in a backslash are joined. A comment `# needs WHAT` behind it says why no test runs it, `# slow`
that `make check-slow` does; on a line of its own either is of all that follows in that fence. A fence is run as one
script, in a folder that looks like the tree; `http://127.0.0.1:8000` is a service with the embedded model. A section
with a fence marked `diff` is a walk: its changes are made to a copy of the tree, and its commands run there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from serving.cli import app

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("models", "export", "comparisons", "serving", "tests", ".ci")  # and the root itself
PROGRAMS = ("nearfar", "make", "python", "pip", "pytest", "curl", "docker")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"(?:^|\s)#\s*(?:[^#]*;\s*)?(needs|slow)\b:?\s*(.*)$")


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command. `needs` None: a test runs it; `slow`: that of `make check-slow`."""

    text: str
    needs: str | None = None
    slow: bool = False


@dataclass(frozen=True, kw_only=True)
class Fence:
    """A fenced block: where it begins, the nearest heading above, its language, its text."""

    file: str
    line: int
    section: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def commands(self) -> list[Command]:
        return list(_commands(self.text))

    @property
    def script(self) -> list[str]:
        """What of it is run, in order."""
        return [command.text for command in self.commands if command.needs is None]

    @property
    def is_slow(self) -> bool:
        return any(command.slow for command in self.commands)


def _commands(text: str) -> Iterator[Command]:
    needs: str | None = None
    slow = False
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        mark = _MARK.search(line)
        command = line[: mark.start()].strip() if mark else line.strip()
        its_needs = mark[2] or "what is not said" if mark and mark[1] == "needs" else needs
        its_slow = slow or (mark is not None and mark[1] == "slow")
        if command and not command.startswith("#"):
            yield Command(text=command, needs=its_needs, slow=its_slow)
        elif mark:
            needs, slow = its_needs, its_slow


def readmes() -> list[Path]:
    """Every README.md of the tree."""
    return [ROOT / "README.md", *sorted(path for place in PLACES for path in (ROOT / place).rglob("README.md"))]


def fences(*languages: str) -> list[Fence]:
    """Every fenced block of those languages, or of any."""
    found = []
    for path in readmes():
        text = path.read_text()
        section, end = "", 0
        for match in _FENCE.finditer(text):
            section = [section, *re.findall(r"^#+ .*$", text[end : match.start()], re.MULTILINE)][-1]
            end = match.end()
            line = text.count("\n", 0, match.start()) + 1
            name = str(path.relative_to(ROOT))
            found.append(Fence(file=name, line=line, section=section, language=match[1], text=match[2]))
    return [fence for fence in found if not languages or fence.language in languages]


def walks() -> dict[str, list[Fence]]:
    """Sections that change the tree by a `diff`, and then run commands in what came of it: their fences, in order."""
    changed = {(fence.file, fence.section) for fence in fences("diff")}
    found: dict[str, list[Fence]] = {}
    for fence in fences("sh", "diff"):
        if (fence.file, fence.section) in changed:
            found.setdefault(f"{fence.file} {fence.section.lstrip('# ')}", []).append(fence)
    return found


def prose(path: Path) -> str:
    """A README's text without its fences."""
    return _FENCE.sub("", path.read_text())


def named_in(tree: str, root: Path) -> Iterator[Path]:
    """Files and folders that a drawn tree names: what a line names lies in the folder that is indented less."""
    folders: list[tuple[int, Path]] = []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        while folders and folders[-1][0] >= indent:
            folders.pop()
        above = folders[-1][1] if folders else root
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            yield above / name
            if name.endswith("/"):
                folders.append((indent, above / name))


def file_tree(path: Path) -> list[Path]:
    """What a README's drawn tree names; nothing where it has none."""
    tree = re.search(r"^## Where things are\n\n```\n(.*?)```", path.read_text(), re.MULTILINE | re.DOTALL)
    return list(named_in(tree[1], path.parent)) if tree else []


def inline_commands(path: Path) -> list[str]:
    """What stands between backticks in its sentences and begins as a command does."""
    code = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(path)))
    return [text for text in code if text.split(" ")[0].rpartition("/")[2] in PROGRAMS and " " in text]


class Unknown(Exception):
    """A command that names what there is not."""


def check_nearfar(words: list[str]) -> None:
    """Raises Unknown for a command, a subcommand or an option of `nearfar` that there is not."""
    command: Any = typer.main.get_command(app)
    context: Any = command.make_context("nearfar", [], resilient_parsing=True)
    rest = list(words)
    while hasattr(command, "commands") or hasattr(command, "list_commands"):
        if not rest or rest[0].startswith("-"):
            break
        names = rest.pop(0).split("|")
        below = [command.get_command(context, name) for name in names]
        if None in below:
            raise Unknown(f"nearfar has no command {names[below.index(None)]!r}")
        command = below[0]
    known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}
    for word in rest:
        option = word.strip("[]").partition("=")[0]
        if re.fullmatch(r"--[a-z][a-z-]*", option) and option not in known:
            raise Unknown(f"nearfar {' '.join(words)}: there is no {option}")


def not_run() -> Mapping[str, list[Command]]:
    """Commands that no test runs, by the place of their fence."""
    found = {str(fence): [each for each in fence.commands if each.needs is not None] for fence in fences("sh")}
    return {place: commands for place, commands in found.items() if commands}


def main() -> None:
    every = [command for fence in fences("sh") for command in fence.commands]
    listed = not_run()
    for place, commands in listed.items():
        print(place)
        for command in commands:
            shown = command.text if len(command.text) <= 90 else command.text[:89] + "…"
            print(f"  {shown}\n      needs {command.needs}")
    left = sum(map(len, listed.values()))
    slow = sum(command.slow and command.needs is None for command in every)
    print(
        f"{len(every)} commands in {len(readmes())} files: {len(every) - left} are run by tests, {slow} of them slow; ",
        end="",
    )
    print(f"{left} are not")


if __name__ == "__main__":
    main()
