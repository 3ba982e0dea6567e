"""From a machine and settings to what can be served: a pure function. All arithmetic is that of `models.memory`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from models.bundle import Bundle
from models.catalog import (
    EXPORT_PEAK_BYTES,
    PUBLISHED,
    ROWS,
    SPEEDS,
    START_UPS,
    Row,
    Shape,
    Speed,
    StartUp,
)
from models.errors import NearfarError, NotFound, Unavailable
from models.execution import ROWS as PROVIDERS
from models.execution import refusal
from models.memory import GB, LEAST_CONTEXT, Fit, Need, default_budget, fit, need_of, need_of_row, shape_of, total_bytes
from serving.doctor.machine import Machine
from serving.local_models import RECIPE_PREFERENCE, model_folder
from serving.pull import wanted
from serving.settings import Settings

FAMILY = "smolvlm2-"  # of the catalog's models those that are recommended: the newest that are published in all sizes
FAST_SETS = {"avx512_vnni"}  # where int8-fast was measured against the others: serving/bench/README.md
Way = Literal["here", "pull", "export"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model in a recipe on this machine. `fit` None: memory is too small; `refusals`: all that speaks against it."""

    target: str
    parameters: int
    way: Way
    command: str | None
    need_bytes: int  # of the process with it and one sequence of LEAST_CONTEXT positions
    file_bytes: int
    fit: Fit | None
    speed: Speed | None
    start_up: StartUp | None
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What can be served here, the most capable first; what to take; what stands against starting as configured."""

    budget_bytes: int
    threads: int
    candidates: tuple[Candidate, ...]
    recommended: Candidate | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def diagnose(machine: Machine, settings: Settings, bundles: Sequence[Bundle]) -> Diagnosis:
    """`bundles`: the models on this machine, the embedded ones among them. Raises BundleError for a damaged one."""
    budget = settings.memory_budget or default_budget(machine.memory)
    judge = _Judge(machine, settings, budget)
    candidates = [judge.local(bundle) for bundle in bundles]
    here = {each.target for each in candidates}
    rows = [row for name, row in ROWS.items() if name.startswith(FAMILY)]
    wanted_too = [judge.catalog(row, recipe) for row in rows for recipe in RECIPE_PREFERENCE if recipe != "fp16"]
    candidates += [each for each in wanted_too if each.target not in here]
    order = list(RECIPE_PREFERENCE)
    if FAST_SETS & set(machine.processor.instruction_sets):
        order.sort(key=lambda recipe: recipe != "int8-fast")
    places = {recipe: place for place, recipe in enumerate(order)}
    candidates.sort(key=lambda each: (-each.parameters, places.get(each.target.rpartition("@")[2], len(order))))
    works = [each for each in candidates if not each.refusals]
    problems = [*judge.configured(), *_stands_against(machine, settings)]
    if not works:
        problems.append(f"nothing can work here: {'; '.join(candidates[-1].refusals)}")
    return Diagnosis(
        budget_bytes=budget,
        threads=settings.threads or machine.threads,
        candidates=tuple(candidates),
        recommended=works[0] if works else None,
        problems=tuple(problems),
        notes=tuple(_notes(machine, settings)),
    )


@dataclass(frozen=True)
class _Judge:
    """Holds models against one machine."""

    machine: Machine
    settings: Settings
    budget: int

    def local(self, bundle: Bundle) -> Candidate:
        """A bundle on this machine."""
        return self._candidate(
            bundle.target.removeprefix("local/"),
            need_of(bundle),
            shape_of(bundle),
            parameters=bundle.manifest.shapes.parameters,
            file_bytes=bundle.model_bytes,
        )

    def catalog(self, row: Row, recipe: str) -> Candidate:
        """A model of the catalog that is not here: as published, or exported from its checkpoint."""
        target, published = f"{row.name}@{recipe}", row.published_onnx and recipe in PUBLISHED
        against = []
        files = row.file_bytes(recipe)
        # A graph that is edited is written beside itself once; an export reads a checkpoint of 2 bytes a weight.
        room = files + (max(row.graph_bytes(recipe).values()) if published else 2 * row.shape.parameters)
        disk = self.machine.disk
        if not disk.writable:
            against.append(f"{disk.folder} cannot be written")
        elif room > disk.free_bytes:
            against.append(f"needs {_gb(room)} in {disk.folder}, {_gb(disk.free_bytes)} are free")
        if self.settings.offline:
            against.append("not on this machine, and offline fetches nothing")
        if not published:
            against += self._against_export(row, recipe)
        return self._candidate(
            target,
            need_of_row(row, recipe),
            row.shape,
            parameters=row.shape.parameters,
            file_bytes=files,
            way="pull" if published else "export",
            command=f"nearfar pull {row.name} --recipe {recipe}",
            against=against,
        )

    def _against_export(self, row: Row, recipe: str) -> Iterator[str]:
        if not self.machine.has_extra("export"):
            yield "is made from its checkpoint, which takes: pip install 'nearfar[export]'"
        peaks, memory = EXPORT_PEAK_BYTES.get(row.shape, {}), self.machine.memory
        peak = peaks.get(recipe, max(peaks.values(), default=0))  # of one that was not measured, the most of the others
        free = memory.total_bytes if memory.free_bytes is None else memory.free_bytes
        if peak > free:
            yield f"its export takes {_gb(peak)} of memory, {_gb(free)} are free: export it elsewhere, copy the folder"

    def _candidate(
        self,
        target: str,
        need: Need,
        shape: Shape,
        *,
        parameters: int,
        file_bytes: int,
        way: Way = "here",
        command: str | None = None,
        against: Sequence[str] = (),
    ) -> Candidate:
        needed = total_bytes([need], 1, min(LEAST_CONTEXT, need.max_positions))
        fits: Fit | None = None
        refusals = list(against)
        try:
            fits = fit([need], self.budget, max_running=self.settings.max_running)
        except Unavailable:
            what = "are set as budget" if self.settings.memory_budget else "are free for models"
            refusals.insert(0, f"needs {_gb(needed)} of memory, {_gb(self.budget)} {what}")
        recipe = target.rpartition("@")[2]
        sets = self.machine.processor.instruction_sets
        alike = (each for each in SPEEDS if (each.shape, each.recipe) == (shape, recipe) and each.needs in sets)
        return Candidate(
            target=target,
            parameters=parameters,
            way=way,
            command=command,
            need_bytes=needed,
            file_bytes=file_bytes,
            fit=fits,
            speed=next(alike, None),
            start_up=next((each for each in START_UPS if (each.shape, each.recipe) == (shape, recipe)), None),
            refusals=tuple(refusals),
        )

    def configured(self) -> Iterator[str]:
        """What stands against the models that the settings name: what `nearfar serve` would end with."""
        for name in self.settings.models:
            try:
                try:
                    need = need_of(Bundle.read(model_folder(name, self.settings)))
                    fit([need], self.budget, max_running=self.settings.max_running)
                except NotFound:
                    row, recipe = wanted(name.removeprefix("local/"), None)
                    if refusals := self.catalog(row, recipe).refusals:
                        yield f"{row.name}@{recipe}: {'; '.join(refusals)}"
            except NearfarError as error:
                yield f"{name}: {error.message}"


def _stands_against(machine: Machine, settings: Settings) -> Iterator[str]:
    if why := refusal(settings.execution_provider, machine.providers):
        yield why
    if why := settings.refusal_to_bind():
        yield why


def _notes(machine: Machine, settings: Settings) -> Iterator[str]:
    provider = settings.execution_provider
    provider = ("cuda" if "cuda" in machine.providers else "cpu") if provider == "auto" else provider
    if not PROVIDERS[provider].tested:
        yield f"{provider} is untested: nearfar was not run on such a device"
    if not machine.disk.writable:
        yield (
            f"{machine.disk.folder} cannot be written: nothing is fetched, and comparisons and hosted models, "
            f"which are written down there, are refused"
        )
    if machine.is_arm:
        yield "on Arm nothing was measured: nearfar bench --model MODEL does"
    if machine.gpus and "cuda" not in machine.providers:
        yield f"{', '.join(machine.gpus)} is not used: cuda comes with {PROVIDERS['cuda'].comes_with}"


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB"
