"""`nearfar doctor`: what is recommended and refused on machines of other sizes, and on this one as `serve` does."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.bundle import Bundle
from models.catalog import EXPORT_PEAK_BYTES, ROWS, SPEEDS, START_UPS
from models.errors import InvalidValue
from models.execution import ROWS as PROVIDERS
from models.machine import Memory, Processor
from models.memory import GB, LEAST_CONTEXT, fit, need_of, need_of_row, shape_of, total_bytes
from models.tiny_scenes import BUNDLES
from serving.doctor.diagnosis import Candidate, Diagnosis, diagnose
from serving.doctor.machine import Disk, Machine, disk_of, look
from serving.services import Services
from serving.settings import Settings
from tests.serving.conftest import running

EMBEDDED = [Bundle.read(folder) for folder in BUNDLES.values()]
EXPORT = {"export": {"torch": "2.13.0"}}


def a_machine(size_gb: float, **changes: Any) -> Machine:
    """All of its memory free, two cores with AVX2, 100 GB of disk, no extra, nothing but the CPU."""
    size = round(size_gb * GB)
    plain = Machine(
        processor=Processor("a processor", ("avx2",)),
        architecture="x86_64",
        system="Linux",
        python="3.11.7",
        cores=2,
        threads=2,
        memory=Memory(size, size, None),
        disk=Disk(folder=Path("/data"), free_bytes=100 * GB, writable=True),
        runtime="onnxruntime 1.31.1",
        providers=("cpu",),
        extras={"export": {"torch": None}},
    )
    return replace(plain, **changes)


def diagnosed(machine: Machine, **settings: Any) -> Diagnosis:
    return diagnose(machine, Settings(**settings), EMBEDDED)


def candidate(diagnosis: Diagnosis, target: str) -> Candidate:
    return next(each for each in diagnosis.candidates if each.target == target)


@pytest.mark.parametrize(
    ("size_gb", "extras", "expected"),
    [
        (0.5, {}, "tiny-scenes@int8"),
        (2, {}, "smolvlm2-256m@int4"),
        (4, {}, "smolvlm2-500m@int4"),
        (4, EXPORT, "smolvlm2-500m@int4"),  # its int8 fits, and the export of it does not
        (8, EXPORT, "smolvlm2-500m@int8"),
        (16, {}, "smolvlm2-500m@int4"),  # of the largest no ONNX files are published
        (16, EXPORT, "smolvlm2-2.2b@int8"),
    ],
)
def test_the_most_capable_model_that_fits_and_can_be_had_is_recommended(
    size_gb: float, extras: dict[str, Any], expected: str
) -> None:
    found = diagnosed(a_machine(size_gb, extras=extras))
    best = found.recommended
    assert best
    assert (best.target, found.problems) == (expected, ())
    assert best.fit
    assert best.fit.bytes <= found.budget_bytes == round(0.9 * size_gb * GB)
    name, _, recipe = expected.partition("@")
    need = (
        need_of(Bundle.read(BUNDLES["tiny-scenes@int8"])) if name == "tiny-scenes" else need_of_row(ROWS[name], recipe)
    )
    assert best.fit == fit([need], found.budget_bytes)


def test_what_does_not_fit_is_refused_with_the_figures_of_the_memory_budget() -> None:
    found = diagnosed(a_machine(2.3), memory_budget="2.1GB")
    large = candidate(found, "smolvlm2-2.2b@int8")
    needed = total_bytes([need_of_row(ROWS["smolvlm2-2.2b"], "int8")], 1, LEAST_CONTEXT)
    assert (large.fit, large.need_bytes) == (None, needed)
    assert large.refusals[0] == f"needs {needed / GB:.1f} GB of memory, 2.1 GB are set as budget"
    free = candidate(diagnosed(a_machine(2)), "smolvlm2-2.2b@int8")
    assert free.refusals[0] == f"needs {needed / GB:.1f} GB of memory, 1.8 GB are free for models"


def test_an_export_is_refused_where_its_own_memory_or_its_packages_are_missing() -> None:
    peak = EXPORT_PEAK_BYTES[ROWS["smolvlm2-2.2b"].shape]["int8"] / GB
    (memory,) = candidate(diagnosed(a_machine(8, extras=EXPORT)), "smolvlm2-2.2b@int8").refusals
    assert memory.startswith(f"its export takes {peak:.1f} GB of memory, 8.0 GB are free: export it elsewhere")
    (packages,) = candidate(diagnosed(a_machine(16)), "smolvlm2-2.2b@int8").refusals
    assert "pip install 'nearfar[export]'" in packages


def test_without_room_on_the_disk_what_is_here_is_left() -> None:
    full = Disk(folder=Path("/data"), free_bytes=100_000_000, writable=True)
    found = diagnosed(a_machine(16, disk=full, extras=EXPORT))
    assert found.recommended
    assert found.recommended.target == "tiny-scenes@int8"
    published = candidate(found, "smolvlm2-256m@int4")
    assert published.refusals[0].startswith("needs 0.9 GB in /data, 0.1 GB are free")
    assert found.problems == ()


def test_a_folder_that_cannot_be_written_leaves_what_is_here() -> None:
    sealed = Disk(folder=Path("/data"), free_bytes=100 * GB, writable=False)
    found = diagnosed(a_machine(4, disk=sealed))
    assert candidate(found, "smolvlm2-500m@int4").refusals == ("/data cannot be written",)
    assert found.recommended
    assert (found.recommended.way, found.problems) == ("here", ())
    assert found.notes[0].startswith("/data cannot be written: nothing is fetched, and comparisons")


def test_offline_recommends_what_is_here_alone() -> None:
    found = diagnosed(a_machine(16, extras=EXPORT), offline=True)
    assert found.recommended
    assert found.recommended.way == "here"
    assert "offline" in candidate(found, "smolvlm2-256m@int4").refusals[0]


def test_on_arm_speed_is_unmeasured_and_the_command_that_measures_it_is_told() -> None:
    board = a_machine(4, architecture="aarch64", processor=Processor("Raspberry Pi 5", ("asimd", "asimddp")), cores=4)
    found = diagnosed(board)
    assert found.recommended
    assert (found.recommended.target, found.recommended.speed) == ("smolvlm2-500m@int4", None)
    assert found.notes == ("on Arm nothing was measured: nearfar bench --model MODEL does",)


def test_a_measured_speed_is_told_where_the_processor_has_what_it_was_measured_with() -> None:
    fast = a_machine(64, processor=Processor("EPYC", ("avx2", "avx512f", "avx512_vnni")), extras=EXPORT)
    found = diagnosed(fast)
    assert found.recommended
    assert found.recommended.target == "smolvlm2-2.2b@int8-fast"  # there its prompt step was measured faster
    assert found.recommended.speed in SPEEDS
    assert candidate(diagnosed(a_machine(64)), "smolvlm2-2.2b@int8-fast").speed is None


def test_where_nothing_can_work_the_embedded_model_s_figures_say_so() -> None:
    found = diagnosed(a_machine(0.2))
    assert found.recommended is None
    assert len(found.problems) == 1
    assert found.problems[0].startswith("nothing can work here: needs 0.")


def test_settings_and_what_is_installed_are_held_against_each_other() -> None:
    absent = diagnosed(a_machine(4), execution_provider="qnn")
    assert absent.problems[0].startswith("execution_provider qnn is not in the installed onnxruntime")
    untested = diagnosed(a_machine(4, providers=("cpu", "coreml")), execution_provider="coreml")
    assert (untested.problems, untested.notes) == ((), ("coreml is untested: nearfar was not run on such a device",))
    idle = diagnosed(a_machine(4, gpus=("NVIDIA L4",)))
    assert idle.notes[0].startswith("NVIDIA L4 is not used: cuda comes with onnxruntime-gpu")
    bare = diagnosed(a_machine(4), host="0.0.0.0")
    assert "make a key with nearfar key" in bare.problems[0]


@pytest.mark.parametrize(
    ("model", "settings", "part"),
    [
        ("smolvlm2-2.2b@int8", {"memory_budget": "4GB"}, "smolvlm2-2.2b@int8: needs 4.6 GB of memory, 4.0 GB are set"),
        ("smolvlm2-256m", {"offline": True}, "smolvlm2-256m@int4: not on this machine, and offline"),
        ("smolvlm2-250m", {}, "smolvlm2-250m: there is no model 'smolvlm2-250m'; did you mean"),
        ("./nowhere", {}, "./nowhere: nowhere is no bundle"),
        ("tiny-scenes", {"memory_budget": "200MB"}, "tiny-scenes: too large for the memory budget of 0.20 GB"),
    ],
)
def test_a_configured_model_that_cannot_be_served_is_a_problem(model: str, settings: dict[str, Any], part: str) -> None:
    found = diagnosed(a_machine(16, extras=EXPORT), models=(model,), **settings)
    assert found.problems[0].startswith(part)


def test_a_machine_checks_itself() -> None:
    with pytest.raises(InvalidValue):
        a_machine(4, threads=3)
    with pytest.raises(InvalidValue):
        a_machine(0)


def test_the_readme_s_table_is_what_is_recommended() -> None:
    lines = []
    for size_gb in (0.5, 2, 4, 8, 16):
        both = [diagnosed(a_machine(size_gb, extras=extras)).recommended for extras in ({}, EXPORT)]
        lines.append(f"| {size_gb:g} GB | " + " | ".join(f"`{each.target}`" for each in both if each) + " |")
    assert "\n".join(lines) in (Path(__file__).parents[2] / "models" / "README.md").read_text()


# For real, on this machine

START = """
import asyncio, sys
from pathlib import Path
import serving.cli.serve  # as the command does
from serving.app import create_app
from serving.services import Services
from serving.settings import Settings

