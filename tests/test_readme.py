"""Every command of every README.md is run, or says what it needs; files, links and names in them are there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.child import child_service
from serving.settings import Settings
from tests.readmes import (
    PROGRAMS,
    ROOT,
    Fence,
    Unknown,
    check_nearfar,
    fences,
    inline_commands,
    main,
    not_run,
    prose,
    readmes,
    walks,
)
from tests.serving.conftest import RunningService, running
from tests.serving.hub import published_files, running_hub

ADDRESS = "http://127.0.0.1:8000"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SHIMS = {
    "nearfar": f'exec "{sys.executable}" -m serving.cli "$@"',
    "python": f'exec "{sys.executable}" "$@"',
    "pytest": f'exec "{sys.executable}" -m pytest "$@"',
    "curl": 'exec /usr/bin/env PATH="${PATH#*:}" curl --fail "$@"',
}
RUN = [
    pytest.param(fence, id=str(fence), marks=[pytest.mark.slow, pytest.mark.timeout(3600)] if fence.is_slow else [])
    for fence in fences("sh")
    if fence.script and not any(fence in walk for walk in walks().values())
]
EVERY_COMMAND = [command.text for fence in fences("sh") for command in fence.commands]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """With the routes that serving/README.md declares."""
    declared = next(fence.text for fence in fences("toml") if "[routes]" in fence.text)
    file = tmp_path_factory.mktemp("readme") / "nearfar.toml"
    file.write_text(declared)
    with running(config=file) as started:
        yield started.ready()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like the tree, of links: what a command writes lands there, and what is changed is a copy."""
    look_alike = tmp_path / "tree"
    look_alike.mkdir()
    for path in ROOT.iterdir():
        if path.name in ("models", "export", "comparisons", "serving", "tests"):
            shutil.copytree(path, look_alike / path.name, copy_function=os.symlink)
        elif path.is_file():
            (look_alike / path.name).symlink_to(path)
    return look_alike


def assert_runs(script: str, folder: Path, **settings: str) -> None:
    """One after the other as bash does them, with this environment's programs; something is said."""
    programs = folder.parent / "programs"
    programs.mkdir(exist_ok=True)
    for name, line in SHIMS.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    paths = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    command = ["bash", "-euxo", "pipefail", "-c", script]
    environment = os.environ | paths | {"COLUMNS": "120"} | settings
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert run.stdout.strip()


@pytest.mark.parametrize("fence", RUN)
def test_the_commands_of_a_fence_succeed(fence: Fence, folder: Path, service: RunningService) -> None:
    serving = [command for command in fence.script if command.startswith("nearfar serve")]
    for command in serving:
        with child_service(*shlex.split(command, comments=True)[2:]):
            pass  # it became ready
    others = [command for command in fence.script if command not in serving]
    if others:
        assert_runs("\n".join(others).replace(ADDRESS, service.url), folder)


@pytest.mark.parametrize("fences_of_it", [pytest.param(walk, id=name) for name, walk in walks().items()])
def test_a_walk_leads_where_it_says(fences_of_it: list[Fence], folder: Path, service: RunningService) -> None:
    with running_hub() as hub:
        hub.repositories["me/my-scenes"] = published_files()
        for fence in fences_of_it:
            if fence.language == "diff":
                change(fence.text.replace(ADDRESS, service.url), folder)
            else:
                data = str(folder.parent / "data")
                assert_runs(
                    "\n".join(fence.script), folder, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", NEARFAR_DATA_DIR=data
                )


def change(diff: str, folder: Path) -> None:
    """Apply a diff of one file whose hunks are known by their lines alone: what they stand for is there, and once."""
    head, *hunks = re.split(r"^@@.*\n", diff, flags=re.MULTILINE)
    (name,) = re.findall(r"^\+\+\+ b/(.+)$", head, re.MULTILINE)
    file = folder / name
    text = file.read_text()
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
        assert text.count(before) == 1, f"{name} has not once:\n{before}"
        text = text.replace(before, after)
    file.unlink()  # a link into the tree
    file.write_text(text)


@pytest.mark.parametrize("path", readmes(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_stands_in_a_fence_that_says_sh_or_in_a_sentence(path: Path) -> None:
    hidden = re.compile(rf"^\s*(\$ )?({'|'.join(PROGRAMS)}) ", re.MULTILINE)
    name = str(path.relative_to(ROOT))
    assert not [str(fence) for fence in fences("") if fence.file == name and hidden.search(fence.text)]
    assert not re.search(rf"^ {{4,}}({'|'.join(PROGRAMS)}) ", prose(path), re.MULTILINE)


@pytest.mark.parametrize("path", readmes(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_sentence_calls_a_command_is_one(path: Path) -> None:
    for text in inline_commands(path):
        check(text)


def test_every_command_and_option_in_a_fence_exists() -> None:
    for text in EVERY_COMMAND:
        check(text)


def check(text: str) -> None:
    """Commands, options, modules, make's targets and extras that a command names are there."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # half of a quotation, in a sentence
        words = text.split()
    program = words[0].rpartition("/")[2]
    if program == "nearfar":
        check_nearfar(words[1:])
    elif program == "make":
        targets = [word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)]
        assert set(targets) <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)), text
    elif program == "python" and words[1:2] == ["-m"] and words[2].partition(".")[0] in ("models", "export", "tests"):
        assert importlib.util.find_spec(words[2]), text
    for extras in re.findall(r"(?:nearfar|\.)\[([\w,-]+)\]", text):
        assert set(extras.split(",")) <= EXTRAS.keys(), text


def test_a_made_up_command_is_found_out() -> None:
    for words in (["paint"], ["records", "paint"], ["serve", "--paint"], ["egress", "verify", "--paint=red"]):
        with pytest.raises(Unknown):
            check_nearfar(words)
    check_nearfar(["records", "list|show", "--json"])


def test_marks_say_what_is_not_run_what_is_slow_and_nothing_else() -> None:
    text = """\
make demo   # a table; needs a package index
nearfar serve \\
    --port 0
nearfar pull x   # says what it needs
# slow
nearfar bench
nearfar pull x   # needs a hub: 1 GB
"""
    fence = Fence(file="README.md", line=1, section="", language="sh", text=text)
    told = [(command.text, command.needs, command.slow) for command in fence.commands]
    assert told == [
        ("make demo", "a package index", False),
        ("nearfar serve --port 0", None, False),
        ("nearfar pull x   # says what it needs", None, False),
        ("nearfar bench", None, True),
        ("nearfar pull x", "a hub: 1 GB", True),
    ]
    assert fence.script == [told[1][0], told[2][0], told[3][0]]


def test_what_no_test_runs_is_listed_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    listed = capsys.readouterr().out
    for place, commands in not_run().items():
        assert place in listed
        assert all(f"needs {command.needs}" in listed for command in commands)


@pytest.mark.parametrize("fence", fences("toml"), ids=str)
def test_settings_shown_are_settings(fence: Fence, tmp_path: Path) -> None:
    file = tmp_path / "nearfar.toml"
    file.write_text(fence.text)
    assert Settings(config=file)


@pytest.mark.parametrize("fence", fences("json"), ids=str)
def test_json_shown_is_json(fence: Fence) -> None:
    assert json.loads(fence.text)


def anchors(path: Path) -> set[str]:
    """Of every heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", readmes(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)) if not link.startswith("http")]
    for link in links:
        name, _, anchor = link.partition("#")
        target = (path.parent / name) if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
