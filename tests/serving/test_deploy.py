"""The files for deploying: what compose and systemd are given, held against the settings and against these programs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.settings import SECRETS, Settings

DEPLOY = Path(__file__).resolve().parents[2] / "serving" / "deploy"


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return content


def test_what_compose_gives_the_service_are_settings_and_secrets_that_are_there() -> None:
    known = {f"NEARFAR_{name}".upper() for name in Settings.model_fields}
    known |= {f"NEARFAR_{name}_FILE".upper() for name in SECRETS}
    services = compose()["services"]
    assert set(services["nearfar"]["environment"]) <= known
    for service in services.values():
        named = {f"/run/secrets/{secret}" for secret in service["secrets"]}
        assert {value for value in service["environment"].values() if value.startswith("/run/")} == named
        assert set(service["secrets"]) <= set(compose()["secrets"])


@pytest.mark.parametrize("name", ["nearfar", "postgres"])
def test_what_compose_runs_is_confined_bounded_and_reached_from_here_alone(name: str) -> None:
    service = compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    # The service's own is in its image.
    assert name == "nearfar" or service["healthcheck"]["test"]


def test_compose_itself_takes_the_file(tmp_path: Path) -> None:
    # Podman has none; Docker's comes as a plugin or as a program. Version 1 knows another format.
    found = [command for command in (["docker", "compose"], ["docker-compose"]) if is_compose_2(command)]
    if not found:
        pytest.skip("neither docker compose nor docker-compose 2 is installed")
    run = subprocess.run([*found[0], "--file", DEPLOY / "compose.yaml", "config"], capture_output=True, check=False)
    assert run.returncode == 0, run.stderr


def is_compose_2(command: list[str]) -> bool:
    if shutil.which(command[0]) is None:
        return False
    run = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, check=False)
    return run.returncode == 0 and run.stdout.strip().removeprefix("v").startswith("2")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit_and_finds_it_confined(tmp_path: Path) -> None:
    unit = tmp_path / "nearfar.service"
    text = (DEPLOY / "nearfar.service").read_text()
    program = "/opt/nearfar/bin/nearfar"
    assert f"ExecStart={program} serve" in text
    unit.write_text(text.replace(program, sys.executable))  # it has to be there
    taken = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (taken.returncode, taken.stderr) == (0, "")
    rating = ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit]  # of 100: the least exposed
    assert subprocess.run(rating, capture_output=True, check=False).returncode == 0