async def start():
    services = Services(Settings(models=(sys.argv[1],), data_dir=Path(sys.argv[2])), {})
    await services.load()
    assert services.not_ready() is None
    print(len(sys.modules), Path("/proc/self/io").read_text().split()[1])
    await services.aclose()

asyncio.run(start())
"""


@pytest.mark.parametrize("recipe", ["int8", "fp32"])
def test_a_start_reads_and_imports_no_more_than_its_row_says(recipe: str, tmp_path: Path) -> None:
    row = next(each for each in START_UPS if (each.shape, each.recipe) == (shape_of(EMBEDDED[0]), recipe))
    command = [sys.executable, "-c", START, f"tiny-scenes@{recipe}", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    modules, read_bytes = map(int, run.stdout.split())
    # A tenth is for another release of a library. Much less than the row has means that the row is old.
    assert 0.5 * row.modules <= modules <= 1.1 * row.modules
    assert 0.5 * row.read_bytes <= read_bytes <= 1.1 * row.read_bytes


def test_the_readme_has_the_start_ups_of_the_catalog() -> None:
    text = (Path(__file__).parents[2] / "models" / "README.md").read_text()
    names = {row.shape: name for name, row in reversed(ROWS.items())}
    for row in START_UPS:
        ready = "unmeasured" if row.ready_s is None else f"{row.ready_s:g} s"
        cells = (f"`{names[row.shape]}@{row.recipe}`", f"{row.budget_s:g} s", ready, f"{row.read_bytes / 1e6:.0f} MB")
        assert f"| {' | '.join(cells)} |" in text


def test_doctor_refuses_what_serving_refuses_in_the_same_words(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, models=("tiny-scenes@fp32",), memory_budget="250MB")
    services = Services(settings, {})

    async def load() -> str | None:
        await services.load()
        try:
            return services.not_ready()
        finally:
            await services.aclose()

    refused = asyncio.run(load())
    assert refused
    assert diagnose(look(settings, {}), settings, EMBEDDED).problems == (f"tiny-scenes@fp32: {refused}",)


def test_a_model_that_doctor_passes_is_served_with_the_slots_it_told() -> None:
    with running(models=("tiny-scenes@int8",), memory_budget="300MB") as service:
        settings = service.app.state.settings
        (shown,) = service.ready().client.get("/models").json()["models"]
    told = candidate(diagnose(look(settings, {}), settings, EMBEDDED), "tiny-scenes@int8").fit
    assert told
    assert (shown["memory"]["slots"], shown["memory"]["context"]) == (told.slots, told.context)


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serving.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def test_the_command_prints_json_without_secrets_and_exits_by_what_can_work(tmp_path: Path) -> None:
    here = {"NEARFAR_DATA_DIR": str(tmp_path / "not" / "yet"), "ANTHROPIC_API_KEY": "a-secret"}
    run = run_cli("doctor", "--json", "--offline", **here)
    shown = json.loads(run.stdout)
    assert (run.returncode, shown["ok"], shown["recommended"]["target"]) == (0, True, "tiny-scenes@int8")
    assert shown["machine"]["keys"] == ["ANTHROPIC_API_KEY"]
    assert "a-secret" not in run.stdout
    assert [each["name"] for each in shown["machine"]["providers"] if each["tested"]] == ["cpu"]
    assert shown["machine"]["extras"]["hosted"]["anthropic"]
    assert not (tmp_path / "not").exists()  # it looks, and writes nothing
    refused = run_cli("doctor", "--model", "tiny-scenes", NEARFAR_MEMORY_BUDGET="100MB", COLUMNS="100", **here)
    assert refused.returncode == 1
    assert "cannot work: tiny-scenes: too large for the memory budget of 0.10 GB" in refused.stdout
    assert "needs 0.2 GB of memory" in refused.stdout


def test_serving_through_a_provider_that_is_absent_ends_at_once_with_one_line(tmp_path: Path) -> None:
    run = run_cli("serve", "--port", "0", NEARFAR_EXECUTION_PROVIDER="coreml", NEARFAR_DATA_DIR=str(tmp_path))
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith("nearfar: execution_provider coreml is not in the installed onnxruntime")


def test_a_target_tells_that_its_provider_is_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "cpu", replace(PROVIDERS["cpu"], tested=False))  # type: ignore[arg-type]
    with running(models=("tiny-scenes@int8",)) as service:
        (target,) = service.ready().client.get("/targets").json()["targets"]
    assert target["notice"].endswith("; computed through cpu, on which nearfar is untested")


def test_doctor_imports_neither_the_service_nor_what_only_other_commands_need() -> None:
    code = "import sys, serving.doctor.diagnosis, serving.doctor.machine; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "fastapi", "uvicorn", "sqlalchemy", "genai_prices", "openai", "anthropic", "av"}
    assert not heavy & set(run.stdout.split())


def test_a_folder_behind_one_that_is_closed_to_this_user_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.stat

    def closed(path: Any, **options: Any) -> os.stat_result:  # for root there is no such folder
        if Path(path).is_relative_to(tmp_path / "closed" / "of mine"):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, **options)

    (tmp_path / "closed").touch()
    monkeypatch.setattr(os, "stat", closed)
    assert not disk_of(tmp_path / "closed" / "of mine" / "data").writable


def test_a_disk_is_that_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    found = disk_of(tmp_path / "models" / "of mine")
    assert (found.folder, found.writable) == (tmp_path / "models" / "of mine", True)
    assert found.free_bytes > 0
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "file").touch()
    assert not disk_of(tmp_path / "file" / "models").writable
    assert not disk_of(Path("/proc/nearfar")).writable
